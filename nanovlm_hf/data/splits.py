"""Which split a photo belongs to: by a hash of its id alone, so adding photos never moves one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

TEST_SHARE = 0.01
VALIDATION_SHARE = 0.10
SPLITS = ("train", "validation", "test")


def hash_of(image_id: int) -> float:
    """A number from 0 to 1 that depends on the id alone. The paper's 25 test samples are the 25 lowest."""
    digest = hashlib.sha256(str(image_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def lowest_hashes(image_ids: Sequence[int], count: int | None = None) -> list[int]:
    """The places of the photos with the lowest hashes, the lowest first: the same photos whatever else is there."""
    return sorted(range(len(image_ids)), key=[hash_of(image_id) for image_id in image_ids].__getitem__)[:count]


def split_of(image_id: int) -> str:
    """`test` (1%), `validation` (10%, as in section 2.1.1) or `train`."""
    position = hash_of(image_id)
    if position < TEST_SHARE:
        return "test"
    return "validation" if position < TEST_SHARE + VALIDATION_SHARE else "train"

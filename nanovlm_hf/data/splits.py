"""The split of an image depends on a hash of its id alone, so that adding images never moves one to another split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

TEST_SHARE = 0.01
VALIDATION_SHARE = 0.10
SPLITS = ("train", "validation", "test")


def split_position(image_id: int) -> float:
    """Return a number in [0, 1) that depends on the id alone. The paper's 25 test samples are those with the lowest."""
    digest = hashlib.sha256(str(image_id).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def lowest_hashes(image_ids: Sequence[int], count: int | None = None) -> list[int]:
    """Return the indices of the ids with the lowest hashes in ascending order of the hash.

    Args:
        count: number of indices; all if None.
    """
    return sorted(range(len(image_ids)), key=[split_position(image_id) for image_id in image_ids].__getitem__)[:count]


def split_of(image_id: int) -> str:
    """Return `test` (1%), `validation` (10%, as in section 2.1.1) or `train`."""
    position = split_position(image_id)
    if position < TEST_SHARE:
        return "test"
    return "validation" if position < TEST_SHARE + VALIDATION_SHARE else "train"

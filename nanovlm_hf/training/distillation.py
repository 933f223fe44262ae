"""Distillation (Hinton et al. 2015): the vision encoder learns to predict the features of pretrained ones.

Beyond the paper. The teachers see each image once, before training; the encoder sees crops of it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn
from tqdm import tqdm

from ..data.image_store import checksum
from ..evaluation.fingerprints import digest_of, weights_hash
from ..files import locked, named_disk_errors, read_json, validate, write_json
from ..vision_encoders import VisionEncoder, load_vision_encoder

BATCH_SIZE = 32


class _Note(BaseModel):
    """What is stored with the features."""

    crc32: int


def teacher_features(names: list[str], images: np.ndarray, device: torch.device | str) -> np.ndarray:
    """Return what the teachers know about each image: pooled features, and of classifiers logits as well.

    They are computed once and stored next to the decoded images, by a checksum of the pixels and a hash of the weights.

    Args:
        names: of the teachers, as `load_vision_encoder` takes them.
        images: uint8 (rows, height, width, 3), memory-mapped, from `decode_once`.
        device: where the teachers run.

    Returns:
        (rows, F), float16, the features of all teachers side by side; each has mean 0 and variance 1 over the images.

    Raises:
        InputError: for a teacher that cannot be loaded, or a full disk.
    """
    return np.concatenate([_standardised(_stored_features(name, images, device)) for name in names], axis=1)


def _standardised(features: np.ndarray) -> np.ndarray:
    values = features.astype(np.float32)
    values -= values.mean(0)
    values /= values.std(0) + 1e-3
    return values.astype(np.float16)


def _stored_features(name: str, images: np.ndarray, device: torch.device | str) -> np.ndarray:
    encoder = load_vision_encoder(name)
    encoder.module.to(device)
    source = Path(cast(np.memmap, images).filename)
    key = f"{len(images)}-{checksum(images):08x}-{weights_hash(encoder.module)}"
    if encoder.settings:
        key += f"-{digest_of([json.dumps(encoder.settings, sort_keys=True, default=str).encode()])}"
    path = source.with_name(f"features-{key}.npy")
    busy = f"waiting: another process is computing the features of {name} into {path.parent}"
    with named_disk_errors(path.parent), locked(path.with_suffix(".lock"), busy, wait=True) as held:
        stored = _intact(path, len(images))
        if stored is not None:
            return stored
        if held:  # files of runs that were killed
            for leftover in path.parent.glob(f"{path.stem}.*.partial"):
                leftover.unlink(missing_ok=True)
        features = np.concatenate(list(_encode(name, encoder, images)))
        # A unique name, for file systems without locks.
        partial = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("xb") as file:
                np.save(file, features)
                file.flush()
                os.fsync(file.fileno())
            # The checksum ties the two files together: a kill between the renames leaves a pair that is recreated.
            write_json(path.with_suffix(".json"), {"crc32": _checksum(features)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return features


def _intact(path: Path, rows: int) -> np.ndarray | None:
    """Return stored features, or None if they are missing or damaged, or have no checksum (of an earlier version)."""
    note = path.with_suffix(".json")
    try:
        crc32 = validate(read_json(note), _Note, note).crc32
        features = np.lib.format.open_memmap(path, mode="r") if path.is_file() else None
    except Exception:  # NumPy raises many kinds for a damaged header
        return None
    if features is None or features.dtype != np.float16 or features.ndim != 2 or len(features) != rows:
        return None
    values = np.array(features, order="C")
    return values if _checksum(values) == crc32 else None


def _checksum(features: np.ndarray) -> int:
    return checksum(features.view(np.uint8))


def _encode(name: str, encoder: VisionEncoder, images: np.ndarray) -> Iterator[np.ndarray]:
    with tqdm(total=len(images), desc=f"features of {name}", unit="image", mininterval=2) as bar:
        for start in range(0, len(images), BATCH_SIZE):
            batch = np.array(images[start : start + BATCH_SIZE])
            features, logits = encoder.encode(batch)
            parts = [features] if logits is None else [features, logits]
            yield torch.cat(parts, dim=1).cpu().numpy().astype(np.float16)
            bar.update(len(batch))


class DistillationHead(nn.Module):
    """Predict the teachers' features from the state of [CLS]. It serves training alone and is not part of the model.

    Args:
        width: D, of the vision encoder.
        features: F, of all teachers.
    """

    def __init__(self, width: int, features: int):
        super().__init__()
        self.fc = nn.Linear(width, features)
        nn.init.normal_(self.fc.weight, std=width**-0.5)
        nn.init.zeros_(self.fc.bias)

    def forward(self, cls_state: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error for each image, (images,): about 1 for an encoder that has learned nothing.

        Args:
            cls_state: (images, D).
            targets: (images, F), from `teacher_features`.
        """
        return (self.fc(cls_state).float() - targets.float()).square().mean(1)

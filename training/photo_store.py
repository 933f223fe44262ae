"""Photos decoded once: a memory-mapped uint8 array beside the cache of `datasets`."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, config
from tqdm import tqdm

from nanovlm_hf import InputError, NanoVLMImageProcessor
from nanovlm_hf.data.threads import map_in_order
from nanovlm_hf.photos import open_photo

MOST_DAMAGED = 0.01  # of a split's photos


def decode_once(split: Dataset, image_processor: NanoVLMImageProcessor) -> tuple[np.ndarray, Dataset]:
    """The photos of a split as uint8 (rows, 224, 224, 3), read from disk as they are needed, and the rows they are of.

    The first call decodes them; later calls find the file by the split's fingerprint. Photos that do not decode are
    left out with their rows, and said.

    Raises:
        InputError: if that are more than 1% of them.
    """
    size = image_processor.size
    folder = Path(config.HF_DATASETS_CACHE) / "nanovlm_hf"
    path = folder / f"photos-{split._fingerprint}-{size['height']}x{size['width']}.npy"
    damaged_path = path.with_suffix(".damaged.json")
    if not (path.exists() and damaged_path.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        damaged_path.write_text(json.dumps(_decode(split, image_processor, path)), encoding="utf-8")
    damaged = json.loads(damaged_path.read_text(encoding="utf-8"))
    if damaged:
        names = ", ".join(str(split.select_columns(["image_id"])[row]["image_id"]) for row in damaged[:5])
        say = f"dataset: {len(damaged)} of {len(split)} photos cannot be decoded (image_id {names})"
        if len(damaged) > MOST_DAMAGED * len(split):
            raise InputError(f"{say}: build the dataset anew")
        tqdm.write(f"{say}: they are left out")
        split = split.select(np.setdiff1d(np.arange(len(split)), damaged))
    return np.load(path, mmap_mode="r")[: len(split)], split


def decode_photo(image: dict[str, Any], image_processor: NanoVLMImageProcessor) -> np.ndarray | None:
    """A photo as `datasets` stores it (`bytes`, `path`), uint8 (224, 224, 3); None if it does not decode."""
    try:
        opened = open_photo(image["path"] or "photo", image["bytes"])
    except InputError:
        return None
    pixels = image_processor(opened, do_rescale=False, do_normalize=False, data_format="channels_last")
    return np.asarray(pixels["pixel_values"][0], dtype=np.uint8)


def _decode(split: Dataset, image_processor: NanoVLMImageProcessor, path: Path) -> list[int]:
    """Writes the photos that decode, and returns the rows of those that do not."""
    shape = (len(split), image_processor.size["height"], image_processor.size["width"], 3)
    aside = path.with_suffix(".partial")
    store = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
    damaged = []
    images = (row["image"] for row in split.select_columns(["image"]).cast_column("image", Image(decode=False)))
    decode = partial(decode_photo, image_processor=image_processor)
    decoded = map_in_order(decode, images, workers=len(os.sched_getaffinity(0)))
    kept = 0
    for row, (_, pixels) in enumerate(
        tqdm(decoded, total=len(split), desc="decoding photos", unit="photo", mininterval=2)
    ):
        if pixels is None:
            damaged.append(row)
        else:
            store[kept] = pixels
            kept += 1
    store.flush()
    aside.rename(path)  # the rows after the last one kept stay empty
    return damaged

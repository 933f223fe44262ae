"""Photos decoded once: a memory-mapped uint8 array beside the cache of `datasets`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset, config
from tqdm import tqdm

from nanovlm_hf import NanoVLMImageProcessor


def decode_once(split: Dataset, image_processor: NanoVLMImageProcessor) -> np.ndarray:
    """The photos of a split as uint8 (rows, 224, 224, 3), read from disk as they are needed.

    The first call decodes them (about 1,000 a second and core); later calls find the file by the split's fingerprint.
    """
    size = image_processor.size
    folder = Path(config.HF_DATASETS_CACHE) / "nanovlm_hf"
    path = folder / f"photos-{split._fingerprint}-{size['height']}x{size['width']}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        shape = (len(split), size["height"], size["width"], 3)
        store = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
        for row, image in enumerate(tqdm(split["image"], desc="decoding photos", unit="photo", mininterval=2)):
            pixels = image_processor(image, do_rescale=False, do_normalize=False, data_format="channels_last")
            store[row] = pixels["pixel_values"][0]
        store.flush()
        aside.rename(path)
    return np.load(path, mmap_mode="r")

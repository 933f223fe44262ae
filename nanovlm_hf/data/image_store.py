"""Images decoded once, into a memory-mapped uint8 array in the cache of `datasets`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from datasets import Dataset, Image, config
from pydantic import BaseModel
from tqdm import tqdm

from ..devices import cpu_count
from ..errors import InputError, first_line
from ..files import atomic_write, locked, read_json, validate
from ..image_processing_nanovlm import NanoVLMImageProcessor
from ..images import open_image_file
from .parallel import ordered_parallel_map
from .rows import image_bytes, image_name

MAX_DAMAGED_SHARE = 0.01  # of the images of a split
CHECKSUM_CHUNK = 1 << 24  # bytes


class _Note(BaseModel):
    """What is stored with an array: the rows whose images do not decode, and a checksum of the images that do."""

    damaged: list[int]
    crc32: int


def decode_once(split: Dataset, image_processor: NanoVLMImageProcessor) -> tuple[np.ndarray, Dataset]:
    """Return the images of a split as a memory-mapped uint8 array (rows, 224, 224, 3), and their rows.

    The first call decodes them. Later calls, and other processes, find the files by the split's fingerprint and the
    image processor's settings; damaged files are recreated. Images that do not decode are reported and left out.

    Raises:
        InputError: if more than 1% of the images do not decode, or the cache cannot be written.
    """
    path = _path(split, image_processor)
    shape = (len(split), image_processor.size["height"], image_processor.size["width"], 3)
    stored = _stored(path, shape)
    if stored is None:
        try:
            stored = _decode_locked(split, image_processor, path, shape)
        except OSError as error:
            raise InputError(
                f"{path.parent}: decoded images cannot be stored here ({error.strerror or first_line(error)}); they "
                f"need {np.prod(shape, dtype=np.int64) / 2**20:,.0f} MiB: set HF_HOME to a folder on another disk"
            ) from None
    images, damaged = stored
    if damaged:
        names = ", ".join(str(split.select_columns(["image_id"])[row]["image_id"]) for row in damaged[:5])
        problem = f"dataset: {len(damaged)} of {len(split)} images cannot be decoded (image_id {names})"
        if len(damaged) > MAX_DAMAGED_SHARE * len(split):
            raise InputError(f"{problem}: build the dataset again")
        tqdm.write(f"{problem}: they are left out")
        split = split.select(np.setdiff1d(np.arange(len(split)), damaged))
    return images[: len(split)], split


def decode_image(row: dict[str, Any], image_processor: NanoVLMImageProcessor) -> np.ndarray | None:
    """Return the image of a row as uint8 (height, width, 3) of the image processor, or None if it does not decode.

    Raises:
        InputError: if the row has a path, which is never opened, instead of the content of a file.
    """
    content = image_bytes(row)
    size = (image_processor.size["width"], image_processor.size["height"])
    try:
        opened = open_image_file(image_name(row), content, size=size)
    except InputError:
        return None
    pixels = image_processor(opened, do_rescale=False, do_normalize=False, data_format="channels_last")
    return np.asarray(pixels["pixel_values"][0], dtype=np.uint8)


def _path(split: Dataset, image_processor: NanoVLMImageProcessor) -> Path:
    height, width = image_processor.size["height"], image_processor.size["width"]
    # The settings that determine the stored pixels; the others apply to stored pixels.
    settings = {name: getattr(image_processor, name) for name in ("do_convert_rgb", "do_center_crop", "resample")}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    return Path(config.HF_DATASETS_CACHE) / "nanovlm_hf" / f"photos-{split._fingerprint}-{height}x{width}-{digest}.npy"


def _note_path(path: Path) -> Path:
    return path.with_suffix(".damaged.json")


def _stored(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, list[int]] | None:
    """Return the array and the damaged rows, or None if they are missing, damaged or do not belong together."""
    try:
        note = validate(read_json(_note_path(path)), _Note, _note_path(path))
        images = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # NumPy raises many kinds for a damaged header
        return None
    if images.dtype != np.uint8 or images.shape != shape or not 0 <= len(note.damaged) <= len(images):
        return None
    if any(not 0 <= row < len(images) for row in note.damaged):
        return None
    return (images, note.damaged) if checksum(images[: len(images) - len(note.damaged)]) == note.crc32 else None


def checksum(images: np.ndarray) -> int:
    """Return the CRC-32 of uint8 images."""
    content, crc = images.reshape(-1), 0
    for start in range(0, len(content), CHECKSUM_CHUNK):
        crc = zlib.crc32(content[start : start + CHECKSUM_CHUNK], crc)
    return crc


def _decode_locked(
    split: Dataset, image_processor: NanoVLMImageProcessor, path: Path, shape: tuple[int, ...]
) -> tuple[np.ndarray, list[int]]:
    """Decode the images, unless a process that held the lock has done so meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    busy = f"waiting: another process is decoding the images of this dataset into {path.parent}"
    with locked(path.with_suffix(".lock"), busy, wait=True) as held:
        stored = _stored(path, shape)
        if stored is not None:
            return stored
        if held:  # files of runs that were killed
            for leftover in path.parent.glob(f"{path.stem}.*.partial"):
                leftover.unlink(missing_ok=True)
        # A unique name, for file systems without locks.
        partial_path = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.partial")
        try:
            with partial_path.open("xb") as file:
                note = _decode(split, image_processor, file, shape)
                file.flush()
                os.fsync(file.fileno())
            # The checksum ties the two files together: a kill between the renames leaves a pair that is recreated.
            with atomic_write(_note_path(path)) as file:
                file.write(note.model_dump_json())
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)
    return np.lib.format.open_memmap(path, mode="r"), note.damaged


def _decode(split: Dataset, image_processor: NanoVLMImageProcessor, file: BinaryIO, shape: tuple[int, ...]) -> _Note:
    """Write the images that decode as an array in NumPy's format; the remaining rows at its end stay empty."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    end = file.tell() + int(np.prod(shape, dtype=np.int64))
    _reserve(file, end)
    note = _Note(damaged=[], crc32=0)
    for row, pixels in enumerate(_decoded(split, image_processor)):
        if pixels is None:
            note.damaged.append(row)
        elif pixels.shape != shape[1:]:
            raise InputError(
                f"image processor: its images are of shape {pixels.shape}, not {shape[1:]}: set do_resize to true"
            )
        else:
            content = np.ascontiguousarray(pixels).data
            file.write(content)
            note.crc32 = zlib.crc32(content, note.crc32)
    file.truncate(end)
    return note


def _reserve(file: BinaryIO, size: int) -> None:
    """Allocate the space, so that a full disk is reported before hours of decoding rather than after them."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _decoded(split: Dataset, image_processor: NanoVLMImageProcessor) -> Iterator[np.ndarray | None]:
    rows = split.select_columns(["image", "image_id"]).cast_column("image", Image(decode=False))
    decode = partial(decode_image, image_processor=image_processor)
    decoded = ordered_parallel_map(decode, rows, workers=cpu_count())
    for _, pixels in tqdm(decoded, total=len(split), desc="decoding images", unit="image", mininterval=2):
        yield pixels

"""Find images in folders, and open them in bounded time and memory, with one-line errors."""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from .errors import InputError, first_line, printable
from .files import open_regular
from .image_formats import (
    HEIF_REMEDY,
    HEIF_SUFFIXES,
    check_time,
    is_heif,
    peak_bytes,
    readable_formats,
    suffix_of,
    suffixes,
)
from .image_streams import ExcessiveError, MeteredFile, check_metadata, image_in_icns
from .pillow_nanovlm import SIDEWAYS, orientation_of, to_rgb, turn, white_of

# Enough for the default output of the largest phone cameras (108 and 200 megapixels); a hostile header can claim 64
# times more.
MAX_PIXELS = 120_000_000
MAX_BYTES = 2**30  # of a file; some formats are read completely before their size is known
MAX_MEMORY = 1_000_000_000  # bytes that all threads together may use for decoding
MODEL_SIZE = (224, 224)
# Resizing in two steps equals resizing in one, within rounding, if the intermediate image is three times larger.
GAP = 3
MOST_KEPT = 16_000_000  # pixels of an opened image; only a very long and narrow one reaches this limit
STRIP = 2_000_000  # pixels that are converted and reduced at a time

if "PILLOW_BLOCK_SIZE" not in os.environ:
    # Pillow allocates large images in blocks of 16 MiB, which the C library keeps for the thread after they are freed.
    # Larger blocks are returned to the operating system.
    Image.core.set_block_size(64 * 2**20)


class _Memory:
    """A memory budget that the threads of this process share: `take` waits until enough is free."""

    def __init__(self, size: int):
        self.size = size
        self.reset()

    def reset(self) -> None:
        self.taken = 0
        self.changed = threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.taken + size <= self.size)
            self.taken += size
        try:
            yield
        finally:
            with self.changed:
                self.taken -= size
                self.changed.notify_all()


_memory = _Memory(MAX_MEMORY)
_opening = threading.Lock()  # `catch_warnings` is not thread-safe


def _forget_threads() -> None:
    """Reset the budget and the lock in a forked process, which lacks the threads that hold them."""
    global _opening
    _opening = threading.Lock()
    _memory.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def open_image_file(
    path: str | Path, content: bytes | None = None, *, size: tuple[int, int] = MODEL_SIZE
) -> Image.Image:
    """Return an image as upright RGB (the first frame of an animation), reduced while it is decoded.

    The result keeps the aspect ratio, and at least three times the width and height of `size` if the file has as much;
    resizing it to `size` equals resizing the full image within rounding. An image of less than twice that is not
    reduced.

    Args:
        path: of the file; with `content`, only a name for messages.
        content: the file's bytes, if already read.
        size: width and height that the image will be resized to.

    Raises:
        InputError: if there is no such regular file, if it is not an image or a damaged one, or if it has more than
            `MAX_PIXELS` pixels or would take more than `MAX_MEMORY` to decode.
    """
    name = printable(path)
    try:
        with open_regular(path) if content is None else io.BytesIO(content) as file:
            try:
                return _decode(file, name, size)
            except UnidentifiedImageError:
                file.seek(0)
                if is_heif(file.read(12)) and "HEIF" not in readable_formats():
                    raise InputError(f"{name}: is a HEIC image: {HEIF_REMEDY}") from None
                raise
    except InputError:
        raise
    except ExcessiveError as error:
        raise InputError(f"{name}: {error}: save it again as an ordinary JPEG or PNG") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image that Pillow can read: use a JPEG, PNG or WebP file") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: the header claims far too many pixels: reduce the image first") from None
    except MemoryError:
        raise InputError(f"{name}: not enough memory to decode it: reduce the image first") from None
    except Exception as error:  # Pillow's decoders raise almost any type for damaged files
        raise InputError(f"{name}: the image is damaged ({first_line(error)}): download or copy it again") from None


def read_image_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of an image file.

    Raises:
        InputError: if it is not a regular file, is empty, or has more than `max_bytes`.
    """
    name = printable(path)
    with open_regular(path) as file:
        _file_size(file, name, max_bytes)
        try:
            return file.read()
        except (OSError, MemoryError) as error:
            raise InputError(f"{name}: cannot be read ({first_line(error)})") from None


def image_header(content: bytes) -> Image.Image:
    """Return an image that is not decoded, with its format, mode and metadata.

    Args:
        content: of a file that `open_image_file` accepts.
    """
    return _open(io.BytesIO(content))


def image_suffix(content: bytes) -> str:
    """Return the usual file suffix of an image's format (`.jpg`).

    Args:
        content: of a file that `open_image_file` accepts.
    """
    return suffix_of(image_header(content))


def scan_folder(folder: Path) -> tuple[list[Path], str]:
    """Return the images in a folder, sorted, and a summary of what else it contains, or "".

    Images are recognised by their suffix. Hidden files are not counted.

    Raises:
        OSError: if the folder cannot be read.
    """
    images, folders, heif, others = [], 0, 0, 0
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith("."):  # such as ._1.jpg, which macOS puts into archives
            continue
        if suffix in suffixes():
            images.append(path)
        elif os.path.isdir(path):
            folders += 1
        elif suffix in HEIF_SUFFIXES:
            heif += 1
        else:
            others += 1
    parts = []
    if others:
        parts.append(f"{others} files skipped: not images" if others > 1 else "1 file skipped: not an image")
    if heif:
        parts.append(f"{heif} HEIC {'files' if heif > 1 else 'file'} skipped: {HEIF_REMEDY}")
    if folders:
        parts.append(f"{folders} {'subfolders' if folders > 1 else 'subfolder'} skipped")
    return images, "; ".join(parts)


def _open(file: BinaryIO, formats: tuple[str, ...] | None = None) -> Image.Image:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    check_metadata(file, size)
    formats = formats or readable_formats()
    metered = MeteredFile(file, size)
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes and damaged metadata: an error follows if it matters
        image = Image.open(metered, formats=formats)  # type: ignore[arg-type]
    metered.release()
    return image


def _decode(
    file: BinaryIO,
    name: str,
    size: tuple[int, int],
    in_decoder: bool = True,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Return the image in a file as `open_image_file` does.

    Args:
        in_decoder: let the decoder reduce it, if it can.
        formats: that it may have, by default all that are readable.
    """
    file_size = _file_size(file, name)
    with _open(file, formats) as image:
        _check_size(image, name)
        inner = image_in_icns(image, file) if image.format == "ICNS" else None
        if inner:
            return _decode(inner, name, size, formats=("PNG", "JPEG2000"))
        width, height = image.size
        scale = _reduce_in_decoder(image, 2 * GAP * max(size)) if in_decoder else 1
        peak = peak_bytes(image, scale, width * height, file_size, MAX_MEMORY)
        if peak > MAX_MEMORY:
            raise InputError(
                f"{name}: decoding {width} x {height} pixels of {image.format} would take more than "
                f"{MAX_MEMORY // 10**9} GB of memory: reduce the image first"
            )
        check_time(image, file, width * height, file_size)
        try:
            with _memory.take(peak):
                _load(image)
                _check_size(image, name)
                return _reduced(image, (width / scale, height / scale) if scale > 1 else image.size, size)
        except OSError:
            if image.format != "JPEG2000" or scale == 1:
                raise
    return _decode(file, name, size, in_decoder=False, formats=formats)  # a JPEG 2000 image with fewer resolutions


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception:
        if image.format != "TIFF" or image.tile:
            raise
        # The pixels of the TIFF are decoded; the metadata that Pillow reads to rotate the image are damaged.
        image._size = image.im.size


def _file_size(file: BinaryIO, name: str, max_bytes: int = MAX_BYTES) -> int:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not size:
        raise InputError(f"{name}: is empty: use a JPEG, PNG or WebP file")
    if size > max_bytes:
        shown = f"{max_bytes >> 30} GiB" if max_bytes >= 2**30 else f"{max_bytes >> 20} MiB"
        raise InputError(f"{name}: the file has more than {shown}: reduce the image first")
    return size


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{name}: {width} x {height} pixels are more than {MAX_PIXELS:,}: reduce the image first")


def _reduce_in_decoder(image: Image.Image, least: int) -> int:
    """Have an opened image decoded at a half, a quarter or less, with at least `least` pixels a side.

    Returns:
        The factor of the reduction.
    """
    halvings = (min(image.size) // least).bit_length() - 1
    if image.format == "JPEG2000" and halvings > 0:
        image.reduce = halvings
        return 2**halvings
    whole = image.width
    image.draft(None, (least, least))  # affects JPEG only
    return round(whole / image.width)


def _reduced(image: Image.Image, extent: tuple[float, float], size: tuple[int, int]) -> Image.Image:
    """Return a decoded image as upright RGB, reduced as far as `size` allows.

    Args:
        extent: width and height of the content; after a reduction in the decoder the last pixels may be partly empty.
        size: width and height that the image will be resized to.
    """
    orientation = orientation_of(image)
    if orientation in SIDEWAYS:
        size = size[::-1]
    factor = min(int(whole / (GAP * wanted)) for whole, wanted in zip(extent, size, strict=True))
    factor = max(factor, math.ceil(math.sqrt(extent[0] * extent[1] / MOST_KEPT)))
    small = to_rgb(image, upright=False) if factor <= 1 else _reduced_in_strips(image, extent, factor)
    small = turn(small, orientation)
    small = small.copy() if small is image else small  # detached from its file
    small.info = {}
    return small


def _reduced_in_strips(image: Image.Image, extent: tuple[float, float], factor: int) -> Image.Image:
    """Convert to RGB and reduce by a factor, a few rows at a time: there is no memory for a copy of a huge image."""
    width, height = (math.ceil(whole / factor) for whole in extent)
    step = extent[1] / height  # input rows per output row
    rows = max(1, int(STRIP / (image.width * step)))
    white = white_of(image)
    small = Image.new("RGB", (width, height))
    for first in range(0, height, rows):
        last = min(first + rows, height)
        # The filter's support extends one step beyond these rows.
        top, bottom = max(0, math.floor((first - 1) * step)), min(image.height, math.ceil((last + 1) * step))
        strip = to_rgb(image.crop((0, top, image.width, bottom)), upright=False, white=white)
        box = (0, first * step - top, extent[0], min(last * step - top, strip.height))
        small.paste(strip.resize((width, last - first), Image.Resampling.HAMMING, box), (0, first))
    return small


__all__ = ["MAX_PIXELS", "image_header", "image_suffix", "open_image_file", "read_image_bytes", "scan_folder"]

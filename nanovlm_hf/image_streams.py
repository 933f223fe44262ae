"""Limits on what Pillow parses: its readers of metadata, written in Python, have no bounds of their own."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable
from typing import Any, BinaryIO

from PIL import Image

from .pillow_nanovlm import MOST_TAG_BYTES, tag_sizes, tags_fit

MOST_READS = 10_000  # while a file is opened: 1 MB of comments in a GIF, 3,000 chunks of a PNG
MOST_HEADER_BYTES = 32 * 2**20  # or the size of the file, if that is more; some formats are read completely
MOST_WHOLE_BYTES = 64 * 2**20  # of an AVIF, HEIC or WebP, which is read completely in each thread
MOST_NUMBERS = 250_000  # of a TIFF tag: the offsets of as many strips or tiles
MOST_EXIF_BYTES = 2**20  # of a JPEG's segments, which are joined one by one
MOST_SEGMENTS = 10_000  # of a JPEG
MOST_SEGMENTS_OF_ALL = 500_000  # of the JPEGs in a TIFF, which take a second or two
MOST_HEADERS = 100  # of Exif data in an AVIF, where random bytes look like one every 700 MB
MOST_ICON_PIXELS = 4_000_000  # of a bitmap and its mask
# Decoding a scan of a progressive JPEG takes up to 1.5 ns for each pixel, however short it is.
MOST_SCANNED_PIXELS = 2_400_000_000
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither stuffing, nor padding, nor a restart
_TIFF = re.compile(rb"II[*+]\0|II\0\*|MM\0[*+]|MM\*\0")
_CHUNK = 2**16


class ExcessiveError(Exception):
    """A file that would take too long or too much memory; the message states why."""


class MeteredFile:
    """A file that stops a reader after `MOST_READS` calls or too many bytes, until `release` is called."""

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self._reads = MOST_READS
        self._bytes = max(MOST_HEADER_BYTES, size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        return self._metered(self._file.read(size))

    def readline(self, size: int = -1) -> bytes:
        return self._metered(self._file.readline(size))

    def _metered(self, content: bytes) -> bytes:
        self._reads -= 1
        self._bytes -= len(content)
        if self._reads < 0 or self._bytes < 0:
            raise ExcessiveError("there are too many metadata before the first image")
        return content

    def release(self) -> None:
        """Remove the limits: the pixels are read next."""
        self.read, self.readline = self._file.read, self._file.readline  # type: ignore[method-assign]


def check_metadata(file: BinaryIO, size: int) -> None:
    """Check what Pillow holds in memory several times over when it opens a JPEG, TIFF, ICO or AVIF file.

    Args:
        file: at its start, where it is left.
        size: of the file, in bytes.

    Raises:
        ExcessiveError: if a JPEG has too many segments or Exif data, an ICO holds a large image, a file that is read
            completely is too large, or the tags of TIFF or Exif data overlap.
    """
    head = file.read(16)
    if head[:3] == b"\xff\xd8\xff":
        _check_jpeg(file)
    elif _TIFF.match(head):
        file.seek(0)
        counts, sizes = tag_sizes(file)
        # Those that exceed the file are not read, and bytes and texts are not turned into numbers.
        if any(count > MOST_NUMBERS and count < bytes_ <= size for count, bytes_ in zip(counts, sizes, strict=True)):
            raise ExcessiveError(f"a TIFF tag has more than {MOST_NUMBERS:,} numbers")
    elif head[:4] == b"\0\0\1\0":
        file.seek(0)
        _check_ico(file)
    elif head[4:8] == b"ftyp" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        if size > MOST_WHOLE_BYTES:
            raise ExcessiveError(
                f"files of this format are read completely, and it has more than {MOST_WHOLE_BYTES >> 20} MiB"
            )
        if head[4:8] == b"ftyp":
            _check_avif(file)
    file.seek(0)


def jpeg_scans(file: BinaryIO, at_most: int) -> int:
    """Return the number of scans of a JPEG; if there seem to be `at_most` or fewer, what they seem to be.

    Raises:
        ExcessiveError: if it has more than `MOST_SEGMENTS` segments.
    """
    number = _count(file, b"\xff\xda")  # which data of other segments may contain as well
    return number if number <= at_most else most_scans(file, [0])


def most_scans(file: BinaryIO, starts: Iterable[int]) -> int:
    """Return the largest number of scans of the JPEGs at some places of a file; 1 if there are none.

    Raises:
        ExcessiveError: if one has more than `MOST_SEGMENTS` segments, or all have more than `MOST_SEGMENTS_OF_ALL`.
    """
    most, segments = 1, 0
    for start in starts:
        codes = [code for code, _, _ in _segments(file, start)]
        most, segments = max(most, codes.count(0xDA)), segments + len(codes) + 1
        if segments > MOST_SEGMENTS_OF_ALL:
            raise ExcessiveError(f"its strips or tiles have more than {MOST_SEGMENTS_OF_ALL:,} segments")
    return most


def comments(file: BinaryIO) -> int:
    """Return the number of `#` in a file."""
    return _count(file, b"#")


def image_in_icns(image: Image.Image, file: BinaryIO) -> BinaryIO | None:
    """Return the PNG or JPEG 2000 in an opened ICNS, which may be larger than this claims, or None."""
    icon: Any = image.icns  # type: ignore[attr-defined]
    for code, _ in icon.SIZES[icon.bestsize()]:
        if code in icon.dct:
            file.seek(icon.dct[code][0])
            content = file.read(MOST_HEADER_BYTES)
            if re.match(rb"\x89PNG|\xff\x4f\xff\x51|\r\n\x87\n|\0\0\0\x0cjP", content):
                return io.BytesIO(content)
    return None


def _check_ico(file: BinaryIO) -> None:
    """Check the images in an ICO: Pillow decodes one when it opens the file, in the size that this one claims."""
    number = int.from_bytes(file.read(6)[4:], "little")
    for entry in range(min(number, MOST_READS)):
        file.seek(6 + 16 * entry + 12)
        file.seek(int.from_bytes(file.read(4), "little"))
        content = file.read(24).ljust(24, b"\0")
        width, height, compression = _bitmap_header(content)
        if content.startswith(b"\x89PNG"):
            width, height, compression = *struct.unpack_from(">II", content, 16), 0
        if width * height > MOST_ICON_PIXELS or compression in (1, 2):  # runs, which Pillow decodes in Python
            raise ExcessiveError(f"an icon cannot have an image of {width} x {height} pixels or of runs")


def _bitmap_header(content: bytes) -> tuple[int, int, int]:
    """Return width, height and compression of a bitmap without file header."""
    if content[0] == 12:  # of OS/2
        return *struct.unpack_from("<HH", content, 4), 0
    width, height, _, _, compression = struct.unpack_from("<iiHHI", content, 4)
    return abs(width), abs(height), compression


def _check_jpeg(file: BinaryIO) -> None:
    exif = b""
    for code, start, length in _segments(file, 0):
        if code == 0xDA:
            return
        file.seek(start)
        if code == 0xE1 and file.read(6) == b"Exif\0\0":
            exif += file.read(length - 6)
            if len(exif) > MOST_EXIF_BYTES:
                raise ExcessiveError("it has more than 1 MiB of Exif data")
            _check_tags(exif)
        elif code == 0xE2 and file.read(4) == b"MPF\0":
            _check_tags(file.read(length - 4))


def _check_avif(file: BinaryIO) -> None:
    file.seek(0)
    content = file.read()
    for number, found in enumerate(_TIFF.finditer(content)):
        if number == MOST_HEADERS:
            raise ExcessiveError(f"it has more than {MOST_HEADERS} headers of Exif data")
        _check_tags(content[found.start() : found.start() + MOST_TAG_BYTES])


def _check_tags(content: bytes) -> None:
    if not tags_fit(content):
        raise ExcessiveError("the tags of its Exif data overlap")


def _segments(file: BinaryIO, start: int) -> Any:
    """Yield marker, position and length of each segment of a JPEG as libjpeg finds it, up to the end of the image."""
    at = start + 2
    for _ in range(MOST_SEGMENTS):
        chunk = b""
        for size in (64, *[_CHUNK] * (1 + file.seek(0, io.SEEK_END) // (_CHUNK - 1))):
            file.seek(at)
            chunk = file.read(size)
            if found := _MARKER.search(chunk):
                break
            at += max(1, len(chunk) - 1)  # the last byte may be the first one of a marker
        else:
            return
        code, at = chunk[found.start() + 1], at + found.end()
        if code == 0xD9:
            return
        if code in (0x01, 0xD8):  # without content
            yield code, at, 0
            continue
        file.seek(at)
        length = max(2, int.from_bytes(file.read(2), "big"))
        yield code, at + 2, length - 2
        at += length
    raise ExcessiveError(f"it has more than {MOST_SEGMENTS:,} segments")


def _count(file: BinaryIO, pattern: bytes) -> int:
    file.seek(0)
    number, last = 0, b""
    while chunk := file.read(_CHUNK):
        number += (last + chunk).count(pattern)
        last = chunk[len(chunk) - len(pattern) + 1 :]
    return number


__all__ = ["ExcessiveError", "MeteredFile", "check_metadata", "comments", "image_in_icns", "jpeg_scans", "most_scans"]

"""Image files as they are stored in a dataset."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from ..images import image_header, open_image_file, read_image_bytes
from ..pillow_nanovlm import orientation_of

IMAGE_SIZE = 224
MOST_JPEG_BYTES = 2**20  # of an image of this size that is stored as it is
MOST_ORIGINAL_BYTES = 2**27  # some files are in memory at a time, and a row group of them
_METADATA = {"exif", "xmp", "comment", "photoshop", "mp"}  # of a JPEG, such as where and by whom a photo was taken


def jpeg_bytes(path: Path) -> bytes:
    """Return an image as a 224 x 224 RGB JPEG of quality 92, without metadata.

    A file that is already such a JPEG is returned unchanged.

    Raises:
        InputError: if the image cannot be read.
    """
    image = open_image_file(path, size=(IMAGE_SIZE, IMAGE_SIZE))
    if image.size == (IMAGE_SIZE, IMAGE_SIZE) and path.stat().st_size <= MOST_JPEG_BYTES:
        content = read_image_bytes(path)
        header = image_header(content)
        as_stored = header.format == "JPEG" and header.mode == "RGB" and orientation_of(header) == 1
        if as_stored and not _METADATA & header.info.keys():
            return content
    buffer = io.BytesIO()
    resized = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    resized.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def original_bytes(path: Path) -> bytes:
    """Return the file's own bytes after checking that the image can be decoded.

    Raises:
        InputError: if the image cannot be read.
    """
    content = read_image_bytes(path, MOST_ORIGINAL_BYTES)
    open_image_file(path, content)
    return content

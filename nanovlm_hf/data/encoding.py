"""Image files as they are stored in a dataset."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from ..images import image_header, open_image_file, read_image_bytes
from ..pillow_nanovlm import orientation_of

IMAGE_SIZE = 224


def jpeg_bytes(path: Path) -> bytes:
    """Return an image as a 224 x 224 RGB JPEG of quality 92, or the file's own bytes if it is such a JPEG.

    Raises:
        InputError: if the image cannot be read.
    """
    image = open_image_file(path, size=(IMAGE_SIZE, IMAGE_SIZE))
    if image.size == (IMAGE_SIZE, IMAGE_SIZE):
        content = read_image_bytes(path)
        header = image_header(content)
        if header.format == "JPEG" and header.mode == "RGB" and orientation_of(header) == 1:
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
    content = read_image_bytes(path)
    open_image_file(path, content)
    return content

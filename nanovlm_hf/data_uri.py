"""Images as data URIs: in self-contained pages and in requests to chat models."""

from __future__ import annotations

import base64
import io

from PIL import Image


def thumbnail_uri(image: Image.Image, size: int = 224) -> str:
    """Return an image for a page, with at most `size` pixels on the longer side."""
    thumbnail = image.copy()
    thumbnail.thumbnail((size, size))
    return data_uri(thumbnail, "WEBP", quality=75)


def data_uri(image: Image.Image, file_format: str, quality: int) -> str:
    """Return an image as a data URI.

    Args:
        file_format: a format of Pillow, such as `JPEG`.
        quality: of the compression, 1 to 100.
    """
    buffer = io.BytesIO()
    image.save(buffer, file_format, quality=quality)
    return bytes_uri(buffer.getvalue(), f"image/{file_format.lower()}")


def bytes_uri(content: bytes, media_type: str) -> str:
    """Return the content of a file as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"

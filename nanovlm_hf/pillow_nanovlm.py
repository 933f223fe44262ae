"""Convert Pillow images of any mode to upright RGB, and normalise their pixels, with Pillow and NumPy alone."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image


def central_square(width: int, height: int) -> tuple[int, int, int]:
    """Return left, top and side of the largest central square of an image."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # keys in which Pillow finds the orientation
MOST_TAG_BYTES = 2**24  # of Exif data; cameras write less than 2**16
_VALUE_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8, 0)  # in bytes, by the type of a tag


def tag_sizes(file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of values of each tag in the first directory of TIFF or Exif data, and their size in bytes."""
    head = file.read(16)
    order, big = "<" if head[:1] == b"I" else ">", head[2:3] == b"\x2b"  # Pillow tells BigTIFF by this byte
    kinds = [("tag", order + "u2"), ("type", order + "u2"), ("count", order + ("u8" if big else "u4"))]
    entry = np.dtype([*kinds, ("value", "V8" if big else "V4")])
    offset = np.frombuffer(head[8:16] if big else head[4:8], order + ("u8" if big else "u4"))
    file.seek(min(int(offset[0]), 2**62) if len(offset) else 0)
    number = np.frombuffer(file.read(8 if big else 2), order + ("u8" if big else "u2"))
    content = file.read(min(int(number[0]), 2**16) * entry.itemsize if len(number) else 0)
    entries = np.frombuffer(content[: len(content) // entry.itemsize * entry.itemsize], entry)
    counts = entries["count"].astype(np.float64)
    return counts, counts * np.take(_VALUE_SIZES, entries["type"], mode="clip")


def tags_fit(content: bytes) -> bool:
    """Return whether Exif data are small, and small when parsed: tags may claim the same bytes many times over."""
    content = content.removeprefix(b"Exif\0\0")
    if len(content) < 8:
        return True
    _, sizes = tag_sizes(io.BytesIO(content))
    read = sizes[sizes <= len(content)].sum()  # larger ones are not read
    return len(content) <= MOST_TAG_BYTES and read <= 2**20 + 2 * len(content)


def orientation_of(image: Image.Image) -> int | None:
    """Return the EXIF orientation: 1 if there is none, None if the metadata cannot be read."""
    try:
        exif = image.info.get("exif")
        if exif is None and "Raw profile type exif" in image.info:  # in hexadecimal digits after three lines
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        if exif is not None and not tags_fit(exif):
            return None
        return image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises many types of errors for damaged EXIF data
        return None


def turn(image: Image.Image, orientation: int | None) -> Image.Image:
    """Return an upright image without orientation metadata; the same object if it is upright already."""
    if orientation not in _TURNS:
        return image
    turned = image.transpose(_TURNS[orientation])
    turned.info = {name: value for name, value in turned.info.items() if name not in _METADATA}
    return turned


def white_of(image: Image.Image) -> float:
    """Return the value of white in an integer or float greyscale image."""
    # 16-bit images span 0..65535; other integer and float images are taken as 8-bit if their values fit, and floats as
    # 0..1 if they fit that.
    if image.mode.startswith("I;16"):
        return 65535.0
    if image.mode not in ("I", "F"):
        return 255.0
    most = cast(float, image.getextrema()[1])  # these modes have a single band
    if image.mode == "F" and most <= 1:
        return 1.0
    return 65535.0 if most > 255 else 255.0


def to_rgb(image: Image.Image, upright: bool = True, white: float | None = None) -> Image.Image:
    """Return an 8-bit RGB image: EXIF rotation applied, composited on white, 16-bit values scaled.

    Args:
        upright: apply the EXIF rotation.
        white: the result of `white_of` for the image that this one is a crop of.
    """
    if upright:
        image = turn(image, orientation_of(image))
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32)) * (255.0 / (white or white_of(image)))
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def scale_and_shift(settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return what pixel values are multiplied by and what is then added, to rescale and normalise them.

    Args:
        settings: `do_rescale`, `rescale_factor`, `do_normalize`, `image_mean` and `image_std` of the image processor.

    Returns:
        Two float32 arrays: (channels,), or () without normalisation.
    """
    scale = np.asarray(settings["rescale_factor"] if settings["do_rescale"] else 1.0, np.float32)
    if not settings["do_normalize"]:
        return scale, np.zeros((), np.float32)
    mean, std = (np.asarray(settings[name], np.float32) for name in ("image_mean", "image_std"))
    return scale / std, -mean / std


__all__ = [
    "MOST_TAG_BYTES",
    "SIDEWAYS",
    "central_square",
    "orientation_of",
    "scale_and_shift",
    "tag_sizes",
    "tags_fit",
    "to_rgb",
    "turn",
    "white_of",
]

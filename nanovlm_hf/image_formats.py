"""Image formats: the supported ones, their file suffixes, and the memory that decoding them takes."""

from __future__ import annotations

import functools
from typing import Any

from PIL import Image

# Every format that Pillow decodes by itself. Excluded are EPS (starts Ghostscript), IPTC (may contain an EPS), WMF,
# BUFR, GRIB and HDF5 (stubs that need a handler) and MPEG (identified but never decoded).
FORMATS = (
    *("BMP", "DIB", "GIF", "JPEG", "PPM", "PNG", "AVIF", "BLP", "CUR", "DCX", "DDS", "FITS", "FLI", "FTEX", "GBR"),
    *("HEIF", "ICNS", "ICO", "IM", "IMT", "JPEG2000", "MCIDAS", "MPO", "MSP", "PCD", "PCX", "PIXAR", "PSD", "QOI"),
    *("SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB"),
)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
HEIF_REMEDY = "pip install pillow-heif"
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_COMMON_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg"}  # an MPO is a JPEG followed by further images

# Peak bytes per pixel while decoding, by decoder or format, measured with Pillow 12.3; the image itself takes 4.
_PEAK = {"AVIF": 12, "HEIF": 12, "WEBP": 16, "jpeg2k": 26, "ppm_plain": 12, "fits_gzip": 48}
_OTHER_PEAK = 8
_UNKNOWN_SIZE = ("ICO", "ICNS")  # their headers do not give the size of the image inside
# Two decoders written in Python do not stop at the end of the file, so its size must match the pixels it claims.
_MOST_PIXELS_A_BYTE = {"DDS": 2, "FITS": 100}


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return the `FORMATS` that can be read, with HEIF only if pillow-heif is installed."""
    Image.init()
    try:
        import pillow_heif
    except Exception:  # not installed, or without the library it needs
        pass
    else:
        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of the files that can be read."""
    known = {*readable_formats(), "MPO"}  # Pillow opens MPO as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def suffix_of(image: Image.Image) -> str:
    """Return the usual suffix of an opened image's format."""
    if image.format in _COMMON_SUFFIXES:
        return _COMMON_SUFFIXES[image.format]
    plain = f".{image.format.lower()}"
    own = [suffix for suffix, name in Image.registered_extensions().items() if name == image.format]
    return plain if plain in own or not own else own[0]


def is_heif(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of a HEIC or HEIF image."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def peak_bytes(image: Image.Image, scale: int, pixels: int, file_size: int, most: int) -> int:
    """Estimate the peak memory in bytes of decoding an opened image; more than `most` if it cannot be decoded.

    Args:
        image: not decoded yet.
        scale: factor by which the decoder reduces it.
        pixels: of the full image.
        file_size: in bytes.
        most: limit for decoding, in bytes.
    """
    if image.format in _UNKNOWN_SIZE:
        return most
    if pixels > file_size * _MOST_PIXELS_A_BYTE.get(image.format, pixels):
        return most + 1
    codec = image.tile[0].codec_name if getattr(image, "tile", None) else ""
    if codec == "jpeg":  # progressive scans are kept as two-byte coefficients, whatever the scale
        return 4 * pixels // scale**2 + 2 * len(image.getbands()) * pixels
    if codec == "jpeg2k":
        return _PEAK[codec] * pixels // scale**2
    if image.format == "TIFF":
        turned = image.tag_v2.get(274, 1) != 1  # Pillow makes a rotated copy
        return (8 if turned else 4) * pixels + (_largest_block(image.tag_v2) if codec == "libtiff" else 0)
    return _PEAK.get(codec, _PEAK.get(image.format, _OTHER_PEAK)) * pixels


def _largest_block(tags: Any) -> int:
    """Return the size in bytes of one strip or tile of a TIFF, which is decoded at once."""
    bits = max(32, sum(tags.get(258, (8,))))
    width, height = tags.get(322), tags.get(323)
    if width is None or height is None:
        width, height = tags[256], min(tags[257], tags.get(278, tags[257]))
    return max(0, width * height * bits // 8)

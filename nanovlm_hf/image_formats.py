"""Image formats: the supported ones, their file suffixes, and the memory that decoding them takes."""

from __future__ import annotations

import functools
from typing import Any, BinaryIO

from PIL import Image

from .image_streams import MOST_SCANNED_PIXELS, ExcessiveError, comments, jpeg_scans, most_scans

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
_ICONS = ("ICO", "ICNS")  # their headers do not give the size of the image inside
# Two decoders written in Python do not stop at the end of the file, so its size must match the pixels it claims.
_MOST_PIXELS_A_BYTE = {"DDS": 2, "FITS": 100}
# Decoders written in Python take up to 1.5 s for a million pixels or, these, for a million values.
_BY_VALUES = ("ppm", "ppm_plain", "dds_rgb")
_MOST_PYTHON_VALUES = 4_000_000
_MOST_PYTHON_BYTES = {"bmp_rle": 8_000_000, "BLP1": 8_000_000, "BLP2": 8_000_000, "MSP": 1_000_000}
_MOST_PLAIN_BYTES = 64_000_000  # of a PNM in digits
_MOST_COMMENTS = 10_000  # of a PNM in digits: the rest of a block is copied for each
_TIFF_SCANS = 100  # libtiff stops a JPEG in a TIFF after as many
_BLP_OF_JPEG = 0  # the compression of a BLP that holds a JPEG, of any size


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
    if image.format in _ICONS:
        return most
    if pixels > file_size * _MOST_PIXELS_A_BYTE.get(image.format, pixels):
        return most + 1
    codec = image.tile[0].codec_name if getattr(image, "tile", None) else ""
    if codec == "jpeg":  # progressive scans are kept as two-byte coefficients, whatever the scale
        return 4 * pixels // scale**2 + 2 * len(image.getbands()) * pixels
    if codec == "jpeg2k":
        return _PEAK[codec] * pixels // scale**2
    if codec == "bmp_rle":  # one step may skip 255 rows, twice in memory
        return 512 * image.width + _OTHER_PEAK * pixels
    if image.format == "TIFF":
        turned = image.tag_v2.get(274, 1) != 1  # Pillow makes a rotated copy
        return (8 if turned else 4) * pixels + (_largest_block(image.tag_v2) if codec == "libtiff" else 0)
    return _PEAK.get(codec, _PEAK.get(image.format, _OTHER_PEAK)) * pixels


def check_time(image: Image.Image, file: BinaryIO, pixels: int, file_size: int) -> None:
    """Check that decoding an opened image takes no more than a few seconds.

    Args:
        image: not decoded yet.
        file: that it is in.
        pixels: of the full image.
        file_size: in bytes.

    Raises:
        ExcessiveError: if it would take longer.
    """
    tile = image.tile[0] if getattr(image, "tile", None) else None
    codec = tile.codec_name if tile else ""
    place = file.tell()
    if codec in Image.DECODERS:  # those written in Python
        values = pixels * (len(image.getbands()) if codec in _BY_VALUES else 1)
        if values > _MOST_PYTHON_VALUES:
            raise ExcessiveError(f"{image.width} x {image.height} pixels of this kind of {image.format} take too long")
        most = _MOST_PLAIN_BYTES if codec == "ppm_plain" else _MOST_PYTHON_BYTES.get(codec, file_size)
        if file_size > most:
            raise ExcessiveError(f"{file_size:,} bytes of this kind of {image.format} take too long")
        if codec == "ppm_plain" and comments(file) > _MOST_COMMENTS:
            raise ExcessiveError(f"it has more than {_MOST_COMMENTS:,} comments")
        if codec == "BLP1" and tile.args[0] == _BLP_OF_JPEG:
            raise ExcessiveError("a BLP that holds a JPEG is not supported")
    scans = 1
    if codec == "jpeg":
        scans = jpeg_scans(file, at_most=MOST_SCANNED_PIXELS // max(1, pixels))
    elif image.format == "TIFF" and image.tag_v2.get(259) == 7 and pixels * _TIFF_SCANS > MOST_SCANNED_PIXELS:
        blocks = {*image.tag_v2.get(273, ()), *image.tag_v2.get(324, ())}
        scans = most_scans(file, [start for start in blocks if start < file_size])
    if scans > 1 and scans * pixels > MOST_SCANNED_PIXELS:
        raise ExcessiveError(f"it is a JPEG of {scans:,} scans")
    file.seek(place)


def _largest_block(tags: Any) -> int:
    """Return the size in bytes of one strip or tile of a TIFF, which is decoded at once."""
    bits = max(32, sum(tags.get(258, (8,))))
    width, height = tags.get(322), tags.get(323)
    if width is None or height is None:
        width, height = tags[256], min(tags[257], tags.get(278, tags[257]))
    return max(0, width * height * bits // 8)

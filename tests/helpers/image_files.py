"""Generated image files: formats, sizes, modes and invalid metadata."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

from nanovlm_hf import NanoVLMImageProcessor


def png(width: int, height: int, pixels: bytes, colour_type: int = 2, depth: int = 8) -> bytes:
    """Return a PNG with these compressed pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(range(30))) if colour_type == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + header + palette + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size but has almost no content."""
    return png(width, height, zlib.compress(b""))


def huge_png(colour_type: int, pixel: bytes, depth: int = 8, side: int = 10_900) -> bytes:
    """Return a PNG of one colour with 118.8 million pixels, in half a megabyte."""
    packer = zlib.compressobj(6)
    pixels = b"".join(packer.compress(b"\0" + pixel * side) for _ in range(side)) + packer.flush()
    return png(side, side, pixels, colour_type, depth)


def encoded(image: Image.Image, format: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


@functools.cache
def scene(width: int, height: int) -> Image.Image:
    """Return an image with gradients and edges, similar to a photo."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(40 * x + 9 * y), np.cos(25 * y * x), np.sign(np.sin(12 * x) * np.cos(17 * y))]
    return Image.fromarray(np.stack([127.5 + 120 * wave for wave in waves], axis=-1).astype(np.uint8))


def model_sees(image: Image.Image) -> np.ndarray:
    pixels = NanoVLMImageProcessor()(image, do_rescale=False, do_normalize=False, data_format="channels_last")
    return np.asarray(pixels["pixel_values"][0], np.int16)


# Formats that Pillow writes, with a mode that each supports.
WRITABLE = {
    **dict.fromkeys(("BMP", "DIB", "JPEG", "PNG", "AVIF", "JPEG2000", "WEBP", "TIFF", "PPM", "TGA", "PCX"), "RGB"),
    **dict.fromkeys(("IM", "SGI", "QOI", "ICO", "ICNS", "DDS", "MPO"), "RGB"),
    **{"GIF": "P", "BLP": "P", "MSP": "1", "XBM": "1", "SPIDER": "F"},
}


INVALID_EXIF = {
    "no TIFF header": b"Exif\0\0nothing of the kind",
    "cut": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    "an offset beyond the end": b"Exif\0\0MM\0*\xff\xff\xff\x00",
    "an invalid type": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x63\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
    "nothing": b"",
}


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def clear(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(scene(*image.size).getchannel(0))
    return image


def lab(image: Image.Image) -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


def grey(dtype, factor):
    return lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(dtype) * dtype(factor))


KINDS = {
    "RGB": (lambda image: image, "PNG", {}),
    "RGBA": (clear, "PNG", {}),
    "LA": (lambda image: clear(image).convert("LA"), "PNG", {}),
    "palette": (lambda image: image.quantize(64), "PNG", {}),
    "palette with a clear colour": (lambda image: image.quantize(64), "PNG", {"transparency": 3}),
    "palette with alphas": (lambda image: image.quantize(64), "PNG", {"transparency": bytes(range(0, 256, 4))}),
    "grey with a clear value": (lambda image: image.convert("L"), "PNG", {"transparency": 100}),
    "16-bit grey": (grey(np.uint16, 257), "PNG", {}),
    "integers": (grey(np.int32, 200), "TIFF", {}),
    "floats": (grey(np.float32, 1), "TIFF", {}),
    "16-bit floats": (grey(np.float32, 257), "TIFF", {}),
    "CMYK": (lambda image: image.convert("CMYK"), "TIFF", {"compression": "tiff_lzw"}),
    "CMYK JPEG": (lambda image: image.convert("CMYK"), "JPEG", {"quality": 92}),
    "LAB": (lab, "TIFF", {}),
    "JPEG": (lambda image: image, "JPEG", {"quality": 92}),
    "JPEG 2000": (lambda image: image, "JPEG2000", {}),
    "JPEG 2000 of one resolution": (lambda image: image, "JPEG2000", {"num_resolutions": 1}),
    **{f"turned {way}": (lambda image: image, "JPEG", {"quality": 92, "exif": turned(way)}) for way in range(2, 9)},
    "turned TIFF": (lambda image: image, "TIFF", {"exif": turned(6)}),
    "turned WebP": (clear, "WEBP", {"exif": turned(8), "method": 0}),
}

"""Opening photo files safely: bounded by their header before a pixel is decoded, and errors in one line."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .errors import InputError

# Room for the largest phone cameras (108 and 200 megapixels deliver at most this much by default); 64 times less than
# what a hostile header can claim.
MAX_PIXELS = 120_000_000

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def open_photo(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Decodes a photo; of an animation, the first frame. Mode and EXIF rotation are the image processor's part.

    Args:
        path: of the file; with `content` only its name, for messages.
        content: the file's bytes, where they are at hand.

    Raises:
        InputError: for a file that is missing, empty, no picture, truncated, or of more than `MAX_PIXELS` pixels.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below says it better
            image = Image.open(path if content is None else io.BytesIO(content))  # reads the header alone
        with image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"{path}: {width} x {height} pixels are more than {MAX_PIXELS:,}: make the picture smaller first"
                )
            image.seek(0)
            image.load()
            return image.copy()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: this is a folder, not a photo") from None
    except PermissionError:
        raise InputError(f"{path}: may not be read: check its permissions") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: the header claims far too many pixels: make the picture smaller first") from None
    except UnidentifiedImageError:
        problem = (
            "is empty"
            if (path.stat().st_size if content is None else len(content)) == 0
            else "is no picture that Pillow can read"
        )
        raise InputError(f"{path}: {problem}: give a JPEG, PNG or WebP file") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: the picture is damaged ({error}): fetch it again") from None


__all__ = ["MAX_PIXELS", "PHOTO_SUFFIXES", "open_photo"]

import struct
import zlib

import pytest
from conftest import picture
from PIL import Image

from nanovlm_hf import InputError
from nanovlm_hf.photos import open_photo


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif"])
def test_formats(tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    picture().save(path)
    assert open_photo(path).size == (48, 40)


def test_of_an_animation_the_first_frame(tmp_path):
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert open_photo(path).convert("RGB").getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("size", "message"), [((20_000, 20_000), "pixels"), ((11_000, 11_000), "11000 x 11000 pixels")]
)
def test_a_huge_picture_is_refused_by_its_header(tmp_path, size, message):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(InputError, match=message):
        open_photo(path)


def test_bad_files_are_named(tmp_path):
    cases = {"empty.jpg": (b"", "is empty"), "text.jpg": (b"hello there", "no picture that Pillow can read")}
    whole = tmp_path / "whole.jpg"
    picture(size=(300, 300)).save(whole, quality=95)
    cases["cut.jpg"] = (whole.read_bytes()[:2000], "is damaged")
    cases["cut.png"] = (png_header(50, 50), "is damaged")
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            open_photo(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        open_photo(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="this is a folder"):
        open_photo(tmp_path)

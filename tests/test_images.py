import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from nanovlm_hf import InputError, images
from nanovlm_hf.image_formats import FORMATS, readable_formats, suffixes
from nanovlm_hf.images import MAX_MEMORY, image_suffix, open_image_file, scan_folder

from helpers.image_files import INVALID_EXIF, KINDS, WRITABLE, encoded, huge_png, model_sees, png_header, scene, turned
from helpers.models import random_image


@pytest.mark.parametrize("format", WRITABLE)
def test_format_is_detected_by_content_not_by_name(tmp_path, format):
    image = scene(48, 48).convert("L" if WRITABLE[format] == "F" else "RGB").convert(WRITABLE[format])
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(image, format))
    opened = open_image_file(path)
    assert opened.mode == "RGB"
    if format != "ICNS":  # has fixed sizes
        assert opened.size == (48, 48)
        want, tolerance = image.convert("L").convert("RGB"), 40 if format in ("JPEG", "MPO", "AVIF", "WEBP") else 2
        assert np.abs(np.asarray(opened.convert("L"), int) - np.asarray(want)[:, :, 0]).max() <= tolerance


def test_formats_are_those_pillow_decodes_itself():
    Image.init()
    left_out = set(Image.OPEN) - set(readable_formats())
    assert left_out == {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
    assert set(FORMATS) - set(readable_formats()) <= {"HEIF", "MPO"}  # MPO is opened as JPEG
    assert {".jpg", ".jfif", ".mpo", ".avif", ".jp2", ".webp", ".apng", ".tiff", ".bmp", ".qoi"} <= suffixes()
    assert not suffixes() & {".eps", ".ps", ".pdf", ".wmf", ".h5", ".mpg", ".txt", ".svg"}


@pytest.mark.parametrize(
    ("format", "suffix"), {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tiff", "AVIF": ".avif"}.items()
)
def test_suffix_of_a_format_is_recognised(format, suffix):
    assert image_suffix(encoded(scene(40, 40), format)) == suffix
    assert suffix in suffixes()


def test_animation_opens_as_its_first_frame(tmp_path):
    for format in ("GIF", "WEBP", "PNG", "AVIF", "TIFF", "MPO"):
        frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "green")]
        path = tmp_path / "moving"
        path.write_bytes(encoded(frames[0], format, save_all=True, append_images=frames[1:]))
        red, green, blue = open_image_file(path).getpixel((5, 5))
        assert red > 250
        assert max(green, blue) < 5


@pytest.mark.parametrize(
    ("size", "message"), [((20_000, 20_000), "pixels"), ((11_000, 11_000), "11000 x 11000 pixels")]
)
def test_huge_image_is_rejected_by_its_header(tmp_path, size, message):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(InputError, match=message):
        open_image_file(path)


def test_icon_with_a_huge_image_inside_is_rejected():
    icon = bytearray(encoded(scene(48, 48), "ICO", sizes=[(48, 48)]))
    huge = huge_png(3, b"\1", side=11_500)
    icon[14:18] = struct.pack("<I", len(huge))
    with pytest.raises(InputError, match="11500 x 11500 pixels"):
        open_image_file("x.ico", bytes(icon[:22]) + huge)


def test_size_limit_accounts_for_the_decoder():
    dds = bytearray(encoded(scene(48, 48), "DDS"))
    dds[12:20] = struct.pack("<II", 10_000, 10_000)  # this decoder runs on past the end of the file, for minutes
    tile = tiff(60, 40, t259=5, t322=65_536, t323=65_536, t324=8, t325=2400)
    for content in (bytes(dds), tile):
        start = time.process_time()
        with pytest.raises(InputError, match="would take more than 1 GB"):
            open_image_file("photo", content)
        assert time.process_time() - start < 5


def bitmap(width: int, height: int, data: bytes, compression: int = 1) -> bytes:
    """Return a grey BMP of 8 bits; compression 1 stands for runs."""
    start = 14 + 40 + 1024
    header = struct.pack("<iiiHHIIiiII", 40, width, height, 1, 8, compression, len(data), 2835, 2835, 256, 0)
    palette = b"".join(bytes((grey, grey, grey, 0)) for grey in range(256))
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def icon(kind: int, content: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, kind, 1, 32, 32, 0, 0, 1, 8, len(content), 22) + content


def icns(content: bytes) -> bytes:
    chunk = b"ic09" + struct.pack(">I", 8 + len(content)) + content
    return b"icns" + struct.pack(">I", 8 + len(chunk)) + chunk


def chunks(kind: bytes, content: bytes, times: int = 1) -> bytes:
    """Return a PNG with these chunks after its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    whole = encoded(scene(16, 16), "PNG")
    return whole[:33] + chunk * times + whole[33:]


def gif_with_comment(blocks: int) -> bytes:
    whole = encoded(scene(8, 8).quantize(8), "GIF")
    start = 13 + 3 * 2 ** ((whole[10] & 7) + 1)
    return whole[:start] + b"!\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0" + whole[start:]


def segments(kind: int, content: bytes, times: int = 1) -> bytes:
    """Return a JPEG with these segments at its start."""
    segment = bytes((0xFF, kind)) + struct.pack(">H", len(content) + 2) + content
    whole = encoded(scene(16, 16), "JPEG")
    return whole[:2] + segment * times + whole[2:]


def tags(number: int, size: int, kind: int = 7) -> bytes:
    """Return TIFF or Exif data with many tags of the same `size` bytes."""
    count = size // (2 if kind == 3 else 1)
    entries = (struct.pack("<HHII", 400 + tag, kind, count, 8) for tag in range(number))
    return (b"II*\0" + struct.pack("<IH", 8, number) + b"".join(entries) + bytes(4)).ljust(size + 8, b"\0")


def jpeg_of_scans(scans: int, side: int = 10_000) -> bytes:
    """Return a grey progressive JPEG in which many scans change nothing."""

    def segment(kind: int, content: bytes) -> bytes:
        return bytes((0xFF, kind)) + struct.pack(">H", len(content) + 2) + content

    tables = segment(0xC4, bytes((0, 1, *[0] * 15, 0))) + segment(0xC4, bytes((0x10, 1, *[0] * 15, 0xE0)))
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00")
    first = segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + bytes(((side + 7) // 8) ** 2 // 8 + 1)
    more = segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + b"\x7f\xff\x00"
    return b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + frame + tables + first + more * scans + b"\xff\xd9"


def tiff_of_jpeg(content: bytes, side: int) -> bytes:
    """Return a TIFF with one strip that is a grey JPEG."""
    values = {256: side, 257: side, 258: 8, 259: 7, 262: 1, 273: 8, 277: 1, 278: side, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(content))
        + content
        + struct.pack("<H", len(values))
        + entries
        + bytes(4)
    )


def tiff_of_strips(strips: int, side: int = 6_000) -> bytes:
    """Return a TIFF whose strips are the same JPEG of many segments, from other places on."""
    content = b"\xff\xd8" + b"\xff\xfe\0\2" * 9_990 + b"\xff\xda\0\2" * 60
    offsets = b"".join(struct.pack("<I", 8 + 4 * number) for number in range(strips))
    sizes = struct.pack("<I", 100) * strips
    where = 8 + len(content)
    rows = -(-side // strips)
    values = {256: side, 257: side, 258: 8, 259: 7, 262: 1, 273: where, 277: 1, 278: rows, 279: where + len(offsets)}
    counts = {273: strips, 279: strips}
    entries = b"".join(struct.pack("<HHII", tag, 4, counts.get(tag, 1), value) for tag, value in values.items())
    tables = content + offsets + sizes
    start = struct.pack("<2sHI", b"II", 42, 8 + len(tables))
    return start + tables + struct.pack("<H", len(values)) + entries + bytes(4)


SKIP = b"\x01\x05\x00\x02\x00\xff"  # a pixel, then 255 rows further
LINE_END = b"\x01\x05\x00\x00"
BLP_OF_JPEG = struct.pack("<4siIIIiI", b"BLP1", 0, 0, 16, 16, 5, 0) + bytes(200)
EXCESSIVE = {
    "skipped rows": lambda: bitmap(20_000_000, 2, SKIP),
    "skipped rows of 4 million": lambda: bitmap(4_000_000, 1, SKIP),
    "a line without end": lambda: bitmap(120_000_000, 1, LINE_END),
    "runs without pixels": lambda: bitmap(50, 50, bytes(9_000_000)),
    "runs of 4 bits": lambda: bitmap(20_000_000, 2, SKIP, compression=2),
    "runs in a DIB": lambda: bitmap(20_000_000, 4, SKIP)[14:],
    "runs in a cursor": lambda: icon(2, bitmap(20_000_000, 4, SKIP)[14:]),
    "runs in an icon": lambda: icon(1, bitmap(3_000, 4, SKIP)[14:]),
    "a large bitmap in an icon": lambda: icon(1, bitmap(30_000, 4_000, bytes(99), compression=0)[14:]),
    "a large PNG in an icon": lambda: icon(1, png_header(10_000, 10_000)),
    "a large PNG in an ICNS": lambda: icns(png_header(12_000, 12_000)),
    "a JPEG in a BLP": lambda: BLP_OF_JPEG,
    "a comment in a GIF": lambda: gif_with_comment(16_000),
    "chunks of a PNG": lambda: chunks(b"tEXt", b"", 20_000),
    "Exif segments": lambda: segments(0xE1, b"Exif\0\0" + bytes(65_000), 20),
    "segments": lambda: segments(0xFE, b"", 20_000),
    "junk between segments": lambda: encoded(scene(16, 16), "JPEG")[:20] + bytes(100_000),
    "overlapping tags in Exif data": lambda: segments(0xE1, b"Exif\0\0" + tags(4_000, 50_000)),
    "overlapping tags in an MPO": lambda: segments(0xE2, b"MPF\0" + tags(4_000, 50_000, 3)),
    "overlapping tags in an AVIF": lambda: bytes(4) + b"ftypavif" + tags(60_000, 800_000),
    "overlapping tags in an AVIF, behind others": lambda: (
        bytes(4) + b"ftypavif" + (b"II*\0" + bytes(60)) * 120 + tags(60_000, 800_000)
    ),
    "headers of an AVIF": lambda: bytes(4) + b"ftypavif" + b"II*\0" * 1_000_000,
    "strips in one JPEG of a TIFF": lambda: tiff_of_strips(2_000),
    "overlapping tags in a TIFF": lambda: tags(60_000, 800_000),
    "numbers of a TIFF": lambda: tags(1, 600_000, 3),
    "comments of a PGM": lambda: b"P2\n8 8\n255\n" + b"#\n" * 20_000 + b" 1" * 64,
    "comments of a PBM": lambda: b"P1\n8 8\n" + b"#\n" * 20_000 + b" 1" * 64,
    "comments of a PPM": lambda: b"P3\n8 8\n255\n" + b"#\n" * 20_000 + b" 1" * 192,
    "comments in the header of a PPM": lambda: b"P6\n" + b"#\n" * 20_000 + b"8 8\n255\n" + bytes(192),
    "a large PBM in digits": lambda: b"P1\n6000 6000\n1 0",
    "a large PPM in digits": lambda: b"P3\n2000 2000\n255\n1 2 3",
    "a large PPM of 16 bits": lambda: b"P6\n2000 2000\n65535\n" + bytes(99),
    "a large QOI": lambda: b"qoif" + struct.pack(">IIBB", 4000, 4000, 3, 0) + bytes(99),
    "a large XPM": lambda: b'/* XPM */\nstatic\n"5000 4000 1 1",\n"a c #010203",\n"a',
    "scans": lambda: jpeg_of_scans(600),
    "scans in a TIFF": lambda: tiff_of_jpeg(jpeg_of_scans(90), 10_000),
}


@pytest.mark.parametrize("kind", EXCESSIVE)
def test_file_that_takes_long_is_refused_at_once(kind):
    content = EXCESSIVE[kind]()
    start = time.process_time()
    with pytest.raises(InputError, match=r"^photo: .*(save it again|reduce the image)") as caught:
        open_image_file("photo", content)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("size", [60, 600_000], ids=["small", "large"])
def test_exif_data_that_take_too_much_memory_are_not_read(size):
    for format, where in (("PNG", b"eXIf"), ("WEBP", None)):
        exif = tags(size // 20, size)
        if where:
            content = chunks(where, exif)
        else:
            harmless = b"II*\0" + struct.pack("<I", 8) + bytes(2) + b"\7" * (len(exif) - 10)
            content = encoded(scene(16, 16), format, exif=harmless).replace(harmless, exif)
        start = time.process_time()
        assert open_image_file("photo", content).size == (16, 16)
        assert time.process_time() - start < 2


ORDINARY = {
    "runs": lambda: bitmap(40, 30, b"\x28\x05\0\0" * 30),
    "a comment in a GIF": lambda: gif_with_comment(1_000),
    "texts of a PNG": lambda: chunks(b"tEXt", b"Comment\0a", 2_000),
    "Exif segments": lambda: segments(0xE1, b"Exif\0\0" + bytes(65_000), 3),
    "a long profile": lambda: segments(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000), 60),
    "extended XMP": lambda: segments(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000), 300),
    "a film after a JPEG": lambda: encoded(scene(16, 16), "JPEG") + b"\xff\xda" * 100_000,
    "an icon in an ICNS": lambda: icns(encoded(scene(512, 512), "PNG")),
    "a PGM with comments": lambda: b"P2\n8 8\n#\n255\n" + b"#\n" * 100 + b" 1" * 64,
    "scans of a small JPEG": lambda: jpeg_of_scans(200, side=80),
    "a TIFF of a JPEG": lambda: tiff_of_jpeg(jpeg_of_scans(20, side=80), 80),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_file_of_the_same_kind_is_read(kind):
    assert open_image_file("photo", ORDINARY[kind]()).mode == "RGB"


@pytest.mark.parametrize("most", [0.5, 1.0, 200.0, 40_000.0], ids=str)
def test_floats_are_read_in_the_range_that_they_use(most):
    values = np.full((20, 20), 0.9 * most, np.float32)
    values[0, 0] = most
    white = 1.0 if most <= 1 else 255.0 if most <= 255 else 65535.0
    pixels = np.asarray(open_image_file("photo", encoded(Image.fromarray(values), "TIFF")))
    assert abs(int(pixels[9, 9, 0]) - 255 * 0.9 * most / white) <= 1


def test_error_names_the_invalid_file(tmp_path):
    cases = {"empty.jpg": (b"", "is empty"), "text.jpg": (b"hello there", "not an image that Pillow can read")}
    whole = tmp_path / "whole.jpg"
    random_image(size=(300, 300)).save(whole, quality=95)
    cases["cut.jpg"] = (whole.read_bytes()[:2000], "is damaged")
    cases["cut.png"] = (png_header(50, 50), "is damaged")
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            open_image_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_oversized_file_is_not_read(tmp_path):
    path = tmp_path / "endless.webp"
    with path.open("wb") as file:
        file.write(encoded(random_image(), "WEBP"))
        file.truncate(20 * 2**30)
    with pytest.raises(InputError, match="more than 1 GiB"):
        open_image_file(path)


@pytest.mark.parametrize("format", ["WEBP", "AVIF"])
def test_a_large_file_that_is_read_completely_is_refused(tmp_path, format):
    path = tmp_path / "padded"
    with path.open("wb") as file:
        file.write(encoded(random_image(), format))
        file.truncate(64 * 2**20 + 1)
    with pytest.raises(InputError, match="read completely, and it has more than 64 MiB: save it again"):
        open_image_file(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_image_file(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="this is a folder"):
        open_image_file(tmp_path)


def test_irregular_files_are_rejected_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
        start = time.monotonic()
        for name, problem in {
            "fifo.jpg": "not a regular file",
            "socket.jpg": "not a regular file",
            "device.jpg": "not a regular file",
            "folder.jpg": "this is a folder",
            "loop.jpg": "cannot be opened",
            "broken.jpg": "no such file",
            "n" * 300: "cannot be opened",
            "null\0.jpg": "cannot be opened",
        }.items():
            with pytest.raises(InputError, match=problem):
                open_image_file(tmp_path / name)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", INVALID_EXIF)
def test_invalid_exif_does_not_change_the_image(format, kind):
    without = open_image_file("photo", encoded(scene(60, 40), format))
    invalid = open_image_file("photo", encoded(scene(60, 40), format, exif=INVALID_EXIF[kind]))
    assert without.size == invalid.size == (60, 40)
    assert without.tobytes() == invalid.tobytes()


def tiff(width: int, height: int, **changed: int) -> bytes:
    """Return a greyscale TIFF with few tags; keyword arguments set tags by number (`t274=6`)."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: width * height}
    tags |= {int(name[1:]): value for name, value in changed.items()}
    pixels = bytes(range(width)) * height
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_tiff_with_invalid_metadata_is_read():
    whole = open_image_file("photo", tiff(60, 40))
    assert whole.getpixel((7, 9)) == (7, 7, 7)
    for exif in (2**32 - 1, 100, 2500):
        assert open_image_file("photo", tiff(60, 40, t34665=exif)).tobytes() == whole.tobytes()
        assert open_image_file("photo", tiff(60, 40, t34665=exif, t274=6)).size in ((60, 40), (40, 60))
    assert open_image_file("photo", tiff(60, 40, t274=6)).getpixel((9, 7)) == (7, 7, 7)


def whole_to_rgb(image: Image.Image) -> Image.Image:
    """Reference conversion of a full image in memory."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float32)
        deep = image.mode.startswith("I;16") or values.max() > 255
        return Image.fromarray((values * (255 / 65535 if deep else 1.0)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data and image.mode != "RGB":
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(224, 224), (300, 1300)], ids=str)
def test_small_image_is_opened_bit_for_bit(kind, size):
    convert, format, settings = KINDS[kind]
    content = encoded(convert(scene(*size)), format, **settings)
    whole = whole_to_rgb(Image.open(io.BytesIO(content)))
    opened = open_image_file("photo", content)
    assert opened.size == whole.size
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(whole))
    np.testing.assert_array_equal(model_sees(opened), model_sees(whole))


LARGE = [((2017, 1511), kind) for kind in KINDS] + [((2900, 4001), kind) for kind in ("RGB", "JPEG", "JPEG 2000")]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kind"), LARGE, ids=str)
def test_large_image_is_reduced_without_changing_the_model_input(size, kind):
    convert, format, settings = KINDS[kind]
    settings = settings | ({"compress_level": 1} if format == "PNG" else {})
    content = encoded(convert(scene(*size)), format, **settings)
    whole = whole_to_rgb(Image.open(io.BytesIO(content)))
    opened = open_image_file("photo", content)
    assert 672 <= min(opened.size) <= 1344
    assert opened.width / opened.height == pytest.approx(whole.width / whole.height, rel=0.005)
    difference = np.abs(model_sees(opened) - model_sees(whole))
    assert difference.mean() < 0.6
    assert difference.max() <= 12 if "palette" in kind else 6


@pytest.mark.slow
def test_long_and_narrow_image_keeps_its_shape():
    for size in ((20_000, 300), (300, 20_000)):
        image = scene(*size)
        opened = open_image_file("photo", encoded(image, "PNG", compress_level=1))
        assert opened.size == size
        np.testing.assert_array_equal(model_sees(opened), model_sees(image))


def test_larger_input_size_keeps_a_larger_image():
    content = encoded(scene(3000, 2500), "JPEG")
    assert min(open_image_file("photo", content, size=(384, 384)).size) >= 3 * 384
    assert min(open_image_file("photo", content, size=(32, 32)).size) < 200


def test_rotated_image_is_turned_upright_once(tmp_path):
    image = Image.new("RGB", (40, 80), "red")
    image.paste("blue", (0, 40, 40, 80))
    for format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        opened = open_image_file("photo", encoded(image, format, exif=turned(6)))
        assert opened.size == (80, 40)
        assert model_sees(opened)[100, 20, 2] > 200  # the blue half is on the left
        assert model_sees(opened)[100, 200, 0] > 200


def test_concurrent_decoding_respects_the_memory_budget(monkeypatch):
    content, at_once, most = encoded(scene(500, 400), "PNG"), [], []
    reduced = images._reduced

    def watch(*arguments):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.02)
        result = reduced(*arguments)
        at_once.pop()
        return result

    monkeypatch.setattr(images, "_reduced", watch)
    for peak, limit in ((MAX_MEMORY // 2 + 1, 1), (MAX_MEMORY // 3, 3), (10, 8)):
        monkeypatch.setattr(images, "peak_bytes", lambda *_, peak=peak: peak)
        most.clear()
        threads = [threading.Thread(target=open_image_file, args=("photo", content)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(most) == 8
        assert max(most) <= limit
        assert images._memory.taken == 0


def test_forked_process_resets_the_memory_budget():
    content = encoded(scene(50, 40), "PNG")
    with images._memory.take(MAX_MEMORY), images._opening:
        child = os.fork()
        if child == 0:
            os._exit(0 if open_image_file("photo", content).size == (50, 40) else 1)
        for _ in range(500):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.02)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
    assert done == child
    assert status == 0


def test_heic_error_names_the_remedy(tmp_path):
    head = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(200)
    for brand in (b"heic", b"heix", b"mif1", b"msf1"):
        path = tmp_path / "IMG_1.jpg"
        path.write_bytes(head.replace(b"ftypheic", b"ftyp" + brand))
        with pytest.raises(InputError, match="is a HEIC image: pip install pillow-heif"):
            open_image_file(path)


PILLOW_HEIF = """
from PIL import Image, ImageFile


class HeifImageFile(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
        self._size, self._mode = (30, 20), "RGB"
        self.tile = [ImageFile._Tile("raw", (0, 0, 30, 20), 24, ("RGB", 0, 1))]


def register_heif_opener():
    Image.register_open("HEIF", HeifImageFile, lambda head: head[4:12] == b"ftypheic")
    Image.register_extensions("HEIF", [".heic", ".heif"])
"""


@pytest.mark.slow
def test_heic_is_read_with_pillow_heif(tmp_path):
    """A stand-in with the interface of the package, in a subprocess."""
    (tmp_path / "pillow_heif.py").write_text(PILLOW_HEIF)
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "a.HEIC").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(12) + b"\xc8" * 1800)
    script = (
        "import sys; from pathlib import Path; from nanovlm_hf.images import *\n"
        "(found,), others = scan_folder(Path(sys.argv[1]))\n"
        "print(open_image_file(found).getpixel((5, 5)), others)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "album"], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "(200, 200, 200) \n", done.stderr


def test_other_files_in_a_folder_are_counted(tmp_path):
    names = (
        "b.JFIF",
        "a.jpg",
        "c.avif",
        "d.mpo",
        "notes.txt",
        "film.mp4",
        "photo.eps",
        "IMG_1.HEIC",
        ".DS_Store",
        "._a.jpg",
    )
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "more").mkdir()
    found, others = scan_folder(tmp_path)
    assert [path.name for path in found] == ["a.jpg", "b.JFIF", "c.avif", "d.mpo"]
    assert others == ("3 files skipped: not images; 1 HEIC file skipped: pip install pillow-heif; 1 subfolder skipped")
    assert scan_folder(tmp_path / "more") == ([], "")

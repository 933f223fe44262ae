"""Fuzzing of damaged images: each is opened or rejected in one line, in bounded time and memory.

`NANOVLM_FUZZ_SEED` sets the random seed, `NANOVLM_FUZZ_CASES` the number of cases.
"""

import os
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

SEED = int(os.environ.get("NANOVLM_FUZZ_SEED", "0"))
CASES = int(os.environ.get("NANOVLM_FUZZ_CASES", "400"))
MOST_SECONDS = 10  # of CPU time; a decoder waits for nothing
MOST_MIB = 1536
DIMENSIONS = (0, 1, 2, 255, 256, 4_000, 10_000, 16_383, 30_000, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def valid_images() -> dict[str, bytes]:
    """Return valid images of many formats, modes and kinds of metadata."""
    from helpers.image_files import KINDS, WRITABLE, encoded, scene

    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "A camera"
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    rich = {"exif": exif.tobytes(), "icc_profile": profile, "xmp": xmp}
    image = scene(60, 44)
    frames = {"save_all": True, "append_images": [scene(60, 44).rotate(90), scene(60, 44).rotate(180)]}
    made = {}
    for format, mode in WRITABLE.items():
        made[format] = encoded(image.convert("L").convert(mode) if mode == "F" else image.convert(mode), format)
    for format in ("JPEG", "PNG", "WEBP", "AVIF", "MPO"):
        made[f"{format} with metadata"] = encoded(image, format, **rich)
    for format in ("GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"):
        made[f"moving {format}"] = encoded(image, format, **frames)
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"):
        mode = "1" if compression == "group4" else "RGB"
        made[f"TIFF {compression}"] = encoded(image.convert(mode), "TIFF", compression=compression, exif=exif)
    made["progressive JPEG"] = encoded(image, "JPEG", progressive=True, exif=exif)
    made["interlaced PNG"] = encoded(image, "PNG", interlace=1)
    made["ASCII PPM"] = b"P3\n8 6\n255\n" + b" 200 30 40" * 48
    made["TGA with runs"] = encoded(image.quantize(8), "TGA", compression="tga_rle")
    made["BMP with runs"] = encoded(image.quantize(8), "BMP")
    made["FITS"] = b"".join(line.ljust(80) for line in FITS).ljust(2880) + bytes(range(200)) * 13
    for kind, (convert, format, settings) in KINDS.items():
        made[kind] = encoded(convert(image), format, **settings)
    made["large JPEG"] = encoded(scene(1500, 1400), "JPEG", quality=30)
    made["large JPEG 2000"] = encoded(scene(2800, 2700).resize((2800, 2700)), "JPEG2000", quality_layers=[200])
    return made


FITS = (b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 2", b"NAXIS1  = 50", b"NAXIS2  = 50", b"END")


def flip(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 3, 20))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def flip_head(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 5))):
        content[chance.randrange(min(len(content), 200))] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))


def cut(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(1, len(content)) :]


def take_out(content: bytearray, chance: random.Random) -> None:
    first = chance.randrange(len(content))
    del content[first : first + chance.choice((1, 2, 4, 100))]


def put_in(content: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(content))
    content[place:place] = chance.randbytes(chance.choice((1, 4, 300)))


def repeat(content: bytearray, chance: random.Random) -> None:
    first, length = chance.randrange(len(content)), chance.choice((8, 60, 500))
    content[first:first] = content[first : first + length] * chance.choice((1, 3))


def change_size(content: bytearray, chance: random.Random) -> None:
    """Replace the width or height in the header, in any integer size and byte order."""
    sizes = (60, 44, 48, 8, 6, 59, 43, 47, 1500, 1400, 2800, 2700)
    places = [
        (place, form)
        for form in (">I", "<I", ">H", "<H")
        for size in sizes
        for place in range(min(len(content), 2_000) - 4)
        if content[place : place + struct.calcsize(form)] == struct.pack(form, size)
    ]
    for place, form in chance.sample(places, min(len(places), chance.choice((1, 2, 3)))):
        most = 2 ** (8 * struct.calcsize(form))
        struct.pack_into(form, content, place, chance.choice(DIMENSIONS) % most)


def change_tags(content: bytearray, chance: random.Random) -> None:
    """Replace types, counts and values in anything that resembles a TIFF or EXIF directory entry."""
    order = chance.choice("<>")
    tags = (*range(254, 345), 34665, 34853, 0x9003, 34675, 33723, 34377)
    places = [
        place for place in range(len(content) - 12) if struct.unpack_from(order + "HH", content, place)[0] in tags
        and 0 < struct.unpack_from(order + "HH", content, place)[1] < 14
    ]  # fmt: skip
    for place in chance.sample(places, min(len(places), chance.choice((1, 2, 5)))):
        part = chance.randrange(4)
        if part == 0:
            struct.pack_into(order + "H", content, place, chance.choice(tags))
        elif part == 1:
            struct.pack_into(order + "H", content, place + 2, chance.choice((0, 1, 2, 3, 5, 7, 10, 12, 13, 16, 99)))
        else:
            struct.pack_into(order + "I", content, place + 4 * (part - 1), chance.choice(DIMENSIONS))


def change_metadata(content: bytearray, chance: random.Random) -> None:
    """Overwrite EXIF, ICC and XMP data with noise."""
    names = (
        b"Exif\0\0",
        b"ICC_PROFILE\0",
        b"eXIf",
        b"iCCP",
        b"EXIF",
        b"ICCP",
        b"XMP ",
        b"http://ns",
        b"acsp",
        b"MPF\0",
    )
    places = [place for name in names if (place := content.find(name)) >= 0]
    if places:
        place = chance.choice(places) + chance.randrange(4, 60)
        content[place : place + 8] = chance.randbytes(8)


DAMAGES = (flip, flip_head, cut, take_out, put_in, repeat, *2 * (change_size, change_tags), change_metadata)


def fix_checksums(content: bytearray) -> bytearray:
    """Correct the checksums of a PNG's chunks, so that a decoder reads beyond the first one."""
    place = 8
    while place + 12 <= len(content):
        length = struct.unpack_from(">I", content, place)[0]
        end = place + 8 + length
        if end + 4 > len(content):
            break
        struct.pack_into(">I", content, end, zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return content


def damaged(content: bytes, chance: random.Random) -> bytes:
    result = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        if len(result) > 1:
            chance.choice(DAMAGES)(result, chance)
    if result[:4] == b"\x89PNG" and chance.random() < 0.8:
        fix_checksums(result)
    return bytes(result)


def main(seed: int, cases: int, keep: str) -> None:
    """Open damaged images and print every violation."""
    from nanovlm_hf import InputError
    from nanovlm_hf.data.encoding import jpeg_bytes
    from nanovlm_hf.images import image_suffix, open_image_file

    from helpers.image_files import model_sees
    from helpers.memory import peak_mib

    warnings.simplefilter("ignore")
    chance = random.Random(seed)
    whole = list(valid_images().items())
    path = Path(keep) / "photo.jpg"
    opened = peak = 0
    for number in range(cases):
        name, content = chance.choice(whole)
        content = damaged(content, chance)
        start = time.process_time()
        try:
            if number % 5:
                image = open_image_file("photo", content)
                assert image.mode == "RGB"
                model_sees(image)
                image_suffix(content)
            else:
                path.write_bytes(content)
                jpeg_bytes(path)
            opened += 1
        except InputError as error:
            if len(str(error).splitlines()) != 1:
                print(f"case {number} ({name}): {str(error)!r}", flush=True)
        except Exception as error:
            print(f"case {number} ({name}): {type(error).__name__}: {error}", flush=True)
            (Path(keep) / f"{seed}-{number}").write_bytes(content)
        seconds = time.process_time() - start
        if seconds > MOST_SECONDS:
            print(f"case {number} ({name}): {seconds:.0f} s", flush=True)
            (Path(keep) / f"{seed}-{number}").write_bytes(content)
        now = peak_mib()
        if now > max(MOST_MIB, peak):
            print(f"case {number} ({name}): {now} MiB", flush=True)
            (Path(keep) / f"{seed}-{number}").write_bytes(content)
        peak = max(peak, now)
    print(f"{cases} cases, {opened} opened, {peak} MiB", file=sys.stderr)
    assert 0.05 * cases < opened < 0.95 * cases


@pytest.mark.slow
def test_damaged_images_are_opened_or_rejected_in_one_line(tmp_path):
    """In a subprocess, to measure its memory and because a decoder may crash it."""
    command = [sys.executable, __file__, str(SEED), str(CASES), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.stdout == ""
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    np.seterr(all="raise")
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

"""Peak memory of opening images, measured in subprocesses: `complete` and `build`; test_demo.py has the demo's."""

import io
import json
import os

import pytest
from PIL import Image

from helpers.image_files import huge_png
from helpers.memory import measured

MOST = 1536  # MiB
SIDE = 10_900
IMAGES = 2  # of a dataset


def saved_huge(mode: str, colour, format: str, **settings) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (SIDE, SIDE), colour).save(buffer, format, **settings)
    return buffer.getvalue()


KINDS = {
    "RGB": lambda: huge_png(2, b"\xc8\x1e\x28"),
    "RGBA": lambda: huge_png(6, b"\xc8\x1e\x28\x80"),
    "16-bit": lambda: huge_png(0, b"\x80\x80", depth=16),
    "palette": lambda: huge_png(3, b"\1"),
    "grey with alpha": lambda: huge_png(4, b"\x64\x80"),
    "CMYK": lambda: saved_huge("CMYK", (10, 200, 30, 40), "TIFF", compression="tiff_deflate"),
    "LAB": lambda: saved_huge("LAB", (100, 120, 130), "TIFF", compression="tiff_deflate"),
    "TIFF of one strip": lambda: saved_huge("RGB", "red", "TIFF", compression="tiff_deflate", tiffinfo={278: SIDE}),
    "turned TIFF": lambda: saved_huge("RGB", "red", "TIFF", compression="tiff_deflate", tiffinfo={274: 6}),
    "floats": lambda: saved_huge("F", 100.0, "TIFF", compression="tiff_deflate"),
    "progressive JPEG": lambda: saved_huge("RGB", "red", "JPEG", progressive=True, subsampling=0),
    "progressive CMYK JPEG": lambda: saved_huge("CMYK", (10, 200, 30, 40), "JPEG", progressive=True),
}


COMMAND = """
import sys
from nanovlm_hf import cli
sys.argv[0] = "nanovlm"
cli.main()
"""


THREADS = """
import threading
from nanovlm_hf.images import open_image_file
megabytes = lambda: int(open("/proc/self/statm").read().split()[1]) >> 8
before = megabytes()
threads = [threading.Thread(target=open_image_file, args=(sys.argv[1],)) for _ in range(4)]
for one in threads: one.start()
for one in threads: one.join()
print(before, megabytes() - before)
"""


@pytest.mark.slow
def test_threads_decode_huge_images_in_turn_and_release_memory(tmp_path):
    path = tmp_path / "huge.png"
    path.write_bytes(KINDS["palette"]())
    code, output, errors, peak = measured(THREADS, path)
    assert code == 0, errors
    before, kept = map(int, output.split())
    assert peak - before < 200  # one image takes 113
    assert kept < 80


@pytest.mark.slow
def test_complete_a_folder_of_huge_images(tmp_path, saved):
    album = tmp_path / "album"
    album.mkdir()
    for number, make in enumerate(KINDS.values()):
        (album / f"{number:02}.png").write_bytes(make())
    code, output, errors, peak = measured(COMMAND, "complete", album, "--model", saved, "--max-new-tokens", 3)
    assert (code, errors) == (0, "")
    assert len(output.splitlines()) == len(KINDS)
    assert peak < MOST


@pytest.mark.slow
@pytest.mark.parametrize("original", [False, True])
def test_build_from_huge_images(tmp_path, original):
    images = tmp_path / "images"
    images.mkdir()
    (images / "1.png").write_bytes(KINDS["RGBA"]())
    for number in range(2, IMAGES + 1):
        os.link(images / "1.png", images / f"{number}.png")
    rows = [{"id": number, "file_name": f"{number}.png"} for number in range(1, IMAGES + 1)]
    captions = [{"id": row["id"], "image_id": row["id"], "caption": "a red square"} for row in rows]
    (tmp_path / "captions.json").write_text(json.dumps({"images": rows, "annotations": captions}))
    texts = "".join(json.dumps({"image_id": row["id"], "short": "There is a big red square."}) + "\n" for row in rows)
    (tmp_path / "descriptions.jsonl").write_text(texts)
    sources = ("--captions", tmp_path / "captions.json", "--descriptions", tmp_path / "descriptions.jsonl")
    options = ("--original",) if original else ()
    arguments = ("data", "build", *sources, "--images", images, "--out", tmp_path / "out", *options)
    code, output, errors, peak = measured(COMMAND, *arguments)
    assert code == 0, errors
    assert str(IMAGES) in output
    assert peak < MOST

"""`complete` on folders as users have them: unusual file names, files and terminals."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from nanovlm_hf import completion

from helpers.image_files import INVALID_EXIF, encoded, scene
from helpers.models import random_image, tiny_model, tiny_processor
from helpers.output import only_line

NANOVLM = Path(sys.executable).with_name("nanovlm")
QUICK = ("--max-new-tokens", 2)


def command(*arguments, **environment) -> subprocess.CompletedProcess:
    """Run the installed command in a subprocess; its output is bytes."""
    arguments = [one if isinstance(one, Path) else str(one) for one in arguments]
    return subprocess.run([NANOVLM, *arguments], env=os.environ | environment, capture_output=True)


@pytest.fixture
def album(tmp_path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    return folder


def test_files_that_are_not_images_are_counted_in_one_line(run, saved, album):
    for name in ("a.jpg", "b.JPEG", "c.jfif", "d.mpo"):
        (album / name).write_bytes(encoded(random_image(), "JPEG"))
    for name, format in (("e.avif", "AVIF"), ("f.jp2", "JPEG2000"), ("g.apng", "PNG"), ("h.qoi", "QOI")):
        (album / name).write_bytes(encoded(random_image(), format))
    (album / "._a.jpg").write_bytes(b"\0\5\x16\7")  # of macOS
    for name in ("notes.txt", "film.mp4", "page.eps"):
        (album / name).write_bytes(b"%!PS")
    code, lines, errors = run("complete", album, "--model", saved, *QUICK)
    assert code == 0
    assert len(lines) == 8
    assert only_line(errors) == f"nanovlm: {album}: 3 files skipped: not images"
    code, lines, errors = run("complete", album, "--model", saved, "--json", *QUICK)
    assert [Path(json.loads(line)["photo"]).name[0] for line in lines] == list("abcdefgh")
    assert len(errors) == 1


def test_folder_of_heic_images_names_the_remedy(run, saved, album):
    for number in range(3):
        (album / f"IMG_{number}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    code, lines, errors = run("complete", album, "--model", saved)
    assert (code, lines) == (1, [])
    assert "there is no image in this folder (3 HEIC files skipped: pip install pillow-heif)" in only_line(errors)


def test_irregular_files_do_not_stop_the_others(run, saved, album):
    random_image().save(album / "a.png")
    os.mkfifo(album / "b.jpg")
    (album / "c.jpg").symlink_to("/dev/zero")
    (album / "d.jpg").mkdir()
    (album / "e.jpg").symlink_to("nowhere.jpg")
    (album / "f.jpg").symlink_to("f.jpg")
    random_image().save(album / "z.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(album / "g.jpg"))
        code, lines, errors = run("complete", album, "--model", saved, *QUICK)
    assert code == 1
    assert [line.split(": ")[0] for line in lines] == [str(album / "a.png"), str(album / "z.png")]
    assert [error.split(": ")[1] for error in errors] == [str(album / f"{name}.jpg") for name in "bcdefg"]


def test_damaged_images_do_not_stop_a_batch(run, saved, album):
    bad = {
        "cut.gif": encoded(scene(60, 40), "GIF")[:300],
        "cut.png": encoded(scene(60, 40), "PNG")[:300],
        "cut.tif": encoded(scene(60, 40), "TIFF", compression="tiff_lzw")[:300],
        "cut.webp": encoded(scene(60, 40), "WEBP")[:100],
        "iso.heic": b"\0\0\0\x18ftypheic",
    }
    good = {
        f"exif {number}.jpg": encoded(scene(60, 40), "JPEG", exif=exif)
        for number, exif in enumerate(INVALID_EXIF.values())
    }
    for name, content in (bad | good).items():
        (album / name).write_bytes(content)
    code, lines, errors = run("complete", *sorted(album.iterdir()), "--model", saved, *QUICK)
    assert code == 1
    assert [Path(line.split(": ")[0]).name for line in lines] == sorted(good)
    assert [Path(error.split(": ")[1]).name for error in errors] == sorted(bad)


def test_names_that_look_like_patterns_or_options(run, saved, album, monkeypatch):
    names = ["[1]*?.png", "--model.png", "[red]bold.png", "$(id).png", "a'b\"c.png", " .png", "%s{}.png"]
    for name in names:
        random_image().save(album / name)
    monkeypatch.chdir(album)
    code, lines, errors = run("complete", "--model", saved, *QUICK, "--", *names, "n" * 300 + ".png", "a\\b.png")
    assert code == 1
    assert [line.split(": ")[0] for line in lines] == names
    assert "File name too long" in errors[0]
    assert "no such file" in errors[1]


TERMINALS = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"},
    "latin-1": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("terminal", TERMINALS)
def test_names_with_invalid_utf_8_or_control_characters(saved, album, terminal):
    names = [b"a\xe9.png", "b\u00e9\U0001f600.png".encode(), b"c\nd.png", b"e\x1b]0;f\x07.png", "g\u202eh.png".encode()]
    for name in names:
        Path(os.fsdecode(os.fsencode(album) + b"/" + name)).write_bytes(encoded(random_image(), "PNG"))
    (album / "broken\x1b[2J\n.png").write_bytes(b"nothing")
    done = command("complete", album, "--model", saved, *QUICK, **TERMINALS[terminal])
    assert done.returncode == 1
    lines, errors = done.stdout.splitlines(), done.stderr.splitlines()
    assert len(lines) == len(names)
    assert len(errors) == 1
    for text in (done.stdout, done.stderr):
        assert not set(text.replace(b"\n", b"")) & {*range(32), 127}
        text.decode("latin-1" if terminal == "latin-1" else "utf-8")
    override = rb"g\udce2\udc80\udcaeh.png" if terminal == "C" else rb"g\u202eh.png"  # C names are ASCII and bytes
    for shown in (rb"a\udce9.png", rb"c\nd.png", rb"e\x1b]0;f\x07.png", override):
        assert sum(shown in line for line in lines) == 1
    assert rb"broken\x1b[2J\n.png: not an image" in errors[0]

    done = command("complete", album, "--model", saved, "--json", *QUICK, **TERMINALS[terminal])
    rows = [json.loads(line) for line in done.stdout.decode("utf-8").splitlines()]
    answered = [os.fsencode(row["photo"]) for row in rows if "completions" in row]
    assert sorted(answered) == sorted(os.fsencode(album) + b"/" + name for name in names)
    assert len(rows) == len(names) + 1


@pytest.mark.slow
def test_broken_pipe_is_not_a_failure(saved, album):
    for number in range(40):
        random_image(number).save(album / f"{number:02}.png")
    line = f"set -o pipefail; '{NANOVLM}' complete '{album}' --model '{saved}' --max-new-tokens 2 | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(str(album / "00.png"))


def test_generated_control_characters_are_not_printed(run, saved, album, monkeypatch):
    decode = completion.NanoVLMProcessor.batch_decode
    monkeypatch.setattr(
        completion.NanoVLMProcessor, "batch_decode", lambda *a, **k: [f"\x1b[2J{t}\x07" for t in decode(*a, **k)]
    )
    random_image().save(album / "a.png")
    _, lines, _ = run("complete", album, "--model", saved, *QUICK)
    assert "\ufffd[2J" in lines[0]
    assert "\x1b" not in lines[0]


def test_reduced_image_gives_the_same_text_as_the_full_one(saved, tokenizer, tmp_path):
    path = tmp_path / "large.jpg"
    scene(2017, 1511).save(path, quality=92)
    model, processor = tiny_model(), tiny_processor(tokenizer)
    (answer,) = completion.complete(model, processor, [path], "There is a", max_new_tokens=8)
    inputs = processor(images=Image.open(path), text="There is a", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8)
    assert answer.texts == [" ".join(processor.batch_decode(tokens, skip_special_tokens=True)[0].split())]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
NAMES = [f"photo.{suffix}" for suffix in ("jpg", "png", "webp", "gif", "tif", "bmp", "eps", "ps", "pdf", "iim", "avif")]


def test_ghostscript_is_never_started(run, saved, toy, tmp_path, monkeypatch):
    """A stand-in for Ghostscript records whether it was called."""
    called = tmp_path / "called"
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("gs", "gswin64c", "gswin32c", "djpeg"):
        (programs / name).write_text(f'#!/bin/sh\necho "$0 $@" >> "{called}"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert called.exists()  # Pillow alone does start it
    called.unlink()

    album = tmp_path / "album"
    album.mkdir()
    for name in NAMES:
        (album / name).write_bytes(POSTSCRIPT)
    fields = ((3, 60), b"\1\0"), ((3, 20), b"\0\x14"), ((3, 30), b"\0\x14"), ((3, 120), b"\5"), ((8, 10), POSTSCRIPT)
    in_iptc = b"".join(b"\x1c" + bytes(tag) + len(value).to_bytes(2, "big") + value for tag, value in fields)
    (album / "iptc.jpg").write_bytes(in_iptc)
    rows = [{"id": number, "file_name": name} for number, name in enumerate([*NAMES, "iptc.jpg"])]
    captions = [{"id": row["id"], "image_id": row["id"], "caption": "a red square"} for row in rows]
    (tmp_path / "captions.json").write_text(json.dumps({"images": rows, "annotations": captions}))
    with (tmp_path / "descriptions.jsonl").open("w") as file:
        file.writelines(json.dumps({"image_id": row["id"], "short": "There is a square."}) + "\n" for row in rows)
    from_folder = ("--captions", tmp_path / "captions.json", "--images", album)
    described = ("--descriptions", tmp_path / "descriptions.jsonl")
    evaluated = ("--model", saved, "--dataset", toy / "data", "--split", "validation", "--grounding-images", 0)
    for arguments in (
        ("complete", album, *(album / name for name in NAMES), "--model", saved),
        ("data", "build", *from_folder, *described, "--out", tmp_path / "built"),
        ("data", "build", *from_folder, *described, "--original", "--out", tmp_path / "originals"),
        ("data", "ingest", *from_folder, "--out", tmp_path / "taken"),
        ("data", "ingest", *from_folder, "--original", "--out", tmp_path / "kept"),
        ("evaluate", *evaluated, "--images", album, "--out", tmp_path / "report"),
    ):
        _, lines, errors = run(*arguments)
        assert not any("Traceback" in line for line in errors)
        assert "page.eps" not in "".join(lines)
    assert not called.exists()

"""The store of decoded images: shared by processes, verified, and with errors for full and read-only disks."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value, config
from datasets import Image as HubImage

from nanovlm_hf import InputError, NanoVLMImageProcessor
from nanovlm_hf.data import image_store

from helpers.runs import ROOT
from helpers.toy_data import jpeg_of, square

FEATURES = Features({"image": HubImage(decode=False), "image_id": Value("int64")})


def rows(count: int, bad: tuple[int, ...] = (), first: int = 0) -> Dataset:
    contents = [b"nothing" if number in bad else jpeg_of(first + number) for number in range(count)]
    images = [{"bytes": content, "path": None} for content in contents]
    return Dataset.from_dict({"image": images, "image_id": list(range(count))}, features=FEATURES)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Use an empty cache of `datasets`, and return the directory in it where images are stored."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "nanovlm_hf"


@pytest.fixture
def decoded(monkeypatch) -> list:
    """The rows that are decoded during a test."""
    calls = []
    decode = image_store.decode_image
    monkeypatch.setattr(image_store, "decode_image", lambda image, **k: calls.append(image) or decode(image, **k))
    return calls


def test_images_are_decoded_once(cache, decoded):
    split, image_processor = rows(120, bad=(7,)), NanoVLMImageProcessor()
    for _ in range(2):
        images, kept = image_store.decode_once(split, image_processor)
        assert len(images) == len(kept) == 119
        assert np.abs(images[7].astype(int) - np.asarray(square(8)[0])).mean() < 3
    assert len(decoded) == 120
    assert {path.suffix for path in cache.iterdir()} == {".npy", ".json", ".lock"}


@pytest.mark.parametrize(
    "settings",
    [
        {"do_center_crop": True},
        {"resample": 0},
        {"size": {"height": 112, "width": 224}},
        {"size": {"height": 224, "width": 112}},
        {"do_convert_rgb": False},
    ],
)
def test_image_processors_of_other_settings_do_not_share_images(cache, decoded, settings):
    split = rows(3)
    image_store.decode_once(split, NanoVLMImageProcessor())
    images, _ = image_store.decode_once(split, NanoVLMImageProcessor(**settings))
    assert len(decoded) == 6
    size = settings.get("size", {"height": 224, "width": 224})
    assert images.shape == (3, size["height"], size["width"], 3)
    image_store.decode_once(split, NanoVLMImageProcessor(**settings, image_mean=[0.5] * 3, do_normalize=False))
    assert len(decoded) == 6, "stored pixels do not depend on the mean"


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


DAMAGE = {
    "empty": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "the last byte missing": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "no header": lambda content: bytes(128) + content[128:],
    "a byte flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "text": lambda content: b"nothing",
    "another archive": lambda content: b"PK\x03\x04" + content,
    "an impossible shape": lambda content: header((10**12, 224, 224, 3)) + content[128:],
    "a negative shape": lambda content: header((-3, 224, 224, 3)) + content[128:],
    "another shape": lambda content: header((3, 224, 3, 224)) + content[128:],
    "another type": lambda content: header((3, 224, 224, 3), "|i1") + content[128:],
    "objects": lambda content: header((3, 224, 224, 3), "|O") + content[128:],
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("suffix", [".npy", ".damaged.json"])
def test_damaged_files_are_recreated(cache, decoded, suffix, how):
    split, image_processor = rows(3), NanoVLMImageProcessor()
    before = np.array(image_store.decode_once(split, image_processor)[0])
    (path,) = cache.glob(f"*{suffix}")
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    images, kept = image_store.decode_once(split, image_processor)
    assert np.array_equal(images, before)
    assert len(kept) == 3
    assert len(decoded) == 6
    image_store.decode_once(split, image_processor)
    assert len(decoded) == 6


@pytest.mark.parametrize(
    "note",
    ["[]", "7", "{}", '{"damaged": [9], "crc32": 0}', '{"damaged": [-1], "crc32": 0}', '{"damaged": 3, "crc32": "x"}'],
)
def test_notes_that_do_not_belong_to_the_images_are_recreated(cache, decoded, note):
    split, image_processor = rows(3), NanoVLMImageProcessor()
    image_store.decode_once(split, image_processor)
    (path,) = cache.glob("*.json")
    if "crc32" in note:
        note = json.dumps(json.loads(path.read_text()) | {"damaged": json.loads(note)["damaged"]})
    path.write_text(note)
    assert len(image_store.decode_once(split, image_processor)[0]) == 3
    assert len(decoded) == 6


def test_a_missing_file_is_recreated_and_leftovers_of_kills_are_removed(cache, decoded):
    split, image_processor = rows(3), NanoVLMImageProcessor()
    image_store.decode_once(split, image_processor)
    (path,) = cache.glob("*.npy")
    for missing in (path, path.with_suffix(".damaged.json")):
        missing.unlink()
        path.with_name(f"{path.stem}.01234567.partial").write_text("half")
        image_store.decode_once(split, image_processor)
        assert not list(cache.glob("*.partial"))
    assert len(decoded) == 9


STARTED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_image_store import rows
from nanovlm_hf import NanoVLMImageProcessor
from nanovlm_hf.data import image_store
images, kept = image_store.decode_once(rows(60), NanoVLMImageProcessor())
print(images.sum(), len(kept))
"""


def start(cache: Path, script: str = STARTED, **popen) -> subprocess.Popen:
    command = [sys.executable, "-c", script, ROOT / "tests"]
    environment = {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **popen)


@pytest.mark.slow
def test_processes_that_start_together_share_one_array(tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, outputs
    assert len({out for out, _ in outputs}) == 1
    assert sum("decoding images" in errors for _, errors in outputs) == 1
    assert {path.suffix for path in (tmp_path / "nanovlm_hf").iterdir()} == {".npy", ".json", ".lock"}


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path):
    slow = STARTED.replace(
        "images, kept", "import time; image_store._reserve = lambda *_: time.sleep(600)\nimages, kept"
    )
    first = start(tmp_path, slow)
    deadline = time.monotonic() + 300
    while not list(tmp_path.rglob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = start(tmp_path)
    waiting = second.stderr.readline()
    assert "waiting: another process is decoding the images of this dataset" in waiting
    first.kill()
    out, errors = second.communicate(timeout=600)
    assert second.returncode == 0, errors
    assert out.split()[1] == "60"


def test_a_full_disk_is_one_line_that_names_the_cache(small_disk, monkeypatch, decoded):
    disk = small_disk("3m")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", disk)
    split = rows(30)  # 4.3 MiB
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"No space left on device\); they need 4 MiB: set HF_HOME to a folder"
        ) as e:
            image_store.decode_once(split, NanoVLMImageProcessor())
        assert str(disk / "nanovlm_hf") in str(e.value)
        assert not decoded, "the error comes before the first image is decoded"
        assert not list(disk.rglob("*.partial"))
    assert len(image_store.decode_once(rows(3), NanoVLMImageProcessor())[0]) == 3


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(InputError, match=r"file/nanovlm_hf: decoded images cannot be stored here \(Not a directory\)"):
        image_store.decode_once(rows(3), NanoVLMImageProcessor())


def test_a_read_only_cache_is_used(cache, small_disk, monkeypatch, decoded):
    disk = small_disk("3m")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", disk)
    split = rows(3)
    image_store.decode_once(split, NanoVLMImageProcessor())
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert len(image_store.decode_once(split, NanoVLMImageProcessor())[0]) == 3
    assert len(decoded) == 3
    with pytest.raises(InputError, match=r"Read-only file system.*set HF_HOME"):
        image_store.decode_once(rows(3, first=5), NanoVLMImageProcessor())


def test_an_image_processor_that_does_not_resize_is_rejected(cache):
    with pytest.raises(InputError, match="set do_resize to true"):
        image_store.decode_once(rows(3), NanoVLMImageProcessor(do_resize=False, size={"height": 112, "width": 112}))
    assert not list(cache.glob("*.npy"))


def test_a_row_that_names_a_local_file_is_rejected(cache, tmp_path):
    (tmp_path / "passport.jpg").write_bytes(jpeg_of(1))
    images = [{"bytes": jpeg_of(0), "path": None}, {"bytes": None, "path": str(tmp_path / "passport.jpg")}]
    split = Dataset.from_dict({"image": images, "image_id": [0, 1]}, features=FEATURES)
    with pytest.raises(InputError, match=r"image_id 1 has only a path where its file should be"):
        image_store.decode_once(split, NanoVLMImageProcessor())

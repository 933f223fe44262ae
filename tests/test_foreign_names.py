"""Files outside the folders that were given to a command are never opened, whatever name leads to them."""

import hashlib
import io
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from nanovlm_hf import InputError, NanoVLMImageProcessor
from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.data.join import join_images
from nanovlm_hf.data.rows import _is_own_file, configs_of, files_of, load
from nanovlm_hf.data.schema import IMAGE_SCHEMA, TEXT_SCHEMA
from nanovlm_hf.evaluation.items import items_of_dataset, load_rows, open_image
from nanovlm_hf.hub import dataset_card
from nanovlm_hf.hub.dataset_card import write_card

from helpers.output import only_line
from helpers.toy_data import jpeg_of, write_sources

OPENED: list[str] = []
_RECORDED: list[str] = []  # the part of a path that is looked for


def _record(event, arguments):
    if event == "open" and _RECORDED and _RECORDED[0] in str(arguments[0]):
        OPENED.append(str(arguments[0]))


sys.addaudithook(_record)


@pytest.fixture
def secret(tmp_path):
    """Return a folder next to the data with an image and a FIFO, on which a command that opens it would hang."""
    folder = tmp_path / "private"
    folder.mkdir()
    buffer = io.BytesIO()
    PILImage.new("RGB", (224, 224), (1, 2, 3)).save(buffer, "JPEG")
    (folder / "passport.jpg").write_bytes(buffer.getvalue())
    os.mkfifo(folder / "fifo.jpg")
    OPENED.clear()
    _RECORDED[:] = [str(folder)]
    yield folder
    _RECORDED.clear()
    assert OPENED == [], "the secret was opened"


def names(secret: Path, images: Path) -> list[str]:
    """Return names of the secret files: absolute, relative, through a link and through a linked folder."""
    (images / "link.jpg").symlink_to(secret / "passport.jpg")
    (images / "fifo.jpg").symlink_to(secret / "fifo.jpg")
    (images / "folder").symlink_to(secret)
    return [
        str(secret / "passport.jpg"),
        "../../private/passport.jpg",
        "link.jpg",
        "folder/passport.jpg",
        str(secret / "fifo.jpg"),
        "fifo.jpg",
    ]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Leave the figures out, which take a second for each dataset."""
    monkeypatch.setattr(dataset_card, "plot", lambda _, path: path.write_bytes(b""))


@pytest.fixture
def sources(tmp_path, secret):
    """Sources of 700 images, six of which have such names: few enough to be skipped."""
    folder = write_sources(tmp_path / "sources", photos=8)
    content = json.loads((folder / "captions.json").read_text())
    texts = [json.loads(line) for line in (folder / "descriptions.jsonl").read_text().splitlines()]
    for number in range(692):  # the same eight photos, under more ids
        content["images"].append({"id": 5000 + number, "file_name": f"{1000 + number % 8}.jpg"})
        texts.append({"image_id": 5000 + number, "short": "There is a square."})
    for row, name in zip(content["images"][-6:], names(secret, folder / "images"), strict=True):
        row["file_name"] = name
    (folder / "captions.json").write_text(json.dumps(content))
    (folder / "descriptions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def holds_secret(folder: Path, secret: Path) -> bool:
    content = (secret / "passport.jpg").read_bytes() if not OPENED else b""
    OPENED.clear()  # reading it here is allowed
    return any(content in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("original", [False, True])
def test_ingest_skips_names_that_lead_out(run, sources, secret, tmp_path, original):
    out = tmp_path / "out"
    options = ("--captions", sources / "captions.json", "--images", sources / "images", "--out", out)
    code, lines, _ = run("data", "ingest", *options, *["--original"] * original)
    assert code == 1
    assert lines[0].endswith(": 694 images")
    reasons = [json.loads(line)["reason"] for line in (out / "failed.jsonl").read_text().splitlines()]
    assert len(reasons) == 6
    assert all("leads out of this folder" in reason for reason in reasons)
    assert not holds_secret(out, secret)


@pytest.mark.parametrize("original", [False, True])
def test_build_skips_names_that_lead_out(sources, secret, tmp_path, original):
    given = sources / "captions.json", sources / "descriptions.jsonl", sources / "images"
    summary = build_dataset(*given, tmp_path / "out", original=original)
    assert summary.skipped == 6
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert all("leads out of this folder" in reason for reason in reasons)
    assert not holds_secret(tmp_path / "out", secret)


def test_the_text_only_form_holds_no_such_names(sources, tmp_path):
    summary = build_dataset(sources / "captions.json", sources / "descriptions.jsonl", None, tmp_path / "out")
    assert summary.skipped == 3, "links are not detected without the images"
    found = [
        name
        for path in (tmp_path / "out" / "short").glob("*.parquet")
        for name in pq.read_table(path)["file_name"].to_pylist()
    ]
    assert len(found) == 697
    assert not any(name.startswith(("/", "..")) for name in found)


def test_stored_names_have_no_folders(tmp_path):
    sources = write_sources(tmp_path / "sources", photos=4)
    (sources / "images" / "below").mkdir()
    (sources / "images" / "1000.jpg").rename(sources / "images" / "below" / "1000.jpg")
    text = (sources / "captions.json").read_text().replace('"1000.jpg"', '"below/1000.jpg"')
    (sources / "captions.json").write_text(text)
    build_dataset(sources / "captions.json", sources / "descriptions.jsonl", sources / "images", tmp_path / "out")
    paths = [
        row["path"]
        for path in (tmp_path / "out" / "short").glob("*.parquet")
        for row in pq.read_table(path)["image"].to_pylist()
    ]
    assert sorted(paths) == [f"{number}.jpg" for number in range(1000, 1004)]


def text_only(folder: Path, file_names: list) -> Path:
    (folder / "short").mkdir(parents=True)
    rows = [
        {"image_id": number, "file_name": name, "description": "A dog.", "source": "x", "coco_url": "http://u:p@h/"}
        for number, name in enumerate(file_names)
    ]
    pq.write_table(pa.Table.from_pylist(rows, TEXT_SCHEMA), folder / "short" / "train-0.parquet")
    write_card(folder)
    return folder


def test_join_skips_names_that_lead_out(sources, secret, tmp_path):
    images = sources / "images"
    ways = [str(secret / "passport.jpg"), "../../private/passport.jpg", "link.jpg", "folder/passport.jpg", "fifo.jpg"]
    dataset = text_only(tmp_path / "text", ["1000.jpg", *ways])
    summary = join_images([str(dataset)], images, tmp_path / "joined", original=True)
    assert summary.skipped == 5
    (row,) = [
        row for path in (tmp_path / "joined" / "short").glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    assert row["image"]["path"] == "1000.jpg"
    assert row["coco_url"] == "http://h/"
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(["1001.jpg", *ways])],
        "annotations": [],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    dataset = text_only(tmp_path / "more", ["1000.jpg"] * 6)
    assert join_images([str(dataset)], images, tmp_path / "again", [tmp_path / "captions.json"]).skipped == 5
    assert not holds_secret(tmp_path / "again", secret)


def with_photos(folder: Path, photos: list) -> Path:
    """Write a dataset whose rows have these values in the column `image`."""
    (folder / "short").mkdir(parents=True)
    rows = [
        {"image": image, "image_id": number, "captions": [], "description": "There is a dog.", "source": "x"}
        for number, image in enumerate(photos)
    ]
    table = pa.Table.from_pylist([row | {"coco_url": None} for row in rows], IMAGE_SCHEMA)
    digest = hashlib.sha256(repr(photos).encode()).hexdigest()[:16]  # or the cache of `datasets` takes it for another
    splits = ""
    for split in ("train", "validation", "test"):
        pq.write_table(table, folder / "short" / f"{split}-{digest}.parquet")
        splits += f"  - split: {split}\n    path: short/{split}-{digest}.parquet\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: short\n  data_files:\n{splits}---\n")
    return folder


PHOTO = {"bytes": jpeg_of(1), "path": "1.jpg"}


@pytest.mark.parametrize("name", ["passport.jpg", "fifo.jpg"])
def test_evaluate_refuses_rows_that_name_files(run, secret, tmp_path, monkeypatch, name):
    monkeypatch.chdir(secret)
    for place in (str(secret / name), name):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        dataset = with_photos(tmp_path / "data", [PHOTO, {"bytes": None, "path": place}])
        with pytest.raises(InputError, match="image_id 1 has only a path"):
            items_of_dataset(str(dataset), "short")
        code, _, errors = run(
            "evaluate", "--dataset", dataset, "--variant", "short", "--model", "mini-short", "--out", tmp_path / "out"
        )
        assert code == 1
        assert "image_id 1 has only a path" in only_line(errors[-1:])


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": "x.jpg"}])
def test_rows_without_an_image_are_one_line(tmp_path, image):
    dataset = with_photos(tmp_path / "data", [PHOTO, image])
    with pytest.raises(InputError, match=r"image_id 1 has no bytes|x\.jpg: is empty"):
        items_of_dataset(str(dataset), "short")


def test_a_path_next_to_the_bytes_is_not_opened(secret, tmp_path, monkeypatch):
    from nanovlm_hf.training import streaming

    monkeypatch.chdir(secret)
    photos = [{"bytes": jpeg_of(number), "path": "passport.jpg"} for number in range(3)]
    photos[1]["path"] = str(secret / "passport.jpg")
    dataset = with_photos(tmp_path / "data", photos)
    for row in load_rows(str(dataset), "short", "test"):
        assert open_image(row).getpixel((0, 0)) == (128, 128, 128)
    rows = streaming.stored_rows(streaming.open_stream(str(dataset), "short", "test"), 3)
    assert [row["image"]["bytes"] for row in rows.cast_column("image", Image(decode=False))] == [
        jpeg_of(row["image_id"]) for row in rows.select_columns(["image_id"])
    ]


def test_training_refuses_rows_that_name_files(secret, tmp_path):
    from nanovlm_hf.data import image_store
    from nanovlm_hf.training import streaming

    dataset = with_photos(tmp_path / "data", [PHOTO, {"bytes": None, "path": str(secret / "passport.jpg")}])
    processor = NanoVLMImageProcessor()
    split = load(str(dataset), "short", split="train")
    with pytest.raises(InputError, match="image_id 1 has only a path"):
        image_store.decode_once(split, processor)
    with pytest.raises(InputError, match="image_id 1 has only a path"):
        streaming.stored_rows(streaming.open_stream(str(dataset), "short", "validation"), 2)
    for row in streaming.open_stream(str(dataset), "short", "train").rows:
        if row["image_id"] == 1:
            with pytest.raises(InputError, match="image_id 1 has only a path"):
                image_store.decode_image(row, processor)
        else:
            assert isinstance(image_store.decode_image(row, processor), np.ndarray)


def test_an_image_folder_loaded_by_datasets_is_refused(tmp_path):
    """Its rows have paths, even within the folder; `nanovlm data ingest --image-folder` reads it."""
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "a.jpg").write_bytes(jpeg_of(1))
    features = Features({"image": Image(), "image_id": Value("int64")})
    rows = Dataset.from_dict({"image": [str(tmp_path / "album" / "a.jpg")], "image_id": [7]}, features=features)
    (row,) = rows.cast_column("image", Image(decode=False))
    with pytest.raises(InputError, match="image_id 7 has only a path"):
        open_image(row)


@pytest.mark.parametrize("pattern", ["../private/x.parquet", "{private}/x.parquet", "{private}/*.parquet"])
def test_a_card_that_names_other_files_is_refused(secret, tmp_path, pattern):
    rows = [{"image_id": 1, "file_name": "a.jpg", "description": "secret", "source": "x", "coco_url": None}]
    pq.write_table(pa.Table.from_pylist(rows, TEXT_SCHEMA), secret / "x.parquet")
    folder = tmp_path / "data"
    folder.mkdir()
    path = pattern.format(private=secret)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: short\n  data_files:\n  - split: train\n    path: '{path}'\n---\n"
    )
    OPENED.clear()
    with pytest.raises(InputError, match="names a file outside the dataset"):
        load(str(folder), "short")


@pytest.fixture
def port():
    """A port on which nobody may call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "form", ["'{}'", "['{}']", "[{{split: train, path: '{}'}}]", "[{{split: train, path: ['{}']}}]"]
)
@pytest.mark.parametrize(
    "path",
    [
        "zip://x.parquet::{private}/s.zip",
        "zip://x.parquet::s.zip",
        "file://{private}/x.parquet",
        "file:{private}/x.parquet",
        "short/../../private/x.parquet",
        "http://127.0.0.1:{port}/x.parquet",
        "HTTPS://127.0.0.1:{port}/*.parquet",
        "zip://*.parquet::http://127.0.0.1:{port}/s.zip",
        "hf://datasets/other/private@main/x.parquet",
        "//[::1/x.parquet",
    ],
)
def test_a_card_that_names_addresses_or_archives_is_refused_before_they_are_opened(
    tmp_path, monkeypatch, port, path, form, file
):
    folder, private = tmp_path / "data", tmp_path / "private"
    (folder / "sub").mkdir(parents=True)
    private.mkdir()
    data_files = form.format(path.format(private=private, port=port))
    front = f"configs:\n- config_name: other\n- config_name: short\n  data_files: {data_files}\n"
    (folder / file).write_text(f"---\n{front}---\n" if file == "README.md" else front)
    monkeypatch.chdir(folder / "sub")
    for read in (lambda: load("..", "short"), lambda: configs_of(str(folder)), lambda: files_of("..", "other")):
        with pytest.raises(InputError, match=rf"its {file} names a file outside the dataset .*: name files"):
            read()


def test_a_card_of_a_foreign_folder_is_refused(tmp_path):
    front = "configs:\n- config_name: short\n  data_dir: ../private\n"
    (tmp_path / "README.md").write_text(f"---\n{front}---\n")
    with pytest.raises(InputError, match="names a file outside"):
        load(str(tmp_path), "short")


def test_a_card_on_the_hub_that_names_other_files_is_refused_before_they_are_opened(tmp_path, monkeypatch, port):
    card = tmp_path / "README.md"
    card.write_text(f"---\nconfigs:\n- config_name: short\n  data_files: http://127.0.0.1:{port}/x.parquet\n---\n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(card))
    for read in (lambda: load("someone/ShortDesc", "short"), lambda: configs_of("someone/ShortDesc")):
        with pytest.raises(InputError, match="names a file outside"):
            read()


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("hf://datasets/someone/ShortDesc@abc/short/train.parquet", True),
        ("hf://datasets/someone/Other@abc/short/train.parquet", False),
        ("zip://x.parquet::hf://datasets/someone/ShortDesc@abc/s.zip", False),
        ("hf://datasets/someone/ShortDesc@abc/s.zip::zip://x", False),
        ("http://127.0.0.1/x.parquet", False),
        ("/etc/x.parquet", False),
    ],
)
def test_a_dataset_on_the_hub_has_files_of_its_repository_alone(path, own):
    for name in ("someone/ShortDesc", "hf://datasets/someone/ShortDesc"):
        assert _is_own_file(name, path) == own


def test_many_blank_lines_in_a_card_take_no_time(tmp_path):
    (tmp_path / "README.md").write_text("---\n" + "\n" * 500_000)
    with pytest.raises(InputError, match="blank lines"):
        load(str(tmp_path), "short")


@pytest.mark.parametrize(("folder", "name"), [("", "."), ("", "./"), ("short", ".."), ("short", "../../data")])
def test_the_working_folder_is_a_dataset(tmp_path, monkeypatch, folder, name):
    with_photos(tmp_path / "data", [PHOTO])
    monkeypatch.chdir(tmp_path / "data" / folder)
    assert configs_of(name) == ["short"]
    assert len(load(name, "short", split="test")) == 1


def test_a_dataset_behind_a_link_is_read(tmp_path, monkeypatch):
    with_photos(tmp_path / "data", [PHOTO])
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    for name in ("link", "./data", "data/../data", str(tmp_path / "link")):
        assert len(load(name, "short", split="test")) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note | {"files": ["../outside.parquet"]},
        lambda note: note | {"files": ["/etc/passwd"]},
        lambda note: note | {"files": 7},
        lambda note: note | {"rows": [1]},
        lambda note: {"fingerprint": note["fingerprint"]},
        lambda note: [],
        lambda note: None,
    ],
)
def test_notes_of_parts_are_not_trusted(tmp_path, change):
    sources = write_sources(tmp_path / "sources", photos=6)
    outside = tmp_path / "outside.parquet"
    outside.write_bytes(b"kept")

    def build():
        given = sources / "captions.json", sources / "descriptions.jsonl", sources / "images"
        return build_dataset(*given, tmp_path / "out", num_shards=2).rows["short"]

    rows = build()
    (note,) = (tmp_path / "out" / ".parts").glob("*.json")
    whole = note.read_text()
    note.write_text(json.dumps(change(json.loads(whole))))
    assert build() == rows
    assert note.read_text() == whole, "the part was written again"
    note.write_text("\0")
    assert build() == rows
    assert outside.read_bytes() == b"kept"

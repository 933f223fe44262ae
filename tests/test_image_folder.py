"""Image folders with links, brackets, odd names, archives and metadata in every format."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovlm_hf import InputError
from nanovlm_hf.data.image_folder import read_image_folder
from nanovlm_hf.data.ingest import ingest_image_folder
from nanovlm_hf.data.sources import read_captions

from helpers.models import random_image
from helpers.output import only_line


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    random_image(size=(60, 40)).save(folder / "a.jpg")
    return folder


def metadata(folder, text, name="metadata.jsonl"):
    content = text if isinstance(text, (str, bytes)) else json.dumps(text)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_the_id_does_not_depend_on_how_the_folder_is_named(folder, tmp_path, monkeypatch):
    metadata(folder, {"file_name": "a.jpg", "text": "a dog"})
    (tmp_path / "link").symlink_to("album")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    sources = {}
    for number, name in enumerate(["../album", "../link", "../album/.", str(folder)]):
        assert ingest_image_folder(name, f"out{number}").images == 1
        (photo,) = read_captions(f"out{number}/captions.json")
        sources[photo.source] = photo.image_id
    assert set(sources) == {"album", "link"}
    assert len(set(sources.values())) == 1, "the id does not depend on how the folder is named"
    monkeypatch.chdir(folder)
    assert ingest_image_folder(".", tmp_path / "out").images == 1


@pytest.mark.parametrize("name", ["[1]*", "{a,b}", "a?b", "caf\udce9", "-x", "a\nb", "\u2028"])
def test_odd_names_of_folders_and_images(run, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    photo = f"{name.encode(errors='replace').decode()}.jpg"
    random_image(size=(60, 40)).save(folder / photo, "JPEG")
    (folder / "caf\udce9.jpg").write_bytes(b"of an old archive")
    metadata(folder, {"file_name": photo, "caption": "a dog"})
    code, lines, errors = run("data", "ingest", "--image-folder", folder, "--out", tmp_path / "out")
    assert (code, len(lines)) == (0, 1), errors
    (made,) = read_captions(tmp_path / "out" / "captions.json")
    assert made.captions == ["a dog"]
    made.source.encode()


def test_an_archive_must_be_unpacked(run, folder, tmp_path):
    (folder / "a.jpg").unlink()
    (folder / "images.zip").write_bytes(b"PK")
    for with_metadata in (False, True):
        if with_metadata:
            metadata(folder, {"file_name": "a.jpg", "text": "a dog"})
        code, _, errors = run("data", "ingest", "--image-folder", folder, "--out", tmp_path / "out")
        assert code == 1
        assert "images.zip: unpack it" in only_line(errors)


def test_an_archive_next_to_the_images_is_ignored(folder, tmp_path):
    (folder / "backup.tar.gz").write_bytes(b"x")
    metadata(folder, {"file_name": "a.jpg", "text": "a dog"})
    assert ingest_image_folder(folder, tmp_path / "out").images == 1


@pytest.mark.slow
def test_no_writable_home_is_needed(folder, tmp_path):
    metadata(folder, {"file_name": "a.jpg", "text": "a dog"})
    environment = os.environ | {"HOME": "/proc/nohome", "HF_HOME": "/proc/nohome/hf", "MPLCONFIGDIR": str(tmp_path)}
    command = [sys.executable, "-m", "nanovlm_hf.cli", "data", "ingest", "--image-folder", folder, "--out"]
    done = subprocess.run([*command, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_metadata_in_each_format(folder, tmp_path, kind):
    rows = [{"file_name": "a.jpg", "text": 'a "dog", and\na cat', "image_id": 7}]
    if kind == "csv":
        metadata(folder, '\ufefffile_name,text,image_id\na.jpg,"a ""dog"", and\na cat",7\n', "metadata.csv")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    else:
        metadata(folder, rows[0])
    (photo,) = read_image_folder(folder)
    assert (photo.image_id, photo.file_name, photo.captions) == (7, "a.jpg", ['a "dog", and a cat'])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("metadata.jsonl", "[]", "line 1: must be an object"),
        ("metadata.jsonl", "{", "line 1: not JSON"),
        ("metadata.jsonl", "", "its metadata lists no images"),
        ("metadata.jsonl", {"file_name": 7, "text": "x"}, "'file_name' must be the name of the image file"),
        (
            "metadata.jsonl",
            {"file_name": "a.jpg", "\x1b": "x"},
            "no column captions, caption or text (columns: file_name",
        ),
        ("metadata.jsonl", {"file_name": "a.jpg", "text": 7}, "'text' must be a string or a list of strings"),
        ("metadata.jsonl", {"file_name": "a.jpg", "captions": ["a", 7]}, "'captions' must be a string or a list"),
        ("metadata.jsonl", {"file_name": "a.jpg", "text": "x", "image_id": 1.5}, "line 1: 'image_id' must be a whole"),
        ("metadata.jsonl", {"file_name": "a.jpg", "text": "x", "image_id": True}, "line 1: 'image_id' must be a whole"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}\n' * 2, "is a duplicate"),
        ("metadata.csv", "file_name,text\na.jpg,a dog, a cat\n", "quote texts that contain commas"),
        ("metadata.csv", ",text\n0,a dog\n", "'file_name' must be the name of the image file"),
        ("metadata.csv", "file_name;text\na.jpg;a dog\n", "'file_name' must be the name of the image file"),
        ("metadata.csv", "file_name,text\n", "its metadata lists no images"),
        ("metadata.csv", "file_name,text\na.jpg,caf\xe9\n".encode("latin-1"), "not UTF-8"),
        ("metadata.csv", "file_name,text\na.jpg,a\n".encode("utf-16"), "not UTF-8"),
        ("metadata.csv", "file_name,text\na.jpg," + "x" * 200_000, "not CSV"),
        ("metadata.parquet", b"PAR1 but no more", "not a Parquet file"),
        ("metadata.parquet", b"", "not a Parquet file"),
    ],
)
def test_malformed_metadata_is_one_line(run, folder, tmp_path, name, content, problem):
    metadata(folder, content, name)
    code, _, errors = run("data", "ingest", "--image-folder", folder, "--out", tmp_path / "out")
    assert code == 1
    line = only_line(errors)
    assert problem in line
    assert "\x1b" not in line
    assert not (tmp_path / "out" / "captions.json").exists()


def test_links_and_names_that_lead_out_of_the_folder_fail_alone(folder, tmp_path):
    random_image(3).save(tmp_path / "secret.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "below").symlink_to(tmp_path)
    names = [
        "a.jpg",
        "link.jpg",
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "below/secret.jpg",
        "none.jpg",
        "x\0.jpg",
    ]
    metadata(folder, "".join(json.dumps({"file_name": name, "text": "a dog"}) + "\n" for name in names))
    summary = ingest_image_folder(folder, tmp_path / "out")
    assert (summary.images, summary.failed) == (1, 6)


def test_metadata_behind_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "outside.jsonl").write_text(json.dumps({"file_name": "a.jpg", "text": "private"}))
    (folder / "metadata.jsonl").symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(InputError, match="leads out of this folder"):
        read_image_folder(folder)


@pytest.mark.parametrize("none", [None, [], "", " ", [None], [" "]])
@pytest.mark.parametrize("columns", [("captions", "caption"), ("captions", "text"), ("caption", "text")])
def test_the_first_column_with_a_text_counts(folder, none, columns):
    metadata(folder, {"file_name": "a.jpg"} | dict(zip(columns, (none, "a red thing"), strict=True)))
    (photo,) = read_image_folder(folder)
    assert photo.captions == ["a red thing"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("image_id", [None, 7])
def test_a_row_for_each_caption(folder, kind, image_id):
    rows = [{"file_name": "a.jpg", "caption": text, "image_id": image_id} for text in ("a dog", "a cat", "a cow")]
    if kind == "csv":
        lines = (f"{row['file_name']},{row['caption']},{row['image_id'] or ''}" for row in rows)
        metadata(folder, "file_name,caption,image_id\n" + "\n".join(lines), "metadata.csv")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    else:
        metadata(folder, "\n".join(map(json.dumps, rows)))
    (photo,) = read_image_folder(folder)
    assert photo.captions == ["a dog", "a cat", "a cow"]
    assert image_id in (None, photo.image_id)


def test_two_images_with_the_same_id_are_refused(folder):
    rows = [{"file_name": name, "caption": "a dog", "image_id": 7} for name in ("a.jpg", "b.jpg")]
    metadata(folder, "\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="line 2: image_id 7 is a duplicate: change one"):
        read_image_folder(folder)


FAR = 2**62  # a time that Python cannot represent


@pytest.mark.parametrize(
    "column",
    [
        pa.array([FAR], pa.timestamp("us")),
        pa.array([FAR], pa.duration("s")),
        pa.array([FAR], pa.timestamp("us", "Nowhere/Unknown")),
        pa.array([FAR], pa.date64()),
        pa.array([[FAR]], pa.list_(pa.duration("s"))),
        pa.array([b"\xff"], pa.binary()),
        pa.array([{"a": FAR}], pa.struct({"a": pa.timestamp("us")})),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_of_odd_types_in_parquet(folder, column):
    known = {"file_name": ["a.jpg"], "caption": ["a dog"], "image_id": [7]}
    pq.write_table(pa.table(known | {"taken": column}), folder / "metadata.parquet")
    (photo,) = read_image_folder(folder)
    assert (photo.image_id, photo.captions) == (7, ["a dog"])
    for name in known:
        pq.write_table(pa.table(known | {name: column}), folder / "metadata.parquet")
        with pytest.raises(InputError, match=r"metadata.parquet: (row 0|not a Parquet file that can be read)"):
            read_image_folder(folder)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"image": ["a.jpg"]}, r"no column file_name \(columns: image\)"),
        ({"file_name": ["a.jpg"]}, "no column captions"),
    ],
)
def test_missing_columns_in_parquet(folder, columns, problem):
    pq.write_table(pa.table(columns), folder / "metadata.parquet")
    with pytest.raises(InputError, match=problem):
        read_image_folder(folder)


def repeated(text, number):
    """Return a column that holds the same text any number of times, in the memory of one."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(number, np.int32)), [text])


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (lambda: {"file_name": repeated("a.jpg", 400_000), "caption": repeated("a", 400_000)}, "row 1: .* duplicate"),
        (lambda: {"file_name": repeated("a.jpg", 6_000_000), "caption": repeated("a", 6_000_000)}, "divide it"),
        (lambda: {"file_name": [f"{i}.jpg" for i in range(256)], "caption": repeated("a" * 2**23, 256)}, "divide it"),
        (
            lambda: {
                "file_name": ["a.jpg"],
                "captions": pa.ListArray.from_arrays(pa.array([0, 6_000_000], pa.int32()), repeated("a", 6_000_000)),
            },
            "divide it",
        ),
    ],
)
def test_a_small_parquet_file_that_expands_is_refused(folder, table, problem):
    path = folder / "metadata.parquet"
    pq.write_table(pa.table(table()), path, compression="zstd", row_group_size=10**7)
    assert path.stat().st_size < 100_000
    before = pa.total_allocated_bytes()
    with pytest.raises(InputError, match=problem):
        read_image_folder(folder)
    assert pa.total_allocated_bytes() - before < 2**26

"""Untrusted annotations, descriptions and lists of ids are read or refused in one line."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanovlm_hf import InputError
from nanovlm_hf.data.sources import read_captions, read_descriptions, whole_number
from nanovlm_hf.evaluation.items import items_of_dataset, read_ids


def captions(tmp_path, content, encoding="utf-8"):
    path = tmp_path / "captions.json"
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def one_line(path, read=read_captions):
    with pytest.raises(InputError) as refused:
        read(path)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


IMAGE = {"id": 1, "file_name": "1.jpg"}
CAPTION = {"image_id": 1, "caption": "A dog."}


@pytest.mark.parametrize("number", [12, "12", "000000000012", 12.0])
def test_ids_in_other_notations_are_read(tmp_path, number):
    content = {"images": [{"id": number, "file_name": "x"}], "annotations": [{"image_id": number, "caption": "A dog."}]}
    (photo,) = read_captions(captions(tmp_path, content))
    assert (photo.image_id, photo.captions) == (12, ["A dog."])
    (tmp_path / "texts.jsonl").write_text(json.dumps({"image_id": number, "short": "A dog."}))
    assert read_descriptions(tmp_path / "texts.jsonl") == {12: {"short": "A dog."}}


@pytest.mark.parametrize(
    "number",
    [
        *(
            None,
            True,
            "",
            "x",
            "1.5",
            "1e3",
            " 1",
            "\u0661\u0662",
            1.5,
            float("nan"),
            float("inf"),
            1e300,
            [1],
            {"a": 1},
        ),
        *(2**63, -(2**63) - 1, 10**4000, "9" * 19, "9" * 5000),
    ],
)
def test_invalid_ids_are_one_line(tmp_path, number):
    with pytest.raises(InputError, match="must be a whole number"):
        whole_number(number, "here")
    message = one_line(captions(tmp_path, {"images": [{"id": number, "file_name": "x"}], "annotations": []}))
    assert "images[0]: 'id'" in message
    message = one_line(captions(tmp_path, {"images": [IMAGE], "annotations": [{"image_id": number, "caption": "A"}]}))
    assert "annotations[0]: 'image_id'" in message
    (tmp_path / "texts.jsonl").write_text(json.dumps({"image_id": number, "short": "A dog."}))
    assert "line 1: 'image_id'" in one_line(tmp_path / "texts.jsonl", read_descriptions)


def test_negative_and_large_ids_are_read(tmp_path):
    assert whole_number(-5, "here") == -5
    assert whole_number(2**63 - 1, "here") == 2**63 - 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "not JSON"),
        ("\0", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("null", "has no list 'images'"),
        ("7", "has no list 'images'"),
        ({"images": {}, "annotations": []}, "has no list 'images'"),
        ({"images": None, "annotations": []}, "has no list 'images'"),
        ({"images": [], "annotations": "x"}, "has no list 'annotations'"),
        ({"images": [7], "annotations": []}, r"images[0]: must be an object, not a number"),
        ({"images": [None], "annotations": []}, r"images[0]: must be an object, not null"),
        ({"images": [IMAGE], "annotations": [[]]}, r"annotations[0]: must be an object, not a list"),
        ({"images": [IMAGE, IMAGE | {"id": "1"}], "annotations": []}, "1 is a duplicate"),
        ({"images": [{"id": 1, "file_name": 7}], "annotations": []}, "'file_name' must be a string, not a number"),
        ({"images": [IMAGE | {"source": 7}], "annotations": []}, "'source' must be a string, not a number"),
        ({"images": [IMAGE], "annotations": [CAPTION | {"caption": None}]}, "'caption' must be a string, not null"),
        ({"images": [IMAGE], "annotations": [CAPTION | {"caption": ["A"]}]}, "'caption' must be a string, not a list"),
        # Other files of COCO's and other formats.
        ({"images": [IMAGE], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}, "give a COCO captions_*.json"),
        ({"images": [{"cocoid": 1, "sentences": []}], "dataset": "coco"}, "give a COCO captions_*.json"),
        ("1000.jpg#0\tA dog runs .\n1000.jpg#1\tA dog .\n", "give a COCO captions_*.json"),
        ("image,caption\n1000.jpg,A dog runs .\n", "give a COCO captions_*.json"),
    ],
)
def test_malformed_annotations_are_one_line(tmp_path, content, problem):
    assert problem in one_line(captions(tmp_path, content))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-16-le"])
def test_other_encodings_are_one_line(tmp_path, encoding):
    content = json.dumps({"images": [IMAGE | {"file_name": "caf\xe9.jpg"}], "annotations": []}, ensure_ascii=False)
    one_line(captions(tmp_path, content, encoding))
    path = tmp_path / "texts.jsonl"
    path.write_bytes(json.dumps({"image_id": 1, "short": "caf\xe9"}, ensure_ascii=False).encode(encoding))
    one_line(path, read_descriptions)


def test_compressed_files_are_named_as_such(tmp_path):
    assert "unpack it" in one_line(captions(tmp_path, gzip.compress(b"{}")))


def test_a_byte_order_mark_and_half_an_emoji_are_read(tmp_path):
    content = {"images": [IMAGE], "annotations": [CAPTION | {"caption": "A man skis \ud83d"}]}
    (photo,) = read_captions(captions(tmp_path, b"\xef\xbb\xbf" + json.dumps(content).encode()))
    assert photo.captions == ["A man skis \ufffd"]
    (tmp_path / "texts.jsonl").write_bytes(b'\xef\xbb\xbf{"image_id": 1, "short": "A \\ud83d."}\r\n\r\n')
    assert read_descriptions(tmp_path / "texts.jsonl") == {1: {"short": "A \ufffd."}}


def test_markup_and_control_characters_of_captions_stay_data(tmp_path):
    caption = "<script>{{ 7*7 }}</script> \x1b[31m \u202e \u2028end"
    content = {"images": [IMAGE | {"source": None, "coco_url": 7}], "annotations": [CAPTION | {"caption": caption}]}
    (photo,) = read_captions(captions(tmp_path, content))
    assert photo.captions == [" ".join(caption.split())]
    assert (photo.source, photo.coco_url) == ("captions", None)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[]", "line 1: must be an object, not a list"),
        ('"text"', "line 1: must be an object, not a string"),
        ('{"image_id": 1}', "has no text in 'short', 'long'"),
        ('{"image_id": 1, "short": null, "long": " "}', "has no text in 'short', 'long'"),
        ('{"image_id": 1, "short": "A.", "long": 7}', "'long' must be a string, not a number"),
        ('{"image_id": 1, "short": "A."}\n{"image_id": "1", "short": "B."}', "line 2: image_id 1 is a duplicate"),
        ('{"image_id": 1, "short": "A."', "line 1: not JSON"),
        ('[{"image_id": 1, "short": "A."},\n{"image_id": 2, "short": "A."}]', "line 1"),
    ],
)
def test_malformed_descriptions_are_one_line(tmp_path, line, problem):
    (tmp_path / "texts.jsonl").write_text(line)
    assert problem in one_line(tmp_path / "texts.jsonl", read_descriptions)


def test_lists_of_ids_end_lines_at_line_feeds(tmp_path):
    path = tmp_path / "items.txt"
    path.write_text("# a note\u20287\n12\r\n\n 13 \n-4\n", encoding="utf-8")
    assert read_ids(path) == [12, 13, -4]
    for line in ("12\u202813", "9" * 5000, "9" * 19, "1.5", "\u0661", "12 13", "\0"):
        path.write_text(line, encoding="utf-8")
        assert "line 1 is not an image_id" in one_line(path, read_ids)
    path.write_text("# nothing\n")
    assert "the list has no image_id" in one_line(path, read_ids)


GOOD = {"image": {"bytes": b"x", "path": "x"}, "image_id": 1, "description": "A dog.", "captions": ["A dog."]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image": None}, "image_id 1 has no bytes"),
        ({"image": "/etc/passwd"}, "image_id 1 has only a path"),
        ({"image": 7}, "cannot be read"),
        ({"image": {"bytes": 7, "path": "x"}}, "cannot be read"),
        ({"image_id": None}, "'image_id'"),
        ({"image_id": "one"}, "'image_id' must hold whole numbers"),
        ({"image_id": 1.5}, "'image_id' must hold whole numbers"),
        ({"description": None}, "'description'"),
        ({"description": 7}, "'description' must hold strings"),
        ({"captions": "A dog."}, "'captions' must hold lists of strings"),
        ({"captions": [None]}, "'captions'"),
        ({"captions": [7]}, "'captions' must hold lists of strings"),
        ({"image": ...}, "no column 'image': add the images with `nanovlm data join`"),
        ({"image_id": ...}, "no column 'image_id'"),
        ({"description": ...}, "no column 'description'"),
        ({"description": b"caf\xe9"}, "cannot be read"),
    ],
)
def test_columns_of_wrong_types_are_one_line(tmp_path, change, problem):
    row = {name: value for name, value in (GOOD | change).items() if value is not ...}
    folder = tmp_path / f"data{abs(hash(str(change)))}"
    (folder / "short").mkdir(parents=True)
    table = pa.Table.from_pylist([row])
    if isinstance(row.get("description"), bytes):  # a text that is not UTF-8
        place = table.column_names.index("description")
        table = table.set_column(place, "description", table["description"].combine_chunks().view(pa.string()))
    pq.write_table(table, folder / "short" / "a.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: short\n  data_files:\n  - split: test\n    path: short/a.parquet\n---\n"
    )
    with pytest.raises(InputError) as refused:
        items_of_dataset(str(folder), "short")
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)

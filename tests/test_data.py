import io
import json

import numpy as np
import pytest
from conftest import SENTENCES, picture
from datasets import load_dataset
from PIL import Image
from toy_data import write_sources

from nanovlm_hf import InputError
from nanovlm_hf.data import build as build_module
from nanovlm_hf.data.build import build_dataset, jpeg_bytes
from nanovlm_hf.data.sources import read_captions, read_descriptions
from nanovlm_hf.data.splits import hash_of, split_of
from nanovlm_hf.data.tokenizer import train_tokenizer, train_tokenizer_on


def build(sources, out):
    return build_dataset(sources / "captions.json", sources / "descriptions.jsonl", sources / "images", out)


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path / "sources", photos=40)


@pytest.fixture
def built(tmp_path, sources):
    counts = build_dataset(
        sources / "captions.json", sources / "descriptions.jsonl", sources / "images", tmp_path / "out"
    )
    return tmp_path / "out", counts


def test_load_dataset_opens_both_configs(built, sources):
    folder, counts = built
    for variant in ("short", "long"):
        dataset = load_dataset(str(folder), variant)
        assert {split: len(rows) for split, rows in dataset.items()} == counts[variant]
        assert sum(counts[variant].values()) == 40
    captions = {photo.image_id: photo for photo in read_captions(sources / "captions.json")}
    texts = read_descriptions(sources / "descriptions.jsonl")
    for split, rows in dataset.items():
        for row in rows:
            assert set(row) == {"image", "image_id", "captions", "description", "source"}
            assert split_of(row["image_id"]) == split
            assert row["description"] == texts[row["image_id"]]["long"]
            assert row["captions"] == captions[row["image_id"]].captions
            assert row["image"].size == (224, 224)


def test_streaming(built):
    folder, counts = built
    rows = list(load_dataset(str(folder), "short", split="train", streaming=True))
    assert len(rows) == counts["short"]["train"]
    assert rows[0]["image"].mode == "RGB"


def test_a_dataset_built_anew_under_the_same_name_is_not_the_cached_one(tmp_path):
    for photos in (30, 50):
        sources = write_sources(tmp_path / str(photos) / "sources", photos=photos)
        build(sources, tmp_path / str(photos) / "data")
        dataset = load_dataset(str(tmp_path / str(photos) / "data"), "short")
        assert sum(map(len, dataset.values())) == photos


def test_a_photo_that_is_ready_is_kept_byte_for_byte(tmp_path):
    ready, large, png = tmp_path / "ready.jpg", tmp_path / "large.jpg", tmp_path / "picture.png"
    picture(size=(224, 224)).save(ready)
    picture(size=(300, 200)).save(large)
    picture(size=(224, 224)).convert("L").save(png)
    assert jpeg_bytes(ready) == ready.read_bytes()
    for path in (large, png):
        made = Image.open(io.BytesIO(jpeg_bytes(path)))
        assert (made.format, made.mode, made.size) == ("JPEG", "RGB", (224, 224))


def test_splits_depend_on_the_id_alone():
    splits = [split_of(image_id) for image_id in range(20_000)]
    shares = {split: splits.count(split) / len(splits) for split in ("train", "validation", "test")}
    assert shares["test"] == pytest.approx(0.01, abs=0.003)
    assert shares["validation"] == pytest.approx(0.10, abs=0.01)
    # A change of these would move photos of published datasets from split to split.
    assert hash_of(42) == 0.4503076495696752
    assert [image_id for image_id in range(300) if split_of(image_id) == "test"] == [178, 245, 286]


def test_a_variant_without_texts_is_left_out(tmp_path, sources):
    lines = (sources / "descriptions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["long"]
    (sources / "descriptions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = build_dataset(
        sources / "captions.json", sources / "descriptions.jsonl", sources / "images", tmp_path / "out"
    )
    assert set(counts) == {"short"}
    assert not (tmp_path / "out" / "long").exists()


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: (s / "captions.json").unlink(), "captions.json: there is no such file"),
        (lambda s: (s / "captions.json").write_text("{"), "captions.json: line 1 is not JSON"),
        (lambda s: (s / "captions.json").write_text("[]"), "captions.json: no list 'images'"),
        (lambda s: change(s / "captions.json", lambda c: c.pop("annotations")), "captions.json: no list 'annotations'"),
        (lambda s: change(s / "captions.json", lambda c: c["images"].append(c["images"][0])), "is there twice"),
        (lambda s: change(s / "captions.json", lambda c: c["images"][3].pop("file_name")), r"images\[3\]: 'file_name'"),
        (
            lambda s: change(s / "captions.json", lambda c: c["annotations"][2].update(image_id=-5)),
            "no image has the id -5",
        ),
        (lambda s: (s / "descriptions.jsonl").write_text("nonsense"), "descriptions.jsonl: line 1 is not JSON"),
        (lambda s: (s / "descriptions.jsonl").write_text('{"image_id": 1}'), "line 1: neither 'short' nor 'long'"),
        (lambda s: (s / "descriptions.jsonl").write_text('{"image_id": -1, "short": "A."}'), "none of its image_ids"),
        (lambda s: next((s / "images").iterdir()).unlink(), "1 of the described photos are not there"),
        (lambda s: sorted((s / "images").iterdir())[5].write_bytes(b""), "is empty"),
        (lambda s: (s / "images").rename(s / "elsewhere"), "there is no such folder of photos"),
    ],
)
def test_bad_sources_are_named_in_one_line(tmp_path, sources, break_it, message):
    break_it(sources)
    with pytest.raises(InputError, match=message) as caught:
        build(sources, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "README.md").exists(), "what is not whole must not look whole"


def test_an_interrupted_shard_is_not_taken_for_a_finished_one(tmp_path, sources, monkeypatch):
    calls = []

    def fail_late(path):
        calls.append(path)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return jpeg_bytes(path)

    monkeypatch.setattr(build_module, "jpeg_bytes", fail_late)
    with pytest.raises(KeyboardInterrupt):
        build(sources, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.parquet"))
    monkeypatch.undo()
    assert sum(build(sources, tmp_path / "out")["short"].values()) == 40
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_an_existing_dataset_is_not_overwritten(built, sources):
    folder, _ = built
    with pytest.raises(InputError, match="there is a dataset already"):
        build(sources, folder)


def test_tokenizer_of_a_dataset(built):
    folder, _ = built
    tokenizer = train_tokenizer_on(str(folder), vocab_size=290)
    assert len(tokenizer) == 290
    assert len(tokenizer("There is a big red square.")["input_ids"]) < 20


def test_too_few_texts_for_a_vocabulary():
    with pytest.raises(InputError, match="vocab_size is 5120"):
        train_tokenizer(SENTENCES)


def test_every_byte_has_a_token():
    tokenizer = train_tokenizer(SENTENCES, 300)
    text = "".join(map(chr, np.random.default_rng(0).integers(0, 0xD800, 500)))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

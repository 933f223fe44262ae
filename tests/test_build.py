import functools
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from conftest import SENTENCES, only_line, picture
from datasets import Image as HubImage
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image
from toy_data import write_sources

from nanovlm_hf import InputError
from nanovlm_hf.data import build as build_module
from nanovlm_hf.data.build import build_dataset, jpeg_bytes
from nanovlm_hf.data.card import write_card
from nanovlm_hf.data.join import join_photos
from nanovlm_hf.data.sources import read_captions, read_descriptions
from nanovlm_hf.data.splits import hash_of, split_of
from nanovlm_hf.data.tokenizer import train_tokenizer, train_tokenizer_on


def build(sources, out, images="images", **options):
    images = None if images is None else sources / images
    return build_dataset(sources / "captions.json", sources / "descriptions.jsonl", images, out, **options)


@pytest.fixture
def sources(tmp_path):
    return write_sources(tmp_path / "sources", photos=40)


@pytest.fixture
def built(tmp_path, sources):
    return tmp_path / "out", build(sources, tmp_path / "out").rows


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
            assert set(row) == {"image", "image_id", "captions", "description", "source", "coco_url"}
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
    assert set(build(sources, tmp_path / "out").rows) == {"short"}
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
    assert sum(build(sources, tmp_path / "out").rows["short"].values()) == 40
    assert not list((tmp_path / "out").rglob("*.partial"))


def all_rows(folder, variant="short"):
    splits = load_dataset(str(folder), variant)
    return {
        row["image_id"]: row for rows in splits.values() for row in rows.cast_column("image", HubImage(decode=False))
    }


def test_an_interrupted_build_goes_on_after_its_last_whole_part(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(build_module, "PHOTOS_PER_PART", 15)
    encoded = []

    def note(path, stop_at=None):
        encoded.append(path.name)
        if len(encoded) == stop_at:
            raise KeyboardInterrupt
        return jpeg_bytes(path)

    monkeypatch.setattr(build_module, "jpeg_bytes", functools.partial(note, stop_at=32))
    with pytest.raises(KeyboardInterrupt):
        build(sources, tmp_path / "out")
    whole = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert whole
    encoded.clear()
    monkeypatch.setattr(build_module, "jpeg_bytes", note)
    build(sources, tmp_path / "out")
    assert len(encoded) == 10, "the third part alone"
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert whole.items() <= after.items()
    monkeypatch.undo()
    monkeypatch.setattr(build_module, "PHOTOS_PER_PART", 15)
    build(sources, tmp_path / "at-once")
    names = sorted(path.name for path in (tmp_path / "at-once").rglob("*.parquet"))
    assert names == sorted(after), "names carry a hash of the content: the same files"
    assert not (tmp_path / "out" / ".parts").exists()


def test_parts_of_other_inputs_are_not_kept(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(build_module, "write_card", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(sources, tmp_path / "out")
    monkeypatch.undo()
    texts = (sources / "descriptions.jsonl").read_text()
    (sources / "descriptions.jsonl").write_text(texts.replace("There is", "Here is"))
    build(sources, tmp_path / "out")
    rows = all_rows(tmp_path / "out")
    assert len(rows) == 40
    assert all(row["description"].startswith("Here is") for row in rows.values())


def test_shards_of_machines_come_together_by_copying(tmp_path, sources):
    merged = tmp_path / "merged"
    for shard in range(3):
        build(sources, tmp_path / f"shard{shard}", num_shards=3, shard_index=shard)
        assert not (tmp_path / f"shard{shard}" / "README.md").exists(), "a shard is no dataset"
        shutil.copytree(tmp_path / f"shard{shard}", merged, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    write_card(merged)
    build(sources, tmp_path / "one")
    assert all_rows(merged) == all_rows(tmp_path / "one")
    assert (
        load_dataset(str(merged), "long")["train"].num_rows
        == load_dataset(str(tmp_path / "one"), "long")["train"].num_rows
    )


def test_original_files_are_kept_byte_for_byte(tmp_path, sources):
    (photo,) = [path for path in (sources / "images").iterdir() if path.name == "1003.jpg"]
    picture(size=(300, 200)).save(photo)
    build(sources, tmp_path / "out", original=True)
    row = all_rows(tmp_path / "out")[1003]
    assert row["image"]["bytes"] == photo.read_bytes()


def test_a_few_bad_photos_are_left_out_and_named(tmp_path):
    sources = write_sources(tmp_path / "sources", photos=250)
    photos = sorted((sources / "images").iterdir())
    photos[3].write_bytes(b"")
    photos[7].unlink()
    summary = build(sources, tmp_path / "out")
    assert summary.skipped == 2
    assert sum(summary.rows["short"].values()) == 248
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == [1003, 1007]
    assert "is empty" in lines[0]["reason"]
    assert "no such file" in lines[1]["reason"]


def test_a_full_disk_in_the_middle(small_disk, sources):
    disk = small_disk("128k")
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        build(sources, disk / "out")
    assert not list(disk.rglob("*.parquet")), "what is half-written counts for nothing"
    (disk / "out" / "short").mkdir(exist_ok=True)
    (disk / "out" / "short" / "train-0000-00000-0123.parquet").write_bytes(b"of a kill between two renames")
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    build(sources, disk / "out")
    assert len(all_rows(disk / "out")) == 40
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(OSError, match="Read-only"):
        build(sources, disk / "again")


def test_the_card_is_what_the_hub_reads(built):
    folder, counts = built
    card = DatasetCard.load(folder / "README.md")
    assert card.data.pretty_name == "ShortDesc and LongDesc"
    assert card.data.task_categories == ["image-to-text"]
    assert card.data.size_categories == ["n<1K"]
    assert [config["config_name"] for config in card.data.configs] == ["short", "long"]
    statistics = json.loads((folder / "stats.json").read_text())
    assert statistics["short"]["descriptions"] == 40
    assert statistics["short"]["mean_words"] == 6.0
    assert statistics["short"]["commonest_openings"] == {"there is a": 40}
    assert statistics["long"]["sentences_per_description"] == {"3": 40}
    assert statistics["long"]["share_outside_child_vocabulary"] == 0.0625, (
        "one of sixteen: 'grey' is spelt 'gray' there"
    )
    assert f"| `short` | {counts['short']['train']} |" in card.text
    assert "| words in a description, mean | 6.0 |" in card.text
    with Image.open(folder / "statistics.png") as drawn:
        assert drawn.width > 1000


def test_a_card_says_where_texts_come_from(tmp_path, sources):
    build(sources, tmp_path / "out", license="cc-by-4.0", about="## Rights\n\nAll mine.")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert "## Rights\n\nAll mine.\n" in card.text


def test_text_only_has_no_pixels_and_join_puts_them_back(tmp_path, sources):
    build(sources, tmp_path / "whole")
    build(sources, tmp_path / "text", images=None)
    columns = load_dataset(str(tmp_path / "text"), "short")["train"].column_names
    assert columns == ["image_id", "file_name", "description", "source", "coco_url"]
    assert not any(
        b"square on" in path.read_bytes() or b"\xff\xd8\xff" in path.read_bytes()
        for path in (tmp_path / "text").rglob("*.parquet")
    )
    for variant in ("short", "long"):
        join_photos(
            [str(tmp_path / "text")], sources / "images", tmp_path / f"joined-{variant}", [sources / "captions.json"]
        )
        assert all_rows(tmp_path / f"joined-{variant}", variant) == all_rows(tmp_path / "whole", variant)


def test_join_takes_the_photos_that_are_there(tmp_path, sources):
    build(sources, tmp_path / "text", images=None)
    for path in sorted((sources / "images").iterdir())[:30]:
        path.unlink()
    summary = join_photos([str(tmp_path / "text")], sources / "images", tmp_path / "joined")
    assert sum(summary.rows["short"].values()) == 10
    assert summary.skipped == 30
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="not one of the described photos is there"):
        join_photos([str(tmp_path / "text")], tmp_path / "nothing", tmp_path / "none")
    with pytest.raises(InputError, match="this is no text-only ShortDesc or LongDesc"):
        join_photos([str(tmp_path / "joined")], sources / "images", tmp_path / "twice")
    with pytest.raises(InputError, match="cannot be loaded as a dataset"):
        join_photos([str(tmp_path / "nowhere")], sources / "images", tmp_path / "twice")


def test_images_or_text_only(run, tmp_path, sources):
    given = ("--captions", sources / "captions.json", "--descriptions", sources / "descriptions.jsonl")
    code, _, errors = run("data", "build", *given, "--out", tmp_path / "out")
    assert code == 2
    assert "--text-only" in only_line(errors)
    code, lines, _ = run("data", "build", *given, "--out", tmp_path / "out", "--text-only")
    assert code == 0
    assert lines == ["short: 37 train, 2 validation, 1 test", "long: 37 train, 2 validation, 1 test"]


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

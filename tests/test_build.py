import functools
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Image as HubImage
from datasets import load_dataset
from filelock import FileLock
from huggingface_hub import DatasetCard
from PIL import Image

from nanovlm_hf import InputError
from nanovlm_hf.data import build as build_module
from nanovlm_hf.data import parts
from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.data.encoding import jpeg_bytes, original_bytes
from nanovlm_hf.data.join import join_images
from nanovlm_hf.data.sources import read_captions, read_descriptions
from nanovlm_hf.data.splits import split_of, split_position
from nanovlm_hf.data.tokenizer import train_tokenizer, train_tokenizer_on
from nanovlm_hf.hub import dataset_card
from nanovlm_hf.hub.dataset_card import write_card
from nanovlm_hf.hub.datasets import write_repositories
from nanovlm_hf.variants import VARIANTS, LengthRange, Variant

from helpers.models import SENTENCES, random_image
from helpers.output import only_line
from helpers.toy_data import write_sources


def build(sources, out, images="images", **options):
    images = None if images is None else sources / images
    return build_dataset(sources / "captions.json", sources / "descriptions.jsonl", images, out, **options)


@pytest.fixture
def figures():
    """Request this to plot `statistics.png`."""


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Leave the figures out, which take a second for each dataset."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(dataset_card, "plot", lambda _, path: path.write_bytes(b""))


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
            assert set(row) == {"image", "image_id", "captions", "description", "written_from", "source", "coco_url"}
            assert split_of(row["image_id"]) == split
            assert row["description"] == texts[row["image_id"]]["long"]
            assert row["captions"] == captions[row["image_id"]].captions
            assert row["image"].size == (224, 224)


def test_streaming(built):
    folder, counts = built
    rows = list(load_dataset(str(folder), "short", split="train", streaming=True))
    assert len(rows) == counts["short"]["train"]
    assert rows[0]["image"].mode == "RGB"


def test_a_dataset_that_is_built_again_is_not_read_from_the_cache(tmp_path):
    for images in (30, 50):
        sources = write_sources(tmp_path / str(images) / "sources", photos=images)
        build(sources, tmp_path / str(images) / "data")
        dataset = load_dataset(str(tmp_path / str(images) / "data"), "short")
        assert sum(map(len, dataset.values())) == images


def test_a_jpeg_of_the_right_size_is_kept_byte_for_byte(tmp_path):
    ready, large, png = tmp_path / "ready.jpg", tmp_path / "large.jpg", tmp_path / "picture.png"
    random_image(size=(224, 224)).save(ready)
    random_image(size=(300, 200)).save(large)
    random_image(size=(224, 224)).convert("L").save(png)
    assert jpeg_bytes(ready) == ready.read_bytes()
    exif = Image.Exif()
    exif[0x010F] = "maker of the camera"
    tagged, noted, padded = (tmp_path / f"{name}.jpg" for name in ("tagged", "noted", "padded"))
    random_image(size=(224, 224)).save(tagged, exif=exif)
    random_image(size=(224, 224)).save(noted, comment="at home")
    padded.write_bytes(ready.read_bytes() + bytes(2**20))
    for path in (large, png, tagged, noted, padded):
        stored = jpeg_bytes(path)
        made = Image.open(io.BytesIO(stored))
        assert (made.format, made.mode, made.size) == ("JPEG", "RGB", (224, 224))
        assert not {"exif", "comment"} & made.info.keys()
        assert len(stored) < 2**18


def test_splits_depend_on_the_id_alone():
    splits = [split_of(image_id) for image_id in range(20_000)]
    shares = {split: splits.count(split) / len(splits) for split in ("train", "validation", "test")}
    assert shares["test"] == pytest.approx(0.01, abs=0.003)
    assert shares["validation"] == pytest.approx(0.10, abs=0.01)
    # A change of these values would move images of published datasets to other splits.
    assert split_position(42) == 0.4503076495696752
    assert [image_id for image_id in range(300) if split_of(image_id) == "test"] == [178, 245, 286]


def test_a_variant_without_texts_is_left_out(tmp_path, sources):
    lines = (sources / "descriptions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["long"]
    (sources / "descriptions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert set(build(sources, tmp_path / "out").rows) == {"short"}
    assert not (tmp_path / "out" / "long").exists()


def test_a_third_variant_is_one_entry(tmp_path, sources, monkeypatch):
    medium = Variant(
        name="medium",
        title="MediumDesc",
        requested=LengthRange(words=(40, 45), sentences=(3, 4)),
        accepted=LengthRange(words=(30, 55), sentences=(2, 6)),
        max_completion_tokens=200,
        prefix_words=12,
    )
    monkeypatch.setitem(VARIANTS, "medium", medium)
    rows = [json.loads(line) for line in (sources / "descriptions.jsonl").read_text().splitlines()]
    (sources / "descriptions.jsonl").write_text(
        "".join(json.dumps(row | {"medium": "A xyzzy. It is big."}) + "\n" for row in rows)
    )
    assert sum(build(sources, tmp_path / "out").rows["medium"].values()) == 40
    assert {row["description"] for row in all_rows(tmp_path / "out", "medium").values()} == {"A xyzzy. It is big."}
    folders = write_repositories(tmp_path / "out", tmp_path / "hub")
    assert [folder.name for folder in folders] == ["ShortDesc", "LongDesc", "MediumDesc"]
    text = (tmp_path / "hub" / "MediumDesc" / "README.md").read_text()
    assert "# MediumDesc\n\nMedium descriptions (40-45 words) of images" in text
    assert "| `medium` |" in text
    statistics = json.loads((tmp_path / "out" / "stats.json").read_text())["medium"]
    assert statistics["prompt_range"] == [40, 45]
    assert statistics["share_outside_vocabulary"] == 0.2, "one of five words"


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: (s / "captions.json").unlink(), "captions.json: no such file"),
        (lambda s: (s / "captions.json").write_text("{"), "captions.json: not JSON"),
        (lambda s: (s / "captions.json").write_text("[]"), "captions.json: has no list 'images'"),
        (
            lambda s: change(s / "captions.json", lambda c: c.pop("annotations")),
            "captions.json: has no list 'annotations'",
        ),
        (lambda s: change(s / "captions.json", lambda c: c["images"].append(c["images"][0])), "is a duplicate"),
        (lambda s: change(s / "captions.json", lambda c: c["images"][3].pop("file_name")), r"images\[3\]: 'file_name'"),
        (
            lambda s: change(s / "captions.json", lambda c: c["annotations"][2].update(image_id=-5)),
            "no image has the id -5",
        ),
        (lambda s: (s / "descriptions.jsonl").write_text("nonsense"), "descriptions.jsonl: line 1: not JSON"),
        (lambda s: (s / "descriptions.jsonl").write_text('{"image_id": 1}'), "line 1: has no text in 'short', 'long'"),
        (lambda s: (s / "descriptions.jsonl").write_text('{"image_id": -1, "short": "A."}'), "none of its image_ids"),
        (lambda s: next((s / "images").iterdir()).unlink(), "1 of the described images are missing"),
        (lambda s: sorted((s / "images").iterdir())[5].write_bytes(b""), "is empty"),
        (lambda s: (s / "images").rename(s / "elsewhere"), "no such folder of images"),
    ],
)
def test_bad_sources_are_reported_in_one_line(tmp_path, sources, break_it, message):
    break_it(sources)
    with pytest.raises(InputError, match=message) as caught:
        build(sources, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "README.md").exists(), "an incomplete dataset must not have a card"


def test_an_interrupted_build_leaves_no_files(tmp_path, sources, monkeypatch):
    calls = []

    def fail_late(path):
        calls.append(path)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return jpeg_bytes(path)

    monkeypatch.setattr(parts, "jpeg_bytes", fail_late)
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


def test_an_interrupted_build_resumes_after_its_last_complete_part(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(parts, "IMAGES_PER_PART", 15)
    encoded = []

    def note(path, stop_at=None):
        encoded.append(path.name)
        if len(encoded) == stop_at:
            raise KeyboardInterrupt
        return jpeg_bytes(path)

    monkeypatch.setattr(parts, "jpeg_bytes", functools.partial(note, stop_at=32))
    with pytest.raises(KeyboardInterrupt):
        build(sources, tmp_path / "out")
    whole = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert whole
    encoded.clear()
    monkeypatch.setattr(parts, "jpeg_bytes", note)
    build(sources, tmp_path / "out")
    assert len(encoded) == 10, "only the third part"
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert whole.items() <= after.items()
    monkeypatch.undo()
    monkeypatch.setattr(parts, "IMAGES_PER_PART", 15)
    build(sources, tmp_path / "at-once")
    names = sorted(path.name for path in (tmp_path / "at-once").rglob("*.parquet"))
    assert names == sorted(after), "names carry a hash of the content: the same files"
    assert not (tmp_path / "out" / ".parts").exists()


def test_parts_of_other_sources_are_not_reused(tmp_path, sources, monkeypatch):
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


def test_shards_are_merged_by_copying(tmp_path, sources):
    merged = tmp_path / "merged"
    for shard in range(3):
        build(sources, tmp_path / f"shard{shard}", num_shards=3, shard_index=shard)
        assert not (tmp_path / f"shard{shard}" / "README.md").exists(), "a shard is not a dataset"
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
    random_image(size=(300, 200)).save(photo)
    build(sources, tmp_path / "out", original=True)
    row = all_rows(tmp_path / "out")[1003]
    assert row["image"]["bytes"] == photo.read_bytes()
    with photo.open("r+b") as file:
        file.truncate(2**27 + 1)
    with pytest.raises(InputError, match="the file has more than 128 MiB: reduce the image first"):
        original_bytes(photo)


def test_a_few_unreadable_images_are_skipped_and_listed(tmp_path):
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


def test_a_full_disk_during_a_build(small_disk, sources):
    disk = small_disk("128k")
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        build(sources, disk / "out")
    assert not list(disk.rglob("*.parquet")), "partial files must not remain"
    (disk / "out" / "short").mkdir(exist_ok=True)
    (disk / "out" / "short" / "train-0000-00000-0123.parquet").write_bytes(b"left by a kill between two renames")
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    build(sources, disk / "out")
    assert len(all_rows(disk / "out")) == 40
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(OSError, match="Read-only"):
        build(sources, disk / "again")


@pytest.fixture
def interrupted(tmp_path, sources, monkeypatch):
    """Return the folder of a build in parts of ten images that was interrupted before its card."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "IMAGES_PER_PART", 10)
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_card", stop)
        with pytest.raises(KeyboardInterrupt):
            build(sources, tmp_path / "out")
    return tmp_path / "out"


def test_parts_of_an_interrupted_build_of_more_images_are_removed(interrupted, sources):
    lines = (sources / "descriptions.jsonl").read_text().splitlines()
    (sources / "descriptions.jsonl").write_text("\n".join(lines[:15]))
    build(sources, interrupted)
    assert len(all_rows(interrupted)) == 15


def test_a_changed_image_is_encoded_again(interrupted, sources):
    random_image(size=(224, 224)).save(sources / "images" / "1003.jpg")
    build(sources, interrupted)
    assert all_rows(interrupted)[1003]["image"]["bytes"] == (sources / "images" / "1003.jpg").read_bytes()


def test_a_changed_source_is_written_into_all_parts(interrupted, sources):
    content = json.loads((sources / "captions.json").read_text())
    for image in content["images"]:
        image["source"] = "elsewhere"
    (sources / "captions.json").write_text(json.dumps(content))
    build(sources, interrupted)
    assert {row["source"] for row in all_rows(interrupted).values()} == {"elsewhere"}


def test_the_list_of_skipped_images_is_removed_when_there_are_none(tmp_path):
    sources = write_sources(tmp_path / "sources", photos=40)
    (photo, *_) = sorted((sources / "images").iterdir())
    whole = photo.read_bytes()
    photo.write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 40 images cannot be read \(listed in skipped\.jsonl\)"):
        build(sources, tmp_path / "out")
    assert (tmp_path / "out" / "skipped.jsonl").exists()
    photo.write_bytes(whole)
    assert build(sources, tmp_path / "out").skipped == 0
    assert not (tmp_path / "out" / "skipped.jsonl").exists()


def test_files_of_other_builds_are_refused(tmp_path, sources):
    build(sources, tmp_path / "out", num_shards=2, shard_index=1)
    with pytest.raises(InputError, match="belongs to another build: name another folder"):
        build(sources, tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_second_concurrent_build_is_refused(run, tmp_path, sources):
    out = tmp_path / "out"
    given = ("--captions", sources / "captions.json", "--descriptions", sources / "descriptions.jsonl", "--out", out)
    out.mkdir()
    with FileLock(out / ".0000.lock"):
        code, _, errors = run("data", "build", *given, "--images", sources / "images")
        assert code == 1
        assert "another build is using this folder" in only_line(errors)
        build(sources, out, num_shards=2, shard_index=1)


def test_a_folder_whose_name_is_not_unicode(sources, tmp_path):
    """The file system allows it, and archives of other systems have such names."""
    out = tmp_path / "caf\udce9"
    assert sum(build(sources, out).rows["short"].values()) == 40
    assert "# ShortDesc and LongDesc" in (out / "README.md").read_text()


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("name", "make", "problem"),
    [
        ("foreign", lambda p: write_parquet(p, a=[1]), "no column 'image_id' of whole numbers"),
        ("texts", lambda p: write_parquet(p, image_id=[1], text=["x"]), "no column 'description' of strings"),
        ("numbers", lambda p: write_parquet(p, image_id=[1], description=[7]), "no column 'description' of strings"),
        ("ids", lambda p: write_parquet(p, image_id=["1"], description=["x"]), "no column 'image_id' of whole numbers"),
        ("null", lambda p: write_parquet(p, image_id=[1, None], description=["x", "y"]), "a row without image_id"),
        ("nulls", lambda p: write_parquet(p, image_id=[1, 2], description=["x", None]), "without image_id or descr"),
        ("twice", lambda p: write_parquet(p, image_id=[1, 1], description=["x", "y"]), "image_id 1 is a duplicate"),
        (
            "bytes",
            lambda p: write_parquet(p, image_id=[1], description=[b"\xff"]),
            "no column 'description' of strings",
        ),
        (
            "wide",
            lambda p: write_parquet(
                p, image_id=[1] * 256, description=["x"] * 256, more=pa.array([b"x" * 2**23] * 256, pa.binary(2**23))
            ),
            "holds more than",
        ),
        ("empty", lambda p: p.write_bytes(b""), "not a readable Parquet file"),
        ("cut", lambda p: p.write_bytes(b"PAR1" + bytes(100) + b"PAR1"), "not a readable Parquet file"),
        ("folder", lambda p: p.mkdir(), "not a readable Parquet file"),
    ],
)
def test_errors_of_foreign_parquet_files_are_one_line(run, tmp_path, name, make, problem):
    (tmp_path / name / "short").mkdir(parents=True)
    make(tmp_path / name / "short" / "train-0.parquet")
    code, _, errors = run("data", "card", "--dataset", tmp_path / name)
    assert code == 1
    assert problem in only_line(errors)
    assert "train-0.parquet" in only_line(errors)
    assert not (tmp_path / name / "README.md").exists()


def test_shards_of_different_builds_are_refused(run, tmp_path, sources):
    build(sources, tmp_path / "photos", num_shards=2)
    build(sources, tmp_path / "texts", images=None, num_shards=2, shard_index=1)
    build(sources, tmp_path / "all", num_shards=3, shard_index=2)
    for other, problem in (("texts", "its columns differ from those"), ("all", "is a duplicate")):
        shutil.copytree(tmp_path / "photos", tmp_path / f"with-{other}")
        shutil.copytree(tmp_path / other, tmp_path / f"with-{other}", dirs_exist_ok=True)
        code, _, errors = run("data", "card", "--dataset", tmp_path / f"with-{other}")
        assert code == 1
        assert problem in errors[-1]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_reported(built, tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "nanovlm_hf.cli", "data", "tokenizer", "--dataset", built[0], "--out", tmp_path]
    home = str(tmp_path / "file" / "below")
    environment = os.environ | {"HOME": home, "HF_HOME": home}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "set HF_HOME" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_full_disk_is_reported_for_tokenizer_and_card(figures, run, built, tmp_path, small_disk):
    disk = small_disk("4k")
    code, _, errors = run("data", "tokenizer", "--dataset", built[0], "--out", disk / "t", "--vocab-size", 290)
    assert code == 1
    assert str(disk / "t") in errors[-1]
    shutil.copytree(built[0] / "short", tmp_path / "data" / "short")
    subprocess.run(["mount", "-o", "remount,size=40k", disk], check=True)
    (disk / "short").symlink_to(tmp_path / "data" / "short")
    code, _, errors = run("data", "card", "--dataset", disk)
    assert code == 1
    assert str(disk) in errors[-1]
    assert not (disk / "README.md").exists()


def test_the_card_is_what_the_hub_reads(figures, built):
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
    assert statistics["long"]["share_outside_vocabulary"] == 0.0
    assert f"| `short` | {counts['short']['train']} |" in card.text
    assert "| words per description, mean | 6.0 |" in card.text
    with Image.open(folder / "statistics.png") as drawn:
        assert drawn.width > 1000


def test_the_card_contains_licence_and_origin(tmp_path, sources):
    build(sources, tmp_path / "out", license="cc-by-4.0", about="## Rights\n\nAll mine.")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert "## Rights\n\nAll mine.\n" in card.text


def test_join_restores_the_images_of_a_text_only_dataset(tmp_path, sources):
    build(sources, tmp_path / "whole")
    build(sources, tmp_path / "text", images=None)
    columns = load_dataset(str(tmp_path / "text"), "short")["train"].column_names
    assert columns == ["image_id", "file_name", "description", "written_from", "source", "coco_url"]
    assert not any(
        b"square on" in path.read_bytes() or b"\xff\xd8\xff" in path.read_bytes()
        for path in (tmp_path / "text").rglob("*.parquet")
    )
    for variant in ("short", "long"):
        join_images(
            [str(tmp_path / "text")], sources / "images", tmp_path / f"joined-{variant}", [sources / "captions.json"]
        )
        assert all_rows(tmp_path / f"joined-{variant}", variant) == all_rows(tmp_path / "whole", variant)


def test_join_keeps_the_origin_of_each_variant(tmp_path, sources):
    rows = [json.loads(line) for line in (sources / "descriptions.jsonl").read_text().splitlines()]
    for variant, origin in (("short", "captions"), ("long", "image"), ("none", None)):
        kept = "long" if variant == "none" else variant
        lines = [
            {"image_id": row["image_id"], kept: row[kept]} | ({"written_from": origin} if origin else {})
            for row in rows
        ]
        (sources / "descriptions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        build(sources, tmp_path / variant, images=None)
    for other, origin in (("long", "image"), ("none", None)):
        parts_of = [str(tmp_path / name) for name in ("short", other)]
        join_images(parts_of, sources / "images", tmp_path / f"joined-{other}", [sources / "captions.json"])
        for variant, expected in (("short", "captions"), ("long", origin)):
            found = all_rows(tmp_path / f"joined-{other}", variant).values()
            assert {row["written_from"] for row in found} == {expected}


def test_join_skips_missing_images(tmp_path, sources):
    build(sources, tmp_path / "text", images=None)
    for path in sorted((sources / "images").iterdir())[:30]:
        path.unlink()
    summary = join_images([str(tmp_path / "text")], sources / "images", tmp_path / "joined")
    assert sum(summary.rows["short"].values()) == 10
    assert summary.skipped == 30
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="none of the described images exists"):
        join_images([str(tmp_path / "text")], tmp_path / "nothing", tmp_path / "none")
    with pytest.raises(InputError, match="not a text-only ShortDesc or LongDesc"):
        join_images([str(tmp_path / "joined")], sources / "images", tmp_path / "twice")
    with pytest.raises(InputError, match="cannot be loaded as a dataset"):
        join_images([str(tmp_path / "nowhere")], sources / "images", tmp_path / "twice")


def test_several_sources_become_one_dataset(run, tmp_path):
    first, second = (write_sources(tmp_path / name, photos=count) for name, count in (("a", 10), ("b", 20)))
    content = json.loads((second / "captions.json").read_text())
    content["images"] = content["images"][10:]
    content["annotations"] = content["annotations"][20:]
    (second / "captions.json").write_text(json.dumps(content))
    rows = [json.loads(line) for line in (second / "descriptions.jsonl").read_text().splitlines()][10:]
    rows[0]["written_from"] = "captions"
    (second / "descriptions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = []
    for folder, origin in ((first, "captions"), (second, "image")):
        given += ["--captions", folder / "captions.json", "--images", folder / "images"]
        given += ["--descriptions", folder / "descriptions.jsonl", "--written-from", origin]
    code, _, errors = run("data", "build", *given, "--out", tmp_path / "out")
    assert code == 0, errors
    origins = {image_id: row["written_from"] for image_id, row in all_rows(tmp_path / "out").items()}
    assert origins == {number: "captions" if number <= 1010 else "image" for number in range(1000, 1020)}
    info = DatasetCard.load(tmp_path / "out" / "README.md").data.dataset_info
    assert [one["config_name"] for one in info] == ["long", "short"]
    loaded = load_dataset(str(tmp_path / "out"), "short")
    for split in info[1]["splits"]:
        assert split["num_examples"] == len(loaded[split["name"]])
        assert split["num_bytes"] == pytest.approx(loaded["train"].info.splits[split["name"]].num_bytes, rel=0.01)
    code, _, errors = run("data", "build", *given, "--written-from", "image", "--out", tmp_path / "more")
    assert code == 2
    # `load_dataset` above may have shown progress bars.
    assert "--written-from: give it once, or once for each --descriptions (2)" in errors[-1]


@pytest.mark.parametrize(
    ("source", "image_id", "name"),
    [
        ("visual7w", 7_000_001_592_881, "images/v7w_1592881.jpg"),
        ("visual7w", 7_000_001_592_881, "VG_100K_2/1592881.jpg"),
        ("voc2007", 8_000_000_001_906, "VOC2007/JPEGImages/001906.jpg"),
        ("coco-train2014", 9, "train2017/000000000009.jpg"),
        ("flickr8k", 12, "Images/x.jpg"),
    ],
)
def test_join_finds_images_under_the_names_of_their_collections(tmp_path, source, image_id, name):
    images = [{"id": image_id, "file_name": "x.jpg", "source": source}]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": []}))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"image_id": image_id, "short": "A.", "written_from": "image"}))
    build_dataset(tmp_path / "captions.json", tmp_path / "texts.jsonl", None, tmp_path / "text")
    path = tmp_path / "second" / name
    path.parent.mkdir(parents=True)
    random_image(size=(224, 224)).save(path)
    (tmp_path / "first").mkdir()
    join_images([str(tmp_path / "text")], [tmp_path / "first", tmp_path / "second"], tmp_path / "joined")
    row = all_rows(tmp_path / "joined")[image_id]
    assert row["image"]["bytes"] == path.read_bytes()
    assert row["written_from"] == "image"


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
    with pytest.raises(InputError, match="already contains a dataset"):
        build(sources, folder)


def test_a_tokenizer_is_trained_on_a_dataset(built):
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

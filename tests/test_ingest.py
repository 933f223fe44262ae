import json
import shutil
import subprocess
from collections import Counter

import pytest
from filelock import FileLock
from PIL import Image

from nanovlm_hf import InputError
from nanovlm_hf.data import download
from nanovlm_hf.data import ingest as ingest_module
from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.data.ingest import choose, ingest_coco, ingest_image_folder
from nanovlm_hf.data.sources import ImageRecord, read_all_captions, read_captions

from helpers.models import random_image
from helpers.output import only_line
from helpers.servers import serve


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve("photo_server.py", tmp_path_factory.mktemp("album")) as running:
        yield running


def coco(path, numbers, url=None):
    """Write a minimal file in COCO's caption format."""
    images = [
        {"license": 3, "id": number, "file_name": f"{number:012d}.jpg", "height": 240, "width": 320, "flickr_url": "x"}
        | ({"coco_url": f"{url}/{number}.jpg"} if url else {})
        for number in numbers
    ]
    annotations = [
        {"id": number * 5 + k, "image_id": number, "caption": f"A dog {k}."} for number in numbers for k in range(5)
    ]
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))
    return path


def test_options_of_captions_are_refused_for_an_image_folder(run, tmp_path):
    for option in (("--images", tmp_path), ("--allow-private",)):
        code, _, errors = run("data", "ingest", "--image-folder", tmp_path, "--out", tmp_path / "out", *option)
        assert code == 2
        assert "leave them out with --image-folder" in only_line(errors)


@pytest.mark.slow
def test_downloads_from_a_failing_server(run, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 2)
    captions = coco(tmp_path / "captions_train2017.json", range(1000, 1060), server.url)
    options = ("--captions", captions, "--out", tmp_path / "out", "--allow-private")
    code, lines, errors = run("data", "ingest", *options)
    assert code == 1
    assert lines == [f"{tmp_path / 'out' / 'captions.json'}: 48 images"]
    assert "failed.jsonl: 12 images are missing" in errors[-1]
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert Counter(row["image_id"] % 10 for row in failed) == {3: 6, 7: 6}
    assert "404" in failed[0]["reason"]
    photos = read_captions(tmp_path / "out" / "captions.json")
    assert len(photos) == 48
    assert photos[0].source == "coco-train2017"
    assert photos[0].coco_url == f"{server.url}/1000.jpg"
    assert len(photos[0].captions) == 5
    for photo in photos:
        with Image.open(tmp_path / "out" / "images" / photo.file_name) as image:
            assert (image.format, image.size) == ("JPEG", (224, 224))
    assert not list((tmp_path / "out").rglob("*.partial"))

    # Again: only what is missing.
    before = Counter(entry["photo"] for entry in server.entries())
    run("data", "ingest", *options)
    again = Counter(entry["photo"] for entry in server.entries()) - before
    assert {number % 10 for number in again} == {3, 7}


def test_original_files(server, tmp_path):
    captions = coco(tmp_path / "captions.json", [2000, 2008], server.url)
    ingest_coco([captions], tmp_path / "out", original=True, allow_private=True)
    with Image.open(tmp_path / "out" / "originals" / "000000002008.jpg") as image:
        assert image.size == (320, 240)


def test_a_limit_selects_the_same_images_every_time():
    photos = [ImageRecord(number, f"{number}.jpg", "x") for number in range(1000)]
    chosen = [photo.image_id for photo in choose(photos, 100, seed=0)]
    assert len(set(chosen)) == 100
    assert chosen == sorted(chosen), "in their order"
    backwards = choose(photos[::-1], 100, seed=0)
    assert {photo.image_id for photo in backwards} == set(chosen), "whatever the order of the file"
    assert {photo.image_id for photo in choose(photos, 50, seed=0)} < set(chosen)
    assert {photo.image_id for photo in choose(photos, 100, seed=1)} != set(chosen)
    assert chosen[:5] == [15, 36, 44, 46, 76], "a change would make other datasets from the same seed"


def test_images_of_a_folder(run, tmp_path):
    (tmp_path / "album").mkdir()
    for number in (1, 2, 3):
        random_image(number, size=(60, 40)).save(tmp_path / "album" / f"{number:012d}.jpg")
    (tmp_path / "album" / f"{2:012d}.jpg").write_bytes(b"nothing")
    captions = coco(tmp_path / "captions_val2014.json", [1, 2, 3, 4])
    code, lines, errors = run(
        "data", "ingest", "--captions", captions, "--images", tmp_path / "album", "--out", tmp_path / "out"
    )
    assert code == 1
    assert lines[0].endswith("2 images")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert "not an image" in reasons[0]
    assert "no such file" in reasons[1]
    code, _, errors = run("data", "ingest", "--captions", captions, "--out", tmp_path / "out")
    assert code == 1
    assert "no image has a coco_url: name the folder" in only_line(errors)
    code, _, errors = run("data", "ingest", "--out", tmp_path / "out")
    assert code == 2
    assert "--image-folder" in only_line(errors)


@pytest.mark.parametrize("column", ["captions", "caption", "text"])
def test_an_image_folder_is_read_as_datasets_reads_it(tmp_path, column):
    folder = tmp_path / "album"
    (folder / "train" / "deep").mkdir(parents=True)
    names = ["train/one.png", "train/deep/two.jpg", "train/three.jpg"]
    lines = []
    for number, name in enumerate(names):
        random_image(number, size=(60, 40)).save(folder / name)
        texts = [f"a dog {number}", " "] if column == "captions" else f"a dog {number}"
        lines.append(json.dumps({"file_name": name.removeprefix("train/"), column: texts}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    assert ingest_image_folder(folder, tmp_path / "out").images == 3
    photos = {photo.captions[0]: photo for photo in read_captions(tmp_path / "out" / "captions.json")}
    assert set(photos) == {"a dog 0", "a dog 1", "a dog 2"}
    assert {photo.source for photo in photos.values()} == {"album"}
    ids = {photo.image_id for photo in photos.values()}
    # More photos do not change the ids of those that were there, and so not their split.
    random_image(9).save(folder / "train" / "nine.jpg")
    with (folder / "train" / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "nine.jpg", column: ["a cat"] if column == "captions" else "a cat"}))
    assert ingest_image_folder(folder, tmp_path / "more").images == 4
    assert ids < {photo.image_id for photo in read_captions(tmp_path / "more" / "captions.json")}
    # What was ingested can be built.
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"image_id": one, "short": "A dog."}) + "\n" for one in ids))
    summary = build_dataset(tmp_path / "out" / "captions.json", texts, tmp_path / "out" / "images", tmp_path / "data")
    assert sum(summary.rows["short"].values()) == 3


def sets_of_two_people(tmp_path, how, server):
    """Return two sets of captions with the same ids but different images, by folder or by address."""
    sets = []
    for colour, base in (("red", 3000), ("blue", 4000)):
        images = tmp_path / colour
        images.mkdir()
        for number in (1, 2):
            Image.new("RGB", (50, 50), colour).save(images / f"{number:012d}.jpg")
        captions = images / "captions.json"
        content = {
            "images": [
                {"id": one, "file_name": f"{one:012d}.jpg", "coco_url": f"{server.url}/{base + 10 * one}.jpg"}
                for one in (1, 2)
            ],
            "annotations": [{"image_id": number, "caption": f"a {colour} square"} for number in (1, 2)],
        }
        captions.write_text(json.dumps(content))
        sets.append((captions, images if how == "folder" else None))
    return sets


@pytest.mark.parametrize("how", ["folder", "addresses"])
def test_images_of_other_sources_are_obtained_again(server, tmp_path, how):
    first, second = sets_of_two_people(tmp_path, how, server)
    out = tmp_path / "out"

    def ingest(captions, images):
        assert ingest_coco([captions], out, images, allow_private=True).images == 2
        return [(out / "images" / photo.file_name).read_bytes() for photo in read_captions(out / "captions.json")]

    red = ingest(*first)
    assert ingest(*first) == red
    blue = ingest(*second)
    assert set(red).isdisjoint(blue)
    assert read_captions(out / "captions.json")[0].captions == ["a blue square"]
    assert ingest(*first) == red
    # A folder without the record, or with one that is damaged.
    (out / "sources.jsonl").write_text('{"file": 7}\nnonsense\n[]\n')
    assert ingest(*second) == blue


def test_a_killed_run_leaves_no_old_captions_for_new_images(server, tmp_path, monkeypatch):
    first, second = sets_of_two_people(tmp_path, "folder", server)
    out = tmp_path / "out"
    ingest_coco([first[0]], out, first[1])
    red = (out / "images" / "000000000001.jpg").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest_module._Ingest, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        ingest_coco([second[0]], out, second[1])
    monkeypatch.undo()
    assert not (out / "captions.json").exists()
    ingest_coco([first[0]], out, first[1])
    assert (out / "images" / "000000000001.jpg").read_bytes() == red


def test_a_changed_image_is_obtained_again(tmp_path):
    (tmp_path / "album").mkdir()
    photo = tmp_path / "album" / f"{1:012d}.jpg"
    captions = coco(tmp_path / "captions.json", [1])
    kept = tmp_path / "out" / "images" / photo.name
    random_image(1).save(photo)
    ingest_coco([captions], tmp_path / "out", tmp_path / "album")
    before = kept.stat().st_mtime_ns
    ingest_coco([captions], tmp_path / "out", tmp_path / "album")
    assert kept.stat().st_mtime_ns == before, "the same photo is not taken again"
    content = kept.read_bytes()
    random_image(2).save(photo)
    ingest_coco([captions], tmp_path / "out", tmp_path / "album")
    assert kept.read_bytes() != content
    content = kept.read_bytes()
    photo.unlink()
    assert ingest_coco([captions], tmp_path / "out", tmp_path / "album").images == 1, "what is there stays"
    assert kept.read_bytes() == content


def test_original_files_of_another_format_replace_each_other(tmp_path):
    captions = coco(tmp_path / "captions.json", [1])
    for kind in ("PNG", "JPEG"):
        (tmp_path / kind).mkdir()
        random_image(1).save(tmp_path / kind / f"{1:012d}.jpg", kind)
        ingest_coco([captions], tmp_path / "out", tmp_path / kind, original=True)
        (path,) = (tmp_path / "out" / "originals").iterdir()
        assert Image.open(path).format == kind


def test_inputs_are_not_overwritten(run, tmp_path):
    images = tmp_path / "out" / "images"
    images.mkdir(parents=True)
    for name in (f"{1:012d}.jpg", f"{2:012d}.png"):
        random_image(size=(300, 200)).save(images / name)
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    captions = coco(tmp_path / "captions.json", [1, 2])
    captions.write_text(captions.read_text().replace(f"{2:012d}.jpg", f"{2:012d}.png"))
    options = ("--images", images, "--out", tmp_path / "out")
    code, lines, _ = run("data", "ingest", "--captions", captions, *options)
    assert (code, lines[0][-9:]) == (1, " 0 images")
    assert "name another --out" in (tmp_path / "out" / "failed.jsonl").read_text()
    shutil.copy(captions, tmp_path / "out" / "captions.json")
    code, _, errors = run("data", "ingest", "--captions", tmp_path / "out" / "captions.json", *options)
    assert code == 1
    assert "name another --out" in only_line(errors)
    assert (tmp_path / "out" / "captions.json").read_text() == captions.read_text()
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


def test_a_second_concurrent_run_is_refused(run, tmp_path):
    captions = coco(tmp_path / "captions.json", [1])
    (tmp_path / "out").mkdir()
    (tmp_path / "album").mkdir()
    random_image().save(tmp_path / "album" / f"{1:012d}.jpg")
    options = ("--captions", captions, "--images", tmp_path / "album", "--out", tmp_path / "out")
    with FileLock(tmp_path / "out" / ".lock"):
        code, _, errors = run("data", "ingest", *options)
        assert code == 1
        assert "another run is using this folder" in only_line(errors)
    assert run("data", "ingest", *options)[0] == 0


def test_a_full_disk_names_the_folder(run, tmp_path, small_disk):
    (tmp_path / "album").mkdir()
    for number in range(1, 30):
        random_image(number, size=(224, 224)).save(tmp_path / "album" / f"{number:012d}.jpg")
    captions = coco(tmp_path / "captions.json", range(1, 30))
    disk = small_disk("256k")
    options = ("--captions", captions, "--images", tmp_path / "album", "--out", disk / "out")
    code, _, errors = run("data", "ingest", *options)
    assert code == 1
    assert str(disk / "out") in errors[-1]
    assert "No space left on device" in errors[-1]
    assert not (disk / "out" / "captions.json").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert run("data", "ingest", *options)[0] == 0


def test_an_image_folder_without_captions(tmp_path):
    (tmp_path / "album").mkdir()
    random_image().save(tmp_path / "album" / "a.jpg")
    with pytest.raises(InputError, match="no column captions, caption or text"):
        ingest_image_folder(tmp_path / "album", tmp_path / "out")
    with pytest.raises(InputError, match="no such folder"):
        ingest_image_folder(tmp_path / "nowhere", tmp_path / "out")


def test_several_annotation_files(tmp_path):
    first, second = coco(tmp_path / "captions_train2014.json", [1, 2]), coco(tmp_path / "captions_val2014.json", [3])
    photos = read_all_captions([first, second])
    assert [(photo.image_id, photo.source) for photo in photos] == [
        (1, "coco-train2014"),
        (2, "coco-train2014"),
        (3, "coco-val2014"),
    ]
    third = coco(tmp_path / "captions_val2017.json", [2])
    with pytest.raises(InputError, match="the id 2 is in another --captions file too"):
        read_all_captions([first, third])

import json
from collections import Counter

import pytest
from conftest import only_line, picture
from PIL import Image
from servers import serve

from nanovlm_hf import InputError
from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.data.ingest import choose, ingest_coco, ingest_image_folder
from nanovlm_hf.data.sources import Photo, read_all_captions, read_captions


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve("photo_server.py", tmp_path_factory.mktemp("photos")) as running:
        yield running


def coco(path, numbers, url=None):
    """COCO's own format, of which only a part is needed."""
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


def test_downloads_with_a_server_that_fails(run, server, tmp_path):
    captions = coco(tmp_path / "captions_train2017.json", range(1000, 1060), server.url)
    options = ("--captions", captions, "--out", tmp_path / "out")
    code, lines, errors = run("data", "ingest", *options)
    assert code == 1
    assert lines == [f"{tmp_path / 'out' / 'captions.json'}: 48 photos"]
    assert "failed.jsonl: 12 photos are not there" in errors[-1]
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
    ingest_coco([captions], tmp_path / "out", original=True)
    with Image.open(tmp_path / "out" / "originals" / "000000002008.jpg") as image:
        assert image.size == (320, 240)


def test_a_limit_takes_the_same_photos_every_time():
    photos = [Photo(number, f"{number}.jpg", "x") for number in range(1000)]
    chosen = [photo.image_id for photo in choose(photos, 100, seed=0)]
    assert len(set(chosen)) == 100
    assert chosen == sorted(chosen), "in their order"
    backwards = choose(photos[::-1], 100, seed=0)
    assert {photo.image_id for photo in backwards} == set(chosen), "whatever the order of the file"
    assert {photo.image_id for photo in choose(photos, 50, seed=0)} < set(chosen)
    assert {photo.image_id for photo in choose(photos, 100, seed=1)} != set(chosen)
    assert chosen[:5] == [15, 36, 44, 46, 76], "a change would make other datasets from the same seed"


def test_photos_of_a_folder(run, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in (1, 2, 3):
        picture(number, size=(60, 40)).save(tmp_path / "photos" / f"{number:012d}.jpg")
    (tmp_path / "photos" / f"{2:012d}.jpg").write_bytes(b"nothing")
    captions = coco(tmp_path / "captions_val2014.json", [1, 2, 3, 4])
    code, lines, errors = run(
        "data", "ingest", "--captions", captions, "--images", tmp_path / "photos", "--out", tmp_path / "out"
    )
    assert code == 1
    assert lines[0].endswith("2 photos")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert "is no picture" in reasons[0]
    assert "no such file" in reasons[1]
    code, _, errors = run("data", "ingest", "--captions", captions, "--out", tmp_path / "out")
    assert code == 1
    assert "no photo has a coco_url: name the folder" in only_line(errors)
    code, _, errors = run("data", "ingest", "--out", tmp_path / "out")
    assert code == 2
    assert "--image-folder" in only_line(errors)


@pytest.mark.parametrize("column", ["captions", "caption", "text"])
def test_an_image_folder_as_datasets_reads_it(tmp_path, column):
    folder = tmp_path / "album"
    (folder / "train" / "deep").mkdir(parents=True)
    names = ["train/one.png", "train/deep/two.jpg", "train/three.jpg"]
    lines = []
    for number, name in enumerate(names):
        picture(number, size=(60, 40)).save(folder / name)
        texts = [f"a dog {number}", " "] if column == "captions" else f"a dog {number}"
        lines.append(json.dumps({"file_name": name.removeprefix("train/"), column: texts}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    assert ingest_image_folder(folder, tmp_path / "out").photos == 3
    photos = {photo.captions[0]: photo for photo in read_captions(tmp_path / "out" / "captions.json")}
    assert set(photos) == {"a dog 0", "a dog 1", "a dog 2"}
    assert {photo.source for photo in photos.values()} == {"album"}
    ids = {photo.image_id for photo in photos.values()}
    # More photos do not change the ids of those that were there, and so not their split.
    picture(9).save(folder / "train" / "nine.jpg")
    with (folder / "train" / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "nine.jpg", column: ["a cat"] if column == "captions" else "a cat"}))
    assert ingest_image_folder(folder, tmp_path / "more").photos == 4
    assert ids < {photo.image_id for photo in read_captions(tmp_path / "more" / "captions.json")}
    # What was ingested can be built.
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"image_id": one, "short": "A dog."}) + "\n" for one in ids))
    summary = build_dataset(tmp_path / "out" / "captions.json", texts, tmp_path / "out" / "images", tmp_path / "data")
    assert sum(summary.rows["short"].values()) == 3


def test_an_image_folder_without_captions(tmp_path):
    (tmp_path / "album").mkdir()
    picture().save(tmp_path / "album" / "a.jpg")
    with pytest.raises(InputError, match="no column captions, caption or text"):
        ingest_image_folder(tmp_path / "album", tmp_path / "out")
    with pytest.raises(InputError, match="there is no such folder"):
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

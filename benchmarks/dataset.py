"""How fast is `nanovlm data build`, does its memory stay flat, and how long does `load_dataset` take?

`python benchmarks/dataset.py` makes photos of 640 x 480 (about 110 KB each), builds datasets of 1,000 and of 20,000 of
them with both variants, each in a process of its own, and loads them. The reference is the bare work of Pillow: decode,
resize to 224 x 224, encode, in as many threads as there are cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

DISTINCT = 200  # photos drawn; the rest are further names of the same files
WORDS = "a little dog runs over the green grass with its red ball and a boy looks at it from the old bench".split()


def make_sources(folder: Path, photos: int) -> None:
    """Photos that are about as hard to decode as COCO's: smooth shapes with noise on them."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(DISTINCT):
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = np.asarray(shapes, dtype=np.int16) + rng.integers(-12, 13, (480, 640, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.jpg", quality=85)
    for number in range(DISTINCT, photos):
        os.link(folder / "images" / f"{number % DISTINCT}.jpg", folder / "images" / f"{number}.jpg")


def write_texts(folder: Path, photos: int) -> None:
    rng = np.random.default_rng(1)

    def text(size: int) -> str:
        return " ".join(rng.choice(WORDS, size)) + "."

    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(photos)]
    annotations = [
        {"id": 5 * number + place, "image_id": number, "caption": text(10)}
        for number in range(photos)
        for place in range(5)
    ]
    (folder / f"captions{photos}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    with (folder / f"texts{photos}.jsonl").open("w") as file:
        for number in range(photos):
            file.write(json.dumps({"image_id": number, "short": text(22), "long": text(65)}) + "\n")


def pillow_alone(folder: Path, photos: int) -> float:
    """Photos a second."""

    def encode(number: int) -> None:
        with Image.open(folder / "images" / f"{number}.jpg") as image:
            image.resize((224, 224), Image.BICUBIC, reducing_gap=3.0).save(os.devnull, "JPEG", quality=92)

    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(encode, range(photos)))
    return photos / (time.perf_counter() - start)


def build(folder: Path, photos: int) -> None:
    """In a process of its own: prints seconds of writing Parquet, of the card, and the peak of memory before it."""
    from nanovlm_hf.data.build import Builder
    from nanovlm_hf.data.sources import read_captions, read_descriptions

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    captions = read_captions(folder / f"captions{photos}.json")
    texts = read_descriptions(folder / f"texts{photos}.jsonl")
    read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    builder = Builder(folder / f"data{photos}", folder / "images")
    builder.run(captions, texts)
    written = time.perf_counter()
    builder.finish("other", "")
    card = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([written - start, card - written, base / 1024, read / 1024, peak / 1024]))


LOAD = """
import sys, time
from datasets import load_dataset
start = time.perf_counter()
dataset = load_dataset(sys.argv[1], "short")
print(time.perf_counter() - start)
"""


def in_process(*command: object, home: Path) -> object:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        return build(arguments.build, arguments.photos[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_sources(folder, max(arguments.photos))
        size = sum((folder / "images" / f"{number}.jpg").stat().st_size for number in range(DISTINCT)) / DISTINCT
        print(f"photos of 640 x 480, {size / 1000:.0f} KB on average, to 224 x 224; both variants in one pass")
        print("  photos  photos/s  of Pillow alone  card   peak memory (imports, texts read)  load_dataset, then again")
        for photos in arguments.photos:
            write_texts(folder, photos)
            alone = pillow_alone(folder, min(photos, 2000))
            seconds, card, base, read, peak = in_process(
                __file__, "--build", folder, "--photos", photos, home=folder / "hf"
            )
            first, again = (in_process("-c", LOAD, folder / f"data{photos}", home=folder / "hf") for _ in range(2))
            print(
                f"{photos:>8} {photos / seconds:>9.0f} {photos / seconds / alone:>16.2f} {card:>4.1f}s"
                f"   {peak:>6.0f} MiB ({base:.0f}, {read:.0f}){'':<15} {first:.2f}s {again:.2f}s"
            )
    return None


if __name__ == "__main__":
    main()

"""Measure the speed and memory of `nanovlm data build`, and the time of `load_dataset`.

`python benchmarks/dataset.py` generates images of 640 x 480 (about 110 KB each), builds datasets of 1,000 and 20,000 of
them with both variants, each in its own process, and loads them. The reference is Pillow alone: decode, resize to
224 x 224 and encode, in one thread for each core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

DISTINCT = 200  # generated images; the others are hard links to them
WORDS = "a little dog runs over the green grass with its red ball and a boy looks at it from the old bench".split()


def make_sources(folder: Path, images: int) -> None:
    """Generate images that are about as expensive to decode as those of COCO: smooth shapes with noise."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(DISTINCT):
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        noisy = np.asarray(shapes, dtype=np.int16) + rng.integers(-12, 13, (480, 640, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.jpg", quality=85)
    for number in range(DISTINCT, images):
        os.link(folder / "images" / f"{number % DISTINCT}.jpg", folder / "images" / f"{number}.jpg")


def write_texts(folder: Path, count: int) -> None:
    rng = np.random.default_rng(1)

    def text(size: int) -> str:
        return " ".join(rng.choice(WORDS, size)) + "."

    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(count)]
    annotations = [
        {"id": 5 * number + place, "image_id": number, "caption": text(10)}
        for number in range(count)
        for place in range(5)
    ]
    (folder / f"captions{count}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    with (folder / f"texts{count}.jsonl").open("w") as file:
        for number in range(count):
            file.write(json.dumps({"image_id": number, "short": text(22), "long": text(65)}) + "\n")


def pillow_alone(folder: Path, images: int) -> float:
    """Return images per second."""
    from nanovlm_hf.devices import cpu_count

    def encode(number: int) -> None:
        with Image.open(folder / "images" / f"{number}.jpg") as image:
            image.resize((224, 224), Image.BICUBIC, reducing_gap=3.0).save(os.devnull, "JPEG", quality=92)

    start = time.perf_counter()
    with ThreadPoolExecutor(cpu_count()) as pool:
        list(pool.map(encode, range(images)))
    return images / (time.perf_counter() - start)


def build(folder: Path, images: int) -> None:
    """Print the seconds for Parquet files and card, and the peak memory (MiB) after imports, reading and building."""
    from nanovlm_hf.data.build import Builder
    from nanovlm_hf.data.sources import read_all_captions, read_descriptions
    from nanovlm_hf.devices import peak_memory_mib
    from nanovlm_hf.hub.dataset_card import write_card

    base = peak_memory_mib()
    start = time.perf_counter()
    captions = read_all_captions([folder / f"captions{images}.json"], [folder / "images"])
    texts = read_descriptions(folder / f"texts{images}.jsonl")
    read = peak_memory_mib()
    builder = Builder(folder / f"data{images}", with_images=True)
    builder.run(captions, texts)
    written = time.perf_counter()
    write_card(folder / f"data{images}")
    card = time.perf_counter()
    peak = peak_memory_mib()
    print(json.dumps([written - start, card - written, base, read, peak]))


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
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        return build(arguments.build, arguments.images[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_sources(folder, max(arguments.images))
        size = sum((folder / "images" / f"{number}.jpg").stat().st_size for number in range(DISTINCT)) / DISTINCT
        print(f"images of 640 x 480, {size / 1000:.0f} KB on average, to 224 x 224; both variants in one pass")
        print("  images  images/s  of Pillow alone  card   peak memory (imports, texts read)  load_dataset, then again")
        for images in arguments.images:
            write_texts(folder, images)
            alone = pillow_alone(folder, min(images, 2000))
            seconds, card, base, read, peak = in_process(
                __file__, "--build", folder, "--images", images, home=folder / "hf"
            )
            first, again = (in_process("-c", LOAD, folder / f"data{images}", home=folder / "hf") for _ in range(2))
            print(
                f"{images:>8} {images / seconds:>9.0f} {images / seconds / alone:>16.2f} {card:>4.1f}s"
                f"   {peak:>6.0f} MiB ({base:.0f}, {read:.0f}){'':<15} {first:.2f}s {again:.2f}s"
            )
    return None


if __name__ == "__main__":
    main()

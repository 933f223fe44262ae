"""Measure the training script itself: in one process, from a stream, and in two processes with DDP.

`python benchmarks/launched.py --preset mini` makes images, builds a dataset from them, launches `training/train.py` in
each of the three ways, and prints the medians of the images/s that the runs log.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dataset import make_sources, write_texts

from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.devices import cpu_count

TRAINING = Path(__file__).parent.parent / "training"
IMAGES = 1000
WARM_UP_LINES = 2  # lines of metrics that are ignored
WAYS = {
    "one process, images decoded once": ("cpu.yaml", 1, ()),
    "one process, from a stream": ("cpu.yaml", 1, ("--streaming", "true")),
    "two processes, DDP through gloo": ("ddp.yaml", 2, ()),
}


def images_per_second(
    data: Path, out: Path, config: str, processes: int, options: tuple[str, ...], preset: str
) -> float:
    """Return the speed of a run of 40 steps of 32 images, which the processes share, as they share the cores."""
    cores = cpu_count()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", TRAINING / "accelerate" / config]
    command += [
        "--num_processes",
        processes,
        TRAINING / "train.py",
        "--config",
        TRAINING / "configs" / "mini_short.yaml",
    ]
    command += ["--dataset", data, "--output_dir", out, "--preset", preset, "--max_steps", 40, "--logging_steps", 5]
    command += ["--per_device_train_batch_size", 32 // processes, "--eval_steps", 1000, "--eval_samples", 8, *options]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        "HF_HOME": str(out.parent / "cache"),
    }
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return statistics.median(speeds[WARM_UP_LINES:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    preset = parser.parse_args().preset
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_sources(folder, IMAGES)
        write_texts(folder, IMAGES)
        data = folder / "data"
        build_dataset(folder / f"captions{IMAGES}.json", folder / f"texts{IMAGES}.jsonl", folder / "images", data)
        speed = {
            way: images_per_second(data, folder / f"run{place}", *how, preset)
            for place, (way, how) in enumerate(WAYS.items())
        }
    first = next(iter(speed.values()))
    print(f"{preset}, 32 images a step, {cpu_count()} cores")
    print(f"{'':<36} images/s   relative")
    for way, value in speed.items():
        print(f"{way:<36} {value:>8.1f}   {value / first:.2f}")


if __name__ == "__main__":
    main()

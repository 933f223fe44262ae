"""How long does `nanovlm complete` take on one photo, from nothing to text, against importing the libraries alone?

`python benchmarks/cold_start.py` runs both (and `nanovlm --help` against importing the package) in turns and prints the
medians.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

IMPORT = "import torch, transformers; from transformers import AutoModelForImageTextToText"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    nanovlm = Path(sys.executable).with_name("nanovlm")
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.jpg"
        pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photo)
        commands = {
            "python -c 'import torch, transformers; ...'": [sys.executable, "-c", IMPORT],
            "nanovlm complete photo.jpg": [nanovlm, "complete", photo, "--prefix", "There is a big"],
            "python -c 'import nanovlm_hf'": [sys.executable, "-c", "import nanovlm_hf"],
            "nanovlm --help": [nanovlm, "--help"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
                if number:  # the first round warms the disk's cache
                    seconds[name].append(time.perf_counter() - start)
    medians = [statistics.median(values) for values in seconds.values()]
    print(f"{'command':<46} {'seconds':>8} {'ratio':>6}")
    for place, (name, median) in enumerate(zip(commands, medians, strict=True)):
        reference = medians[place // 2 * 2]
        print(f"{name:<46} {median:>8.2f} {median / reference:>6.2f}")


if __name__ == "__main__":
    main()

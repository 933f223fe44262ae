"""Compare the time of `nanovlm complete` in a new process with that of importing the libraries alone.

`python benchmarks/cold_start.py` runs both and the steps between them alternately, and the completion of an exported
model, and prints the medians. Both completions are greedy. It needs the extra `onnx`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version as installed_version
from pathlib import Path

import numpy as np
from PIL import Image
from timing import median_seconds

IMPORT = "import torch, transformers; from transformers import AutoModelForImageTextToText"
# Every Transformers model needs this import; version 5 delays it until a model is loaded.
IMPORT_MODEL = f"{IMPORT}, PreTrainedModel"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    nanovlm = Path(sys.executable).with_name("nanovlm")
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.jpg"
        pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photo)
        exported = Path(folder) / "onnx"
        subprocess.run([nanovlm, "export", "mini-short", "--out", exported], check=True, stdout=subprocess.DEVNULL)
        options = [photo, "--prefix", "There is a big", "--num-beams", "1"]
        commands = {
            "import torch, transformers, an Auto class": [sys.executable, "-c", IMPORT],
            "the same and PreTrainedModel": [sys.executable, "-c", IMPORT_MODEL],
            "import nanovlm_hf": [sys.executable, "-c", "import nanovlm_hf"],
            "nanovlm --help": [nanovlm, "--help"],
            "nanovlm complete photo.jpg": [nanovlm, "complete", *options],
            "the same, exported to ONNX": [nanovlm, "complete", *options, "--model", exported],
        }

        def runner(command: list) -> Callable[[int], object]:
            return lambda number: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

        # The first round fills the disk cache.
        medians = median_seconds({name: runner(command) for name, command in commands.items()}, rounds, warm_up=1)
    reference, with_model = list(medians.values())[:2]
    print(f"Transformers {installed_version('transformers')}, median of {rounds}")
    print(f"{'command':<44} {'seconds':>8} {'vs. first':>13} {'vs. second':>14}")
    for name, median in medians.items():
        print(f"{name:<44} {median:>8.2f} {median / reference:>12.2f}x {median / with_model:>13.2f}x")


if __name__ == "__main__":
    main()

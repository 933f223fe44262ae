"""Training runs on the toy dataset: launched as a user would, and what a run leaves behind."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "training" / "configs" / "mini_short.yaml"
SCRIPT = ROOT / "training" / "train.py"
# A step takes a tenth of mini's time, long enough to kill a run between two steps.
SMALL = {"n_blks": 1, "n_layer": 2, "n_head": 8, "head_size": 8, "img_embd_dim": 128}


def command(
    toy: Path, out: Path, processes: int = 1, config: str | None = None, script: Path = SCRIPT, **fields
) -> list[str]:
    """Return `accelerate launch training/train.py` on the toy dataset, with a configuration of training/accelerate.

    The model has the sizes of `SMALL` unless the fields give others.
    """
    config = config or ("ddp.yaml" if processes > 1 else "cpu.yaml")
    fields = {
        "dataset": toy / "data",
        "tokenizer": toy / "tokenizer",
        "output_dir": out,
        "per_device_train_batch_size": 8,
        "warmup_steps": 5,
        "logging_steps": 1,
        **SMALL,
        **fields,
    }
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    launcher = ["--config_file", ROOT / "training" / "accelerate" / config]
    launcher += ["--num_processes", processes, "--main_process_port", 0] if config != "cpu.yaml" else []
    whole = [sys.executable, "-m", "accelerate.commands.launch", *launcher, script, "--config", CONFIG, *options]
    return list(map(str, whole))


def alone(toy: Path, out: Path, **fields) -> list[str]:
    """Return the command of the script without its launcher, which handles signals itself."""
    whole = command(toy, out, **fields)
    return [sys.executable, *whole[whole.index(str(SCRIPT)) :]]


def fields_of(toy: Path, out: Path, **fields) -> list[str]:
    """Return the arguments that the script is launched with, for a run in this process."""
    return alone(toy, out, **fields)[2:]


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def launch(*args, **fields) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*args, **fields), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


MEASURED = ("step", "train_loss", "eval_loss", "grounding_gap", "grad_norm", "learning_rate")


def measured(folder: Path) -> list[tuple]:
    return [tuple(row.get(name) for name in MEASURED) for row in metrics(folder)]


def weights(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest() for name in ("last", "best")]


def toy_options(toy, out):
    dataset = ("--dataset", toy / "data", "--tokenizer", toy / "tokenizer", "--output_dir", out)
    return (*dataset, "--per_device_train_batch_size", 8, "--mixed_precision", "no")


def small_options(toy, out):
    """Return options of a run whose model has the sizes of `SMALL`."""
    return (*toy_options(toy, out), *(text for name, value in SMALL.items() for text in (f"--{name}", value)))


def tiny_options(toy, out):
    """Return options of a run whose model has 37,000 parameters, so that a step takes milliseconds."""
    sizes = ("--n_blks", 1, "--n_layer", 1, "--n_head", 4, "--head_size", 4, "--img_embd_dim", 16)
    return (*toy_options(toy, out), *sizes, "--eval_samples", 4)


class Payload:
    """A malicious object: unpickling it creates a file."""

    def __init__(self, path: Path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)

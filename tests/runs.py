"""Trainings of the toy dataset: the script launched as a user would, and what a run left behind."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "training" / "configs" / "mini_short.yaml"
SCRIPT = ROOT / "training" / "train.py"


def command(
    toy: Path, out: Path, processes: int = 1, config: str | None = None, script: Path = SCRIPT, **fields
) -> list[str]:
    """`accelerate launch training/train.py` on the toy dataset, with a launcher's configuration that ships."""
    config = config or ("ddp.yaml" if processes > 1 else "cpu.yaml")
    fields = {
        "dataset": toy / "data",
        "tokenizer": toy / "tokenizer",
        "output_dir": out,
        "per_device_train_batch_size": 8,
        "warmup_steps": 5,
        "logging_steps": 1,
        **fields,
    }
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    launcher = ["--config_file", ROOT / "training" / "accelerate" / config]
    launcher += ["--num_processes", processes, "--main_process_port", 0] if config != "cpu.yaml" else []
    whole = [sys.executable, "-m", "accelerate.commands.launch", *launcher, script, "--config", CONFIG, *options]
    return list(map(str, whole))


def launch(*args, **fields) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*args, **fields), capture_output=True, text=True)
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

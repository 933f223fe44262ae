"""Run provenance: fields, package versions, data, hardware and commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..devices import cpu_count
from .arguments import RunArguments
from .data import Splits

PACKAGES = ("nanovlm-hf", "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


def describe_run(arguments: RunArguments, splits: Splits, accelerator: Accelerator) -> dict[str, Any]:
    """Return the content of `training_args.yaml`: the fields, the data, the hardware and the versions of a run."""
    return {
        "arguments": asdict(arguments),
        "data": {"train": splits["train"].identity(), "validation": splits["validation"].identity()},
        "processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type.value),
        "device": device_name(accelerator.device),
        "mixed_precision": accelerator.mixed_precision,  # the value that `auto` resolves to
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the number of cores and the name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = cpu_count()
    return f"{cores} {'core' if cores == 1 else 'cores'} of {_cpu_name()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _git_commit() -> str | None:
    """Return the commit of the code, with a plus if tracked files have changed since; None outside a clone."""
    file = Path(__file__)

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", file.parent, *words], capture_output=True, text=True)
        except OSError:  # git is not installed
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not git("ls-files", file.name):  # an installed package may lie in the folder of another repository
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")) or None

"""Run the commands on mutated checkpoints: each ends with one line, in limited time and memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanovlm_hf import SHIPPED

from helpers.models import random_image

SEED = int(os.environ.get("NANOVLM_FUZZ_SEED", "1"))
CASES = int(os.environ.get("NANOVLM_FUZZ_CASES", "50"))


@pytest.mark.slow
def test_commands_on_mutated_checkpoints(saved, toy, tmp_path):
    whole, work = tmp_path / "whole", tmp_path / "work"
    shutil.copytree(saved, whole)
    work.mkdir()
    random_image().save(whole / "photo.png")
    # `push` needs a card and metrics.
    for name in ("README.md", "metrics.json"):
        shutil.copy(SHIPPED["mini-short"] / name, whole / name)
    command = [sys.executable, "-m", "helpers.odd_checkpoints", whole, str(SEED), str(CASES), work, toy / "data"]
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, **pipes, cwd=Path(__file__).parent, timeout=1800)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-3000:]
    assert "panicked" not in done.stderr, done.stderr[-3000:]
    assert lines[-1]["cases"] == CASES
    assert lines[:-1] == []

"""The benchmarks of training still fit the code that they measure."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_training_step_is_compared():
    command = [sys.executable, BENCHMARKS / "training_step.py", "--batch-size", "2", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plain" in done.stdout

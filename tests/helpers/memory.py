"""The peak memory of a process: `VmHWM`, because the kernel's `ru_maxrss` includes that of its parent."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
NOTING = """
import atexit, sys
from helpers.memory import peak_mib
atexit.register(lambda: print(peak_mib(), file=sys.stderr))
"""


def peak_mib() -> int:
    """Return the peak resident memory of this process in MiB."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) >> 10


def measured(script: str, *arguments, seconds: int = 300) -> tuple[int, str, str, int]:
    """Run Python code in a subprocess; return exit code, output, errors and peak resident memory in MiB."""
    command = [sys.executable, "-c", NOTING + script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    *errors, peak = done.stderr.splitlines()
    return done.returncode, done.stdout, "\n".join(errors), int(peak)

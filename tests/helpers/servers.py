"""Starting the test servers as processes of their own, on ports that nobody else has."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

HELPERS = Path(__file__).parent


class RunningServer:
    def __init__(self, port: int, log: Path):
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def entries(self) -> list[dict]:
        """What the server has logged so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextmanager
def serve(script: str, folder: Path, *options: str):
    """Runs `tests/helpers/SCRIPT PORT_FILE LOG [options]` until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    port_file, log = folder / "port", folder / "log.jsonl"
    log.touch()
    process = subprocess.Popen(
        [sys.executable, HELPERS / script, port_file, log, *options],
        env=os.environ | {"PYTHONPATH": str(HELPERS.parent)},
    )
    try:
        deadline = time.monotonic() + 300
        while not port_file.exists():
            assert process.poll() is None, f"{script} ended at once"
            assert time.monotonic() < deadline, f"{script} does not start"
            time.sleep(0.05)
        yield RunningServer(int(port_file.read_text()), log)
    finally:
        process.kill()
        process.wait()

"""Processes that use the test server as the Hub, whose address is read when huggingface_hub is imported."""

import json
import os
import subprocess
import sys

COMMANDS = """
import contextlib, io, json, os, sys
from nanovlm_hf import cli
for token, arguments in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    sys.argv = ["nanovlm", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def online(hub, home, token="hf_write", **more):
    """Return the environment of a process that uses the test server as the Hub, with plain uploads instead of Xet."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | more
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("HF_TOKEN", None)
    return environment | ({"HF_TOKEN": token} if token else {})


def run_commands(hub, home, *commands: tuple[str | None, list[str]]) -> list[subprocess.CompletedProcess]:
    """Run `nanovlm` several times in one process, each time with a token (or None) and arguments."""
    commands = [(token, list(map(str, arguments))) for token, arguments in commands]
    call = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(call, env=online(hub, home, token=None), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = [subprocess.CompletedProcess(call, *json.loads(line)) for line in done.stdout.splitlines()]
    assert len(results) == len(commands)
    for result in results:
        assert "hf_" not in result.stdout + result.stderr, "a token is never printed"
        assert "Traceback" not in result.stderr, result.stderr
    return results

"""Errors of trackers and networks are reported as such, not as a full disk."""

import errno
import socket
from pathlib import Path

import pytest
import requests
from accelerate.tracking import TensorBoardTracker

from nanovlm_hf.training.failures import is_of_disk

from helpers.runs import tiny_options


def raised(call):
    try:
        call()
    except OSError as error:
        return error
    raise AssertionError("no error")


def test_disk_errors_are_distinguished_from_network_errors(tmp_path):
    """All of these are OSErrors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    network = [
        raised(lambda: requests.get(f"http://127.0.0.1:{port}/", timeout=5)),
        raised(lambda: socket.create_connection(("127.0.0.1", port), timeout=5)),
        raised(lambda: socket.getaddrinfo("nowhere.invalid", 80)),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
    ]
    elsewhere = [raised(lambda: Path("/nowhere/else").read_text())]
    run = tmp_path / "run"
    disk = [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("I/O error: No space left on device"),  # of safetensors
        PermissionError(errno.EACCES, "Permission denied", str(run / "metrics.jsonl")),
        raised(lambda: (run / "states" / "none").read_text()),
    ]
    assert [is_of_disk(error, run) for error in (*network, *elsewhere)] == [False] * 5
    assert [is_of_disk(error, run) for error in disk] == [True] * 5


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_named(train, tmp_path, toy, monkeypatch, method):
    def fail(*args, **kwargs):
        raise requests.ConnectionError("api.wandb.ai: name resolution failed\nand more")

    monkeypatch.setattr(TensorBoardTracker, method, fail)
    options = ("--max_steps", 1, "--eval_samples", 2, "--trackers", "tensorboard")
    code, errors = train(*tiny_options(toy, tmp_path / "run"), *options)
    assert code == 1
    assert "nanovlm_hf.training: trackers: ConnectionError (api.wandb.ai: name resolution failed): fix it, or" in errors
    assert "Traceback" not in errors
    assert "cannot be written" not in errors


def test_a_tracker_that_is_not_installed_is_named(train, tmp_path, toy):
    code, errors = train(*tiny_options(toy, tmp_path / "run"), "--trackers", "tensorboard", "comet_ml")
    assert code == 1
    assert "nanovlm_hf.training: trackers: comet_ml is not installed: install it, or leave it out" in errors

"""Fixtures made by code: a tokenizer, tiny models and pictures."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile

# Before anything of Hugging Face is imported: no test may need the network, or fill or read the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nanovlm-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # several threads each would wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"  # not `setdefault`: the controller, which also runs this file, has set it to 2
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

from pathlib import Path

import pytest

from nanovlm_hf import cli
from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.data.tokenizer import train_tokenizer, train_tokenizer_on

from helpers.models import SENTENCES, STRATEGIES, random_image, tiny_model, tiny_processor
from helpers.servers import serve
from helpers.toy_data import write_sources


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(SENTENCES, vocab_size=320)


@pytest.fixture(params=STRATEGIES)
def strategy(request) -> str:
    return request.param


@pytest.fixture
def model(strategy):
    return tiny_model(strategy)


@pytest.fixture
def processor(tokenizer, strategy):
    return tiny_processor(tokenizer, strategy)


@pytest.fixture
def inputs(processor):
    """A left-padded batch of three pictures with prefixes of different lengths."""
    texts = ["There is a big", "A", "There is a big red ball. It"]
    return processor(images=[random_image(seed) for seed in range(3)], text=texts, return_tensors="pt")


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer) -> Path:
    """A folder with a tiny model and its processor."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process: exit code, lines of the output, lines of the errors."""

    def call(*arguments) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["nanovlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return stop.value.code, printed.out.splitlines(), printed.err.splitlines()

    return call


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a tmpfs of a size; the test is skipped where mounting is not allowed."""
    disk = tmp_path / "disk"

    def make(size: str) -> Path:
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        return disk

    yield make
    subprocess.run(["umount", "--lazy", disk], capture_output=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A folder with `data`, a dataset of coloured squares, and `tokenizer`."""
    folder = tmp_path_factory.mktemp("toy")
    sources = write_sources(folder / "sources", photos=160)
    build_dataset(sources / "captions.json", sources / "descriptions.jsonl", sources / "images", folder / "data")
    train_tokenizer_on(str(folder / "data"), vocab_size=312).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one state a process, which other tests set."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train(capsys, monkeypatch, fresh_accelerate):
    """Runs train.py in this process: exit code and the errors."""
    from nanovlm_hf.training import __main__ as script

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            code = script.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def hub(tmp_path):
    with serve("hub_server.py", tmp_path / "hub") as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A chat model's API that misbehaves on demand."""
    with serve("chat_server.py", tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def api_key(monkeypatch):
    """What a chat model's client finds in the environment."""
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-secret")

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
os.environ.setdefault("OMP_NUM_THREADS", "2")

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from servers import serve
from toy_data import write_sources

from nanovlm_hf import NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMImageProcessor, NanoVLMProcessor, cli
from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.data.tokenizer import train_tokenizer, train_tokenizer_on

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200), "yellow": (220, 210, 40)}
SENTENCES = [
    "A little boy and his mother walk through the green grass to see the water.",
    "Two brown birds sit together under an old tree, waiting for their breakfast.",
    *(
        f"There is a big {colour} {thing}. It looks so {feeling}!"
        for colour in COLOURS
        for thing in ("ball", "kite", "bus", "dog", "castle", "flower", "mountain")
        for feeling in ("happy", "shiny", "soft", "funny", "warm")
    ),
]
STRATEGIES = ("cls", "patch", "full")


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(SENTENCES, vocab_size=320)


def tiny_config(strategy: str = "cls", **kwargs) -> NanoVLMConfig:
    """Two blocks a tower on 32 x 32 pixels (4 patches), no dropout, and weights large enough to have opinions."""
    image_tokens = {"cls": 1, "patch": 4, "full": 5}[strategy]
    return NanoVLMConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "hidden_dropout": 0.0,
        },
        text_config={
            "vocab_size": 320,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 47 + image_tokens,
            "hidden_dropout": 0.0,
            "initializer_range": 0.3,
        },
        vision_feature_select_strategy=strategy,
        **kwargs,
    )


def tiny_model(strategy: str = "cls", **kwargs) -> NanoVLMForConditionalGeneration:
    torch.manual_seed(0)
    return NanoVLMForConditionalGeneration(tiny_config(strategy, **kwargs)).eval()


def tiny_processor(tokenizer, strategy: str = "cls") -> NanoVLMProcessor:
    image_processor = NanoVLMImageProcessor(size={"height": 32, "width": 32})
    return NanoVLMProcessor(image_processor, tokenizer, image_seq_length=tiny_config(strategy).image_seq_length)


def picture(seed: int = 0, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode=mode) if mode == "CMYK" else Image.fromarray(pixels.squeeze())


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
    return processor(images=[picture(seed) for seed in range(3)], text=texts, return_tensors="pt")


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


def only_line(errors: list[str]) -> str:
    assert len(errors) == 1, errors
    assert errors[0].startswith("nanovlm: ")
    return errors[0]


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
    import train as script

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            code = script.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


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

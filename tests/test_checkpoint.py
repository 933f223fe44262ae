"""The checkpoint that ships inside the package."""

import json
import re
from pathlib import Path

import pytest
import torch
from matplotlib import get_data_path
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from nanovlm_hf import NanoVLMConfig
from nanovlm_hf.checkpoints import PACKAGED

FOLDER = PACKAGED["mini-short"]
PORTRAIT = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)


def test_it_is_the_papers_mini(shipped):
    model, _ = shipped
    assert model.config.parameter_counts() == NanoVLMConfig.from_preset("mini").parameter_counts()
    assert model.config.vision_feature_select_strategy == "cls"


def test_it_is_small_safe_and_without_code():
    names = {path.name for path in FOLDER.iterdir()}
    assert (FOLDER / "model.safetensors").stat().st_size < 12_000_000
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt", ".pkl"))]
    assert "auto_map" not in (FOLDER / "config.json").read_text()


def test_half_precision_on_disk_is_float32_in_memory_on_every_version(shipped):
    from safetensors.torch import load_file

    model, _ = shipped
    assert model.dtype == torch.float32
    assert {weight.dtype for weight in load_file(FOLDER / "model.safetensors").values()} == {torch.float16}


def test_it_says_the_same_on_every_version(shipped):
    """The logits were recorded with Transformers 4.57.6."""
    model, processor = shipped
    inputs = processor(images=Image.open(PORTRAIT), text="There is a big", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    recorded = json.loads((Path(__file__).parent / "shipped_logits.json").read_text())
    torch.testing.assert_close(logits[: len(recorded)], torch.tensor(recorded), atol=1e-3, rtol=0)


def test_it_completes_a_real_photo_and_looks_at_it(shipped):
    model, processor = shipped
    blank = Image.new("RGB", (224, 224), (124, 116, 104))
    inputs = processor(images=[Image.open(PORTRAIT), blank], text=["", ""], return_tensors="pt")
    texts = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    for text in texts:
        assert re.fullmatch(r"[A-Z].*[.!?]", text), text
        assert 10 <= len(text.split()) <= 40
    assert texts[0] != texts[1]
    assert re.search(r"\b(man|woman|boy|girl|person|people|lady|child|he|she)\b", texts[0], re.IGNORECASE), texts[0]


def test_the_cards_numbers_are_the_metrics():
    metrics = json.loads((FOLDER / "metrics.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert metrics["grounding_gap"] > 10 * metrics["grounding_gap_stderr"] > 0
    for name in ("eval_loss", "eval_loss_wrong_photo", "grounding_gap", "grounding_gap_stderr", "train_loss"):
        assert f"{metrics[name]:.3f}" in card
    counts = NanoVLMConfig.from_pretrained(FOLDER).parameter_counts()
    assert f"{counts['total'] / 1e6:.1f}M parameters" in card.replace("\n", " ")


def test_the_readmes_numbers_are_the_metrics():
    metrics = json.loads((FOLDER / "metrics.json").read_text())
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for name in ("eval_loss", "eval_loss_wrong_photo", "grounding_gap"):
        assert f"{metrics[name]:.3f}" in readme, name


def test_no_path_of_the_machine_that_trained_it():
    for path in FOLDER.glob("*.json"):
        if path.name != "tokenizer.json":
            assert not re.search(r'"/(home|root|tmp|work|Users)/', path.read_text()), path.name

"""The released checkpoints and their cards."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from matplotlib import get_data_path
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from nanovlm_hf import SHIPPED, NanoVLMConfig
from nanovlm_hf.hub.model_card import card
from nanovlm_hf.hub.model_metadata import METRICS, eval_results

ROOT = Path(__file__).parent.parent
PORTRAIT = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"
FOLDERS = pytest.mark.parametrize("folder", SHIPPED.values(), ids=SHIPPED.keys())


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=SHIPPED.values(), ids=SHIPPED.keys())
def shipped(request):
    folder = request.param
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return folder, model, AutoProcessor.from_pretrained(folder)


def test_mini_is_in_the_package():
    assert {"mini-short", "mini-long"} <= set(SHIPPED)
    for name in ("mini-short", "mini-long"):
        assert SHIPPED[name].parent == ROOT / "nanovlm_hf" / "checkpoints"


def test_sizes_are_those_of_the_paper(shipped):
    folder, model, _ = shipped
    preset = NanoVLMConfig.from_preset(folder.name.split("-")[0])
    assert model.config.parameter_counts() == preset.parameter_counts()
    assert model.config.vision_feature_select_strategy == "cls"


@FOLDERS
def test_files_are_small_and_without_code(folder):
    names = {path.name for path in folder.iterdir()}
    assert max(path.stat().st_size for path in folder.iterdir()) < 16_000_000
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt", ".pkl"))]
    assert "auto_map" not in (folder / "config.json").read_text()
    assert {"training_args.yaml", "metrics.json", "metrics.jsonl", "evaluation.json", "loss.png"} <= names


def test_half_precision_files_load_as_float32(shipped):
    folder, model, _ = shipped
    assert model.dtype == torch.float32
    weights = [weight for path in folder.glob("*.safetensors") for weight in load_file(path).values()]
    assert {weight.dtype for weight in weights} == {torch.float16}


def test_logits_are_the_same_on_every_version(shipped):
    """The logits were recorded with Transformers 4.57.6."""
    folder, model, processor = shipped
    inputs = processor(images=Image.open(PORTRAIT), text="There is a big", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    recorded = read(Path(__file__).parent / "shipped_logits.json")[folder.name]
    torch.testing.assert_close(logits[: len(recorded)], torch.tensor(recorded), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_completions_of_a_photo_and_a_blank_image_differ(shipped):
    folder, model, processor = shipped
    blank = Image.new("RGB", (224, 224), (124, 116, 104))
    inputs = processor(images=[Image.open(PORTRAIT), blank], text=["", ""], return_tensors="pt")
    texts = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    fewest, most = (10, 40) if folder.name.endswith("short") else (40, 90)
    for text in texts:
        assert re.fullmatch(r"[A-Z].*[.!?]", text), text
        assert fewest <= len(text.split()) <= most
    assert texts[0] != texts[1]
    assert re.search(r"\b(man|woman|boy|girl|person|people|lady|child|he|she)\b", texts[0], re.IGNORECASE), texts[0]


@pytest.mark.slow
def test_a_prefix_of_the_other_variant_does_not_change_the_length(shipped):
    """Models are pre-trained on both variants: 'There is a' is typical of LongDesc, a dog of ShortDesc."""
    folder, model, processor = shipped
    short = folder.name.endswith("short")
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(256, (16, 3, 4, 4), generator=generator, dtype=torch.uint8)
    images = [Image.fromarray(one.permute(1, 2, 0).numpy()).resize((224, 224)) for one in colours]
    prefix = "There is a" if short else "A brown dog runs"
    inputs = processor(images=images, text=[prefix] * len(images), return_tensors="pt")
    words = [len(text.split()) for text in processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)]
    wrong_length = sum((count > 40) == short for count in words)
    assert wrong_length <= len(words) // 4, words


@FOLDERS
def test_the_card_agrees_with_the_files(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert card(folder) == text, "write it again: python -m nanovlm_hf.hub.model_card CHECKPOINT"
    metrics, evaluation = read(folder / "metrics.json"), read(folder / "evaluation.json")
    for name in ("eval_loss", "eval_loss_wrong_photo", "grounding_gap", "grounding_gap_stderr"):
        assert f"{metrics[name]:.3f}" in text
    assert (f"| {metrics.get('train_loss', 0):.3f} |" in text) == ("train_loss" in metrics)
    assert f"{evaluation['grounding']['grounding_gap_low']:.3f}" in text
    assert f"{evaluation['in_domain']['originality']['rouge1_nearest']:.3f}" in text
    counts = NanoVLMConfig.from_pretrained(folder).parameter_counts()
    assert f"{counts['total'] / 1e6:.1f}M parameters" in text.replace("\n", " ")


@FOLDERS
def test_the_card_metadata_are_valid_on_the_hub(folder):
    data = ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-text-to-text", "apache-2.0")
    assert data.datasets == ["ShortDesc" if folder.name.endswith("short") else "LongDesc"]
    assert {result.unique_identifier for result in data.eval_results} == {
        result.unique_identifier for result in eval_results(folder)
    }
    reported = {result.metric_type: result.metric_value for result in data.eval_results}
    metrics = read(folder / "metrics.json")
    assert {name: reported[name] for name in METRICS} == {name: round(metrics[name], 4) for name in METRICS}
    assert len(reported) == 6
    assert data.co2_eq_emissions["emissions"] > 0


@FOLDERS
def test_the_evaluation_belongs_to_the_weights_and_has_a_grounding_gap(folder):
    from nanovlm_hf.evaluation.fingerprints import weights_hash
    from nanovlm_hf.evaluation.generators import load_generator

    metrics, evaluation = read(folder / "metrics.json"), read(folder / "evaluation.json")
    assert metrics["grounding_gap"] > 10 * metrics["grounding_gap_stderr"] > 0
    assert evaluation["grounding"]["grounding_gap_low"] > 0
    assert evaluation["in_domain"]["weights"] == weights_hash(load_generator(folder.name).model)
    assert evaluation["variant"] == folder.name.split("-")[1]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert min(row["eval_loss"] for row in rows if "eval_loss" in row) == metrics["eval_loss"]


def test_the_readme_states_the_metrics():
    readme = (ROOT / "README.md").read_text()
    for name, folder in SHIPPED.items():
        measured = read(folder / "evaluation.json")
        row = next(line for line in readme.splitlines() if line.startswith(f"| [{name}]"))
        for metric in ("eval_loss", "grounding_gap"):
            assert f"{measured['grounding'][metric]:.3f}" in row, (name, metric)
        shares = (measured["in_domain"]["mentions"]["precision"], measured["grounding"]["retrieval"]["32"]["r_at_1"])
        for share in shares:
            assert f"{share['mean']:.0%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]" in row, name


@FOLDERS
def test_files_hold_no_local_paths(folder):
    for path in [*folder.glob("*.json"), *folder.glob("*.yaml"), folder / "README.md"]:
        if path.name != "tokenizer.json":
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", path.read_text()), path.name
    record = yaml.safe_load((folder / "training_args.yaml").read_text())
    assert record["arguments"]["output_dir"].startswith("runs/")

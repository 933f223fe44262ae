"""Metadata of a model card on the Hub: a checkpoint's metrics, and the check that its card states them."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard

from ..data.sources import ORIGINS
from ..errors import InputError, first_line
from ..files import check_line_breaks, read_json, read_text, validate

# Titles of the fields of `metrics.json`, and of `evaluation.json` if a checkpoint has one, in a card's metadata. A card
# also lists those of METRICS, and omits one that is not in REQUIRED if the checkpoint is older than the metric.
METRICS = {
    "eval_loss": "Validation loss (nats per token)",
    "eval_loss_wrong_photo": "Validation loss with a mismatched image (nats per token)",
    "grounding_gap": "Grounding gap (nats per token)",
}
REQUIRED = ("eval_loss", "eval_loss_wrong_photo", "grounding_gap")
RETRIEVAL = ("grounding", "retrieval", "32", "r_at_1")
EVALUATED = {
    "r_at_1_of_32": ("Retrieval, R@1 of 32 descriptions", (*RETRIEVAL, "mean")),
    "object_precision": ("Object precision", ("in_domain", "mentions", "precision", "mean")),
    "rouge1_nearest": ("ROUGE-1 to the nearest training text", ("in_domain", "originality", "rouge1_nearest")),
}
OLD_NAMES = {"things_precision": "object_precision"}  # of metrics, in cards of older versions
# What an evaluation's descriptions were written from, after "images".
DESCRIBED = {
    "captions": "whose descriptions were written from captions",
    "image": "whose descriptions were written from the image",
}
REMEDY = "write it with `python -m nanovlm_hf.hub.model_card`"
MAX_METRIC = 1e9  # losses, shares and ROUGE are far below
MAX_METADATA = 200_000  # characters
MAX_BRACKETS = 1_000  # `[` and `{`: PyYAML's time grows with the square of their nesting


class _Images(NamedTuple):
    """Images of a result. The Hub tells them apart by `config` and `split`, not by their name."""

    name: str
    config: str
    split: str


_TRAINING = _Images("validation images of the training", "training", "validation")


def eval_results(folder: Path) -> list[EvalResult]:
    """Return a checkpoint's metrics in the form of the Hub's model-index, rounded to four digits.

    Raises:
        InputError: if a metric is missing, or is not a finite number.
    """
    metrics = _read_numbers(folder / "metrics.json")
    found = []
    for name, title in METRICS.items():
        value = _number(metrics, (name,))
        if value is None and name not in REQUIRED and name not in metrics:
            continue
        if value is None:
            raise InputError(f"{folder.name}: metrics.json: {name} is missing or is not a number: write the file again")
        found.append((_TRAINING, name, title, value))
    if (folder / "evaluation.json").exists():
        evaluation = _read_numbers(folder / "evaluation.json")
        where = f"{folder.name}: evaluation.json"
        origin = written_from(evaluation, where)
        for keys in (("grounding", "photos"), ("items",)):  # which the card states
            _needed(evaluation, keys, where)
        numbers = {"grounding": (*RETRIEVAL, "items"), "in_domain": ("items",)}
        splits = {"grounding": "validation", "in_domain": "test"}
        for name, (title, keys) in EVALUATED.items():
            if _value(evaluation, keys) is not None:  # as object precision is for a dataset without human captions
                number = _needed(evaluation, numbers[keys[0]], where)
                images = _evaluated(number, splits[keys[0]], origin)
                found.append((images, name, title, _needed(evaluation, keys, where)))
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="nanovlm_hf",
            dataset_name=f"{images.name}, see the card",
            dataset_config=images.config,
            dataset_split=images.split,
            metric_type=name,
            metric_name=title,
            metric_value=round(value, 4),
        )
        for images, name, title, value in found
    ]


def written_from(evaluation: dict[str, Any], where: str) -> str | None:
    """Return what the descriptions of an evaluation were written from, `captions` or `image`; None for any.

    Raises:
        InputError: if it is neither.
    """
    origin = evaluation.get("written_from")
    if origin not in (None, *ORIGINS):
        raise InputError(f"{where}: written_from: choose {' or '.join(ORIGINS)}")
    return origin


def _evaluated(number: float, split: str, origin: str | None) -> _Images:
    """Return the images of one split that an evaluation used."""
    name = f"{number:,} {split} images {'of the evaluation' if origin is None else DESCRIBED[origin]}"
    return _Images(name, "evaluate", split)


def _needed(evaluation: dict[str, Any], keys: tuple[str, ...], where: str) -> float:
    value = _number(evaluation, keys)
    if value is None:
        raise InputError(f"{where}: {'.'.join(keys)} is missing or is not a number: evaluate it again")
    return value


def _read_numbers(path: Path) -> dict[str, Any]:
    """Read a JSON object without NaN and infinity, which other programs may not read."""
    where = f"{path.parent.name}: {path.name}"
    content = validate(read_json(path), dict[str, Any], where)
    if not _is_finite(content):
        raise InputError(f"{where} contains a number that is NaN or infinite: measure it again")
    return content


def _is_finite(content: Any) -> bool:
    if isinstance(content, dict):
        return all(map(_is_finite, content.values()))
    if isinstance(content, list):
        return all(map(_is_finite, content))
    return not isinstance(content, float) or math.isfinite(content)


def _number(content: Any, keys: tuple[str, ...]) -> float | None:
    value = _value(content, keys)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < MAX_METRIC else None


def _value(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def hub_card(source: Path, repo_id: str, code: bool = True, onnx: bool = False) -> str:
    """Return a checkpoint's card with the repository's name in its example and metadata.

    Args:
        code: whether the repository holds the code; the example then runs without this package.
        onnx: whether it holds an export to `onnx/`; the card then has an example in JavaScript.

    Raises:
        InputError: if the card is not a model card, or does not state the metrics of the checkpoint's files.
    """
    text = re.sub(r"\r\n?", "\n", read_text(source / "README.md"))
    where = f"{source.name}: README.md"
    _check_metadata(text, where)
    results, metrics = eval_results(source), read_json(source / "metrics.json")
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
        results_in_card = card.data.eval_results or []
        stated = {OLD_NAMES.get(one.metric_type, one.metric_type): one.metric_value for one in results_in_card}
    except Exception as error:  # huggingface_hub raises many errors, as it expects metadata of the right shape
        raise InputError(f"{where}: its metadata is not that of a model card ({first_line(error)})") from None
    for result in results:
        name, value = result.metric_type, result.metric_value
        if stated.get(name) != value or (name in METRICS and f"| {metrics[name]:.3f}" not in card.text):
            raise InputError(f"{where} does not state that {name} is {value}: {REMEDY}")
    namespace, card.data.model_name = repo_id.split("/")
    datasets = validate(card.data.datasets, list[str] | str | None, f"{where}: datasets") or []
    datasets = [datasets] if isinstance(datasets, str) else datasets
    card.data.datasets = [name if "/" in name else f"{namespace}/{name}" for name in datasets] or None
    if isinstance(card.data.base_model, str) and "/" not in card.data.base_model:
        card.data.base_model = None  # a short name of this package, which the Hub does not know
    card.text = re.sub(r"^folder = .*$", f'folder = "{repo_id}"', card.text, count=1, flags=re.MULTILINE)
    if code:
        card.text = card.text.replace("\nimport nanovlm_hf\n", "\n", 1)
        card.text = card.text.replace("pip install nanovlm-hf ", "pip install ", 1)
        card.text = card.text.replace(".from_pretrained(folder)", ".from_pretrained(folder, trust_remote_code=True)")
        card.text = re.sub(
            r"^If its repository includes the code [^\0]*?\n\n", "", card.text, count=1, flags=re.MULTILINE
        )
    if onnx:
        tags = validate(card.data.tags, list[str] | None, f"{where}: tags") or []
        card.data.tags = [*tags, *(tag for tag in ("onnx", "transformers.js") if tag not in tags)]
        example = files("nanovlm_hf.hub_cards").joinpath("model_card_onnx.md").read_text(encoding="utf-8")
        before, heading, after = card.text.partition("\n## Intended uses")
        card.text = f"{before}\n{example.replace('REPO_ID', repo_id).rstrip()}\n{heading}{after}"
    try:
        return str(card)
    except Exception as error:
        raise InputError(f"{where}: its metadata cannot be written ({first_line(error)})") from None


def _check_metadata(text: str, where: str) -> None:
    """Check that a card has metadata, without YAML aliases, which can make a short text expand endlessly."""
    check_line_breaks(text, where)
    block = re.match(r"---\n(.*?)\n---(?:\n|$)", text, re.DOTALL)
    if block is None or len(block[1]) > MAX_METADATA or len(re.findall(r"[\[{]", block[1])) > MAX_BRACKETS:
        raise InputError(f"{where} does not begin with metadata between two lines of ---: {REMEDY}")
    try:
        aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(block[1], Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{where}: its metadata is not YAML ({first_line(error)})") from None
    if aliases:
        raise InputError(f"{where}: its metadata contains a YAML alias (*): write out the value")

"""The model card of a run: its numbers out of the run's own files."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from arguments import TrainingArguments, read_arguments
from run_folder import RunFolder

from nanovlm_hf import NanoVLMConfig

CONFIGS = Path(__file__).parent / "configs"


def best_metrics(run: RunFolder) -> dict[str, Any]:
    """The evaluation of the best model, with the training loss and the epoch at that step."""
    rows = run.rows()
    best = min((row for row in rows if "eval_loss" in row), key=lambda row: row["eval_loss"])
    steps = [row for row in rows if "train_loss" in row]
    at_best = [row for row in steps if row["step"] <= best["step"]] or steps[:1]
    return best | {"train_loss": at_best[-1]["train_loss"], "epoch": at_best[-1]["epoch"]}


def card(name: str, load_from: str, config: NanoVLMConfig, run: RunFolder, data: str | None = None) -> str:
    """Fills `hub_cards/model_card.md`.

    Args:
        name: of the model.
        load_from: Python code for its address.
        config: of the model.
        run: with `run.yaml` and metrics.
        data: Markdown: what it was trained on; the numbers of photos if not given.
    """
    record = run.description()
    arguments, photos = record["arguments"], record["data"]
    counts = config.parameter_counts()
    if data is None:
        train = photos["train"]["photos"]
        data = (
            f"{f'{train:,} photos' if train else 'A stream of photos'} to train and "
            f"{photos['validation']['photos']:,} to validate of the dataset `{Path(arguments['dataset']).name}`."
        )
    fields = {
        "name": name,
        "load_from": load_from,
        "variant": {"short": "ShortDesc", "long": "LongDesc"}[arguments["variant"]],
        "size": f"{arguments['preset']} of the paper"
        if not _own_sizes(arguments)
        else "variant of a model of the paper",
        "parameters": f"{counts['total'] / 1e6:.1f}M",
        "shares": "/".join(
            f"{100 * counts[part] / counts['total']:.0f}" for part in ("encoder", "projector", "decoder")
        ),
        "data": data,
        "beyond": beyond_the_paper(arguments),
        "batch_size": arguments["per_device_train_batch_size"]
        * arguments["gradient_accumulation_steps"]
        * record["processes"],
        "dropout": arguments["dropout"],
        "precision": "bf16 autocast" if arguments["mixed_precision"] == "bf16" else "float32",
        "device": record["device"],
        "command": command(name.replace("-", "_"), arguments),
        "validation_photos": f"{photos['validation']['photos']:,}",
    }
    metrics = best_metrics(run)
    fields |= {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in metrics.items()}
    template = files("nanovlm_hf.hub_cards").joinpath("model_card.md").read_text(encoding="utf-8")
    return Template(template).substitute(fields)


def _own_sizes(arguments: dict[str, Any]) -> bool:
    return any(arguments[name] is not None for name in ("n_blks", "n_layer", "n_head", "head_size", "img_embd_dim"))


def beyond_the_paper(arguments: dict[str, Any]) -> str:
    """What a run does that the paper does not tell of, in a sentence."""
    did = []
    if arguments["vision_initializer_range"] is None:
        did.append("the first weights of the encoder are scaled by fan-in")
    if arguments["augment"]:
        did.append("photos are cropped, mirrored and lit at random")
    if arguments["visual_words_weight"]:
        did.append("an auxiliary loss without parameters of its own makes the visual token name the captions' words")
    if arguments["ema_decay"]:
        did.append("the weights are a moving average")
    if len(arguments["texts"]) > 1:
        did.append(f"it also learned to write {' and '.join(arguments['texts'][1:])}")
    if arguments["init_from"]:
        did.append("it began from the weights of another run, which the command names")
    return f"Beyond the paper: {', '.join(did)}." if did else "Nothing in it is beyond the paper."


def command(config: str, arguments: dict[str, Any]) -> str:
    """How to run the run again: its YAML file, where there is one, and what was given anew on the command line."""
    usual = vars(TrainingArguments(dataset="data", output_dir="runs", variant=arguments["variant"]))
    text = "accelerate launch training/train.py"
    if (CONFIGS / f"{config}.yaml").exists():
        usual = vars(read_arguments(["--config", str(CONFIGS / f"{config}.yaml")]))
        text += f" --config training/configs/{config}.yaml"
    for field, value in arguments.items():
        if field in ("dataset", "output_dir", "resume", "overwrite", "tokenizer", "trackers") or value == usual[field]:
            continue
        if field == "init_from":  # not where the folder was on this machine
            value = "/".join(["runs", *Path(value).parts[-2:]]) if "/" in value else value
        text += f" --{field} {' '.join(map(str, value)) if isinstance(value, list) else value}"
    return text

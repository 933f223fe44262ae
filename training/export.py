"""Makes a checkpoint to ship of a run: `python training/export.py runs/mini_short --out FOLDER --name mini-short`.

Half precision, a generation config, the metrics, and a card whose numbers come from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from string import Template
from typing import Any

import torch
from arguments import read_arguments
from run_folder import RunFolder
from transformers import GenerationConfig

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration, NanoVLMProcessor

CARD = Path(__file__).parent.parent / "hub_cards" / "model_card.md"
# Found with training/decoding.py on 256 validation photos: greedy search alone says three words twice in 7.8% of texts,
# with this in none; beams do no better.
GENERATION = {"max_new_tokens": 64, "do_sample": False, "no_repeat_ngram_size": 3}


def export(run: Path, out: Path, name: str) -> None:
    """Writes the best model of a run as a folder to ship.

    Raises:
        InputError: if the run has no best model, or the folder exists.
    """
    if not (run / "best" / "config.json").exists():
        raise InputError(f"{run}: there is no best/ in this run: train it first")
    if out.exists():
        raise InputError(f"{out}: exists: remove it first")
    model = NanoVLMForConditionalGeneration.from_pretrained(run / "best")
    processor = NanoVLMProcessor.from_pretrained(run / "best")
    special = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special, **GENERATION, suppress_tokens=[model.config.image_token_id])
    metrics = best_metrics(run)
    arguments = RunFolder(run, keep=True).description()["arguments"]

    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.half().save_pretrained(aside)
    processor.save_pretrained(aside)
    _load_as_float32(aside / "config.json")
    (aside / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for evidence in ("metrics.jsonl", "loss.png"):
        shutil.copyfile(run / evidence, aside / evidence)
    (aside / "model.safetensors").chmod(0o644)
    (aside / "README.md").write_text(card(name, model, metrics, arguments), encoding="utf-8")
    aside.rename(out)


def best_metrics(run: Path) -> dict[str, Any]:
    """The evaluation of the best model, with the training loss and the epoch at that step."""
    rows = RunFolder(run, keep=True).rows()
    best = min((row for row in rows if "eval_loss" in row), key=lambda row: row["eval_loss"])
    steps = [row for row in rows if "train_loss" in row]
    at_best = [row for row in steps if row["step"] <= best["step"]]
    return best | {"train_loss": at_best[-1]["train_loss"], "epoch": at_best[-1]["epoch"]}


def card(name: str, model: torch.nn.Module, metrics: dict[str, Any], arguments: dict[str, Any]) -> str:
    """The model card, its numbers out of the metrics."""
    counts = model.config.parameter_counts()
    fields = {
        "name": name,
        "variant": {"short": "ShortDesc", "long": "LongDesc"}[arguments["variant"]],
        "preset": arguments["preset"],
        "parameters": f"{counts['total'] / 1e6:.1f}M",
        "shares": "/".join(
            f"{100 * counts[part] / counts['total']:.0f}" for part in ("encoder", "projector", "decoder")
        ),
        "batch_size": arguments["per_device_train_batch_size"],
        "command": _command(name.replace("-", "_"), arguments),
    }
    fields |= {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in metrics.items()}
    return Template(CARD.read_text(encoding="utf-8")).substitute(fields)


def _command(config: str, arguments: dict[str, Any]) -> str:
    """How to run the run again: its YAML file, and what was given anew on the command line."""
    path = f"training/configs/{config}.yaml"
    usual = vars(read_arguments(["--config", str(Path(__file__).parent.parent / path)]))
    command = f"accelerate launch training/train.py --config {path}"
    for field, value in arguments.items():
        if value != usual[field] and field not in ("dataset", "output_dir", "resume", "tokenizer"):
            command += f" --{field} {'/'.join(['runs', *Path(value).parts[-2:]]) if field == 'init_from' else value}"
    return command


def _load_as_float32(config: Path) -> None:
    # Version 5 loads weights in the config's dtype, 4.57 in float32: one file must not give two logits.
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["dtype"] = "float32"
    for part in ("vision_config", "text_config"):
        fields[part]["dtype"] = "float32"
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a checkpoint to ship of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args()
    try:
        export(arguments.run, arguments.out, arguments.name)
    except InputError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

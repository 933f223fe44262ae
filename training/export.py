"""Makes a checkpoint to ship of a run: `python training/export.py runs/mini_short --out FOLDER --name mini-short`.

Half precision, a generation config, the metrics, and a card whose numbers come from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from card import best_metrics, card
from run_folder import RunFolder
from transformers import GenerationConfig

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration, NanoVLMProcessor

# What the shipped models are trained on.
DATA = """9,304 photos of Flickr8k (7,890) and COCO (1,414), split by a hash of their ids: 8,264 to train, 953 to
validate, 87 to test. The descriptions were written by a large language model (not the paper's GPT-4o) from the photos'
human captions, with the paper's prompts adapted. The photos belong to their owners and are not part of this package."""
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
    folder = RunFolder(run, keep=True)
    metrics = best_metrics(folder)

    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.half().save_pretrained(aside)
    processor.save_pretrained(aside)
    _load_as_float32(aside / "config.json")
    (aside / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for evidence in ("metrics.jsonl", "loss.png"):
        shutil.copyfile(run / evidence, aside / evidence)
    (aside / "model.safetensors").chmod(0o644)
    load_from = f'nanovlm_hf.checkpoints.PACKAGED["{name}"]'
    (aside / "README.md").write_text(card(name, load_from, model.config, folder, DATA), encoding="utf-8")
    aside.rename(out)


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

"""Makes a checkpoint to ship of a run: `python training/export.py runs/mini_short --out mini-short`.

Half precision, a generation config, the metrics, and a card whose numbers come from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from messages import one_line_errors
from record import describe_checkpoint
from run_folder import RunFolder
from setup_run import generation_config

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration, NanoVLMProcessor


def export(run: Path, out: Path, about: str | None = None) -> None:
    """Writes the best model of a run as a folder to ship, called as the folder is.

    Args:
        run: its folder.
        out: the folder to write.
        about: Markdown: what it was trained on, for the card.

    Raises:
        InputError: if the run has no best model, or the folder exists.
    """
    if not (run / "best" / "config.json").exists():
        raise InputError(f"{run}: there is no best/ in this run: train it first")
    if out.exists():
        raise InputError(f"{out}: exists: remove it first")
    model = NanoVLMForConditionalGeneration.from_pretrained(run / "best")
    processor = NanoVLMProcessor.from_pretrained(run / "best")
    model.generation_config = generation_config(model.config)

    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.half().save_pretrained(aside, max_shard_size="15MB")
    processor.save_pretrained(aside)
    _load_as_float32(aside / "config.json")
    for weights in aside.glob("*.safetensors"):
        weights.chmod(0o644)
    describe_checkpoint(RunFolder(run, keep=True), aside, out.name, about)
    aside.rename(out)


def _load_as_float32(config: Path) -> None:
    # Version 5 loads weights in the config's dtype, 4.57 in float32: one file must not give two logits.
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["dtype"] = "float32"
    for part in ("vision_config", "text_config"):
        fields[part]["dtype"] = "float32"
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a checkpoint to ship of a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which gives the model its name")
    parser.add_argument("--about", type=Path, help="Markdown file for the card: what it was trained on")
    arguments = parser.parse_args()
    with one_line_errors("export.py"):
        about = None if arguments.about is None else arguments.about.read_text(encoding="utf-8")
        export(arguments.run, arguments.out, about)


if __name__ == "__main__":
    main()

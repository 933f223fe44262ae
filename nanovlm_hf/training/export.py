"""Export the best model of a run for release: `python -m nanovlm_hf.training.export runs/mini_short --out mini-short`.

The checkpoint is in half precision, with a generation config, its metrics, and a model card filled from them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from ..errors import InputError, one_line_errors
from ..files import check_output, read_text
from ..loading import load_model
from .initial_model import generation_config
from .record import describe_checkpoint
from .run_directory import RunDirectory


def export(run: Path, out: Path, about: str | None = None) -> None:
    """Export the best model of a run as a checkpoint, which is named after its directory.

    Args:
        run: the directory of the run.
        out: the directory to write.
        about: a description of the training data in Markdown, for the model card.

    Raises:
        InputError: if the run has no best model, its weights or record are damaged, or `out` exists.
    """
    if not (run / "best" / "config.json").exists():
        raise InputError(f"{run}: there is no best/ in this run: train it first")
    if os.path.lexists(out):
        raise InputError(f"{out} exists: remove it first")
    model, processor = load_model(str(run / "best"))
    model = model.to("cpu", torch.float16)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise InputError(f"{run}: its best/ holds weights that are too large for half precision")
    model.generation_config = generation_config(model.config)

    name = os.path.basename(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name[:40]}-", dir=out.parent) as temporary:
        partial = Path(temporary, name)
        model.save_pretrained(partial, max_shard_size="15MB")
        processor.save_pretrained(partial)
        _load_as_float32(partial / "config.json")
        for weights in partial.glob("*.safetensors"):
            weights.chmod(0o644)
        describe_checkpoint(RunDirectory(run, exist_ok=True), partial, name, about)
        partial.rename(out)


def _load_as_float32(config: Path) -> None:
    # Transformers 5 loads weights in the dtype of the config, 4.57 in float32; both should give the same logits.
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["dtype"] = "float32"
    for part in ("vision_config", "text_config"):
        fields[part]["dtype"] = "float32"
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Export the best model of a run for release.")
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of the run")
    parser.add_argument("--out", type=Path, required=True, help="directory to write, after which the model is named")
    parser.add_argument("--about", type=Path, help="Markdown file that describes the training data, for the model card")
    arguments = parser.parse_args()
    with one_line_errors("nanovlm_hf.training.export"):
        check_output(arguments.out, "--out", folder=True)
        about = None if arguments.about is None else read_text(arguments.about)
        export(arguments.run, arguments.out, about)


if __name__ == "__main__":
    main()

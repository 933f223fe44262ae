"""Safe removal of the run that `--overwrite` replaces."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, printable
from .run_record import RECORD, read_record

LOCK = ".lock"
# What a run writes into its directory: files, models and states, and TensorBoard's and Aim's logs.
FILES = (RECORD, "metrics.jsonl", "samples.jsonl", "samples.html", "loss.png", "complete")
MODELS = ("best", "last")
FOLDERS = (*MODELS, "states", "nanovlm", ".aim")
# And into a model's: what `save_pretrained` writes, and what accompanies a checkpoint.
MODEL_FILES = re.compile(
    r"(config|generation_config|(pre)?processor_config|tokenizer(_config)?|special_tokens_map|added_tokens|vocab|"
    r"model\.safetensors\.index|metrics|evaluation)\.json|model(-\d+-of-\d+)?\.safetensors|merges\.txt|"
    r"chat_template\.\w+|\w+_nanovlm\.py|README\.md|metrics\.jsonl|loss\.png|" + re.escape(RECORD)
)
STATES = re.compile(r"step-\d+|partial|removed")


def check_removable(path: Path, inputs: list[str] | None = None) -> None:
    """Raise InputError unless a directory holds a single run and nothing else that is needed.

    Args:
        path: the run directory; it may be missing or empty.
        inputs: directories and files that the new run reads.
    """
    if path.is_symlink():
        raise _not_removable(path, "is a link")
    if not path.is_dir() or all(entry.name == LOCK for entry in path.iterdir()):
        return
    record = path / RECORD
    if record.is_symlink() or not record.is_file():
        raise _not_removable(path, f"does not hold a run (there is no {RECORD})")
    if "photos_seen" in read_record(record):
        raise _not_removable(path, "holds a checkpoint or the record of a run, not a run")
    own = [path, path / "best", path / "last"]
    others = [found.parent for found in path.rglob(RECORD) if found.parent not in own]
    if others:
        raise _not_removable(path, f"holds other runs too ({others[0]})")
    needed = {"the working directory": Path.cwd(), "the home directory": Path(os.path.expanduser("~"))}
    needed |= {f"{name}, which this run reads": Path(name) for name in inputs or []}
    for name, location in needed.items():
        if location.resolve().is_relative_to(path.resolve()):
            raise _not_removable(path, f"holds {name}")
    foreign = sorted(_foreign_entries(path))
    if foreign:
        raise _not_removable(path, f"holds {printable(foreign[0])}, which no run wrote")


def _foreign_entries(path: Path) -> Iterator[Path]:
    """Yield what no run writes into its directory. Links are passed over: only the link itself is removed."""
    for entry in path.iterdir():
        # A kill leaves `.partial`, `.previous` and `loss.partial.png`.
        name = entry.name.removesuffix(".partial").removesuffix(".previous").replace(".partial.png", ".png")
        if entry.is_symlink() or entry.name == LOCK or (entry.is_file() and name in FILES):
            continue
        if not entry.is_dir() or name not in FOLDERS:
            yield entry
        elif name in (*MODELS, "states"):
            known = STATES if name == "states" else MODEL_FILES
            yield from (one for one in entry.iterdir() if not known.fullmatch(one.name.removesuffix(".partial")))


def remove_run(path: Path) -> None:
    """Empty a run directory, the record last: if the process is killed, the rest is still recognised as a run."""
    entries = list(path.iterdir()) if path.is_dir() else []
    for entry in sorted(entries, key=lambda entry: entry.name == RECORD):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def _not_removable(path: Path, problem: str) -> InputError:
    return InputError(f"output_dir: {path} {problem}, so --overwrite does not remove it: name another folder")

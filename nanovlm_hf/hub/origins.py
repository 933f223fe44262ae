"""What a checkpoint was made from, by the names that its card may give: datasets and a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import NAMES, SHIPPED
from ..training.lineage import lineage
from ..training.run_record import RECORD, checkpoint_record, stored_record
from ..variants import VARIANTS
from .auth import is_repo_id


def datasets_of(folder: Path, record: dict[str, Any]) -> list[str] | None:
    """Return the name of the dataset of a checkpoint, if others can know it.

    Args:
        folder: of the checkpoint; the record of its run is one level above, unless the checkpoint was copied.
        record: of the checkpoint.

    Returns:
        A Hub id; the title of the released dataset, if images and texts of a split have the hash of a released
        checkpoint's; None for anything else, such as a folder of one's own.
    """
    run = stored_record(folder.parent) if (folder.parent / RECORD).exists() else record
    name, variant = run["arguments"]["dataset"], record["arguments"]["variant"]
    if _is_on_the_hub(name):
        return [name]
    return [VARIANTS[variant].title] if _hashes(record) & _released_hashes(variant) else None


def base_model_of(record: dict[str, Any]) -> str | None:
    """Return the released checkpoint or Hub id that a run, or the last possible run before it, was initialised from."""
    for one in reversed(lineage(record)):
        name = one["arguments"]["init_from"]
        if name is not None and (name in NAMES or _is_on_the_hub(name)):
            return name
    return None


def _is_on_the_hub(name: str) -> bool:
    """Return whether a name has the form of a Hub id, and is that of no run and no folder here."""
    return is_repo_id(name) and not name.startswith(("runs/", ".")) and not Path(name).exists()


def _released_hashes(variant: str) -> set[str]:
    records = [checkpoint_record(folder) for folder in SHIPPED.values()]
    return {one for record in records if record["arguments"]["variant"] == variant for one in _hashes(record)}


def _hashes(record: dict[str, Any]) -> set[str]:
    """Return the hashes of the splits of a run: of images and texts, or of a stream's files."""
    return {split["sha256"] for split in record["data"].values() if isinstance(split, dict) and split.get("sha256")}

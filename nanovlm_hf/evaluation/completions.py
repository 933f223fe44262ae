"""Completions of items by models, made once and kept as JSON Lines."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.sources import read_json, read_text
from ..errors import InputError
from ..files import written_whole
from .generators import Generator, public_name
from .items import Item, fingerprint


@dataclass
class Row:
    """A completion, as a line of `completions/MODEL.jsonl`.

    Attributes:
        item_id: of the photo.
        model: short name.
        prefix: given.
        text: prefix and completion, as the model spells them.
        completion: what it added.
        reference: the true description, where there is one.
        seconds: that it took.
        new_tokens: how many tokens it has; None where nobody counted.
    """

    item_id: str
    model: str
    prefix: str
    text: str
    completion: str
    reference: str | None = None
    seconds: float | None = None
    new_tokens: int | None = None


def complete_items(
    generator: Generator, name: str, items: list[Item], folder: Path
) -> tuple[list[Row], dict[str, Any]]:
    """The completions of a model, those that an earlier run left with the same settings taken from the disk.

    Args:
        name: short name of the model.
        folder: of `NAME.jsonl` and `NAME.json`.

    Returns:
        The rows, and about the model: `parameters`, `settings`, `items` (a hash), seconds, tokens a second, memory.

    Raises:
        InputError: if the folder holds completions of other settings or items.
    """
    about = {
        "model": public_name(generator.name),
        "parameters": generator.parameters,
        "weights": weights_hash(generator),
        "settings": generator.model.generation_config.to_diff_dict() | generator.settings,
        "items": fingerprint(items),
    }
    path, about_path = folder / f"{name}.jsonl", folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    before = read_json(about_path) if about_path.exists() else about
    for field, value in about.items():
        if before.get(field) != json.loads(json.dumps(value)):
            raise InputError(f"{path}: these completions are of other {field}: remove the file, or name another --out")
    if not about_path.exists():
        write_json(about_path, about)
    done = {row.item_id: row for row in read_rows(path, cut=True)} if path.exists() else {}
    with path.open("a", encoding="utf-8") as file:
        _reset_peak_memory()
        for item in items:
            if item.item_id not in done:
                done[item.item_id] = _complete(generator, name, item)
                file.write(json.dumps(asdict(done[item.item_id]), ensure_ascii=False) + "\n")
                file.flush()
                before.pop("memory_mib", None)
    rows = [done[item.item_id] for item in items]
    if "memory_mib" not in before:
        write_json(about_path, before := about | {"memory_mib": _peak_memory(), **_speed(rows)})
    return rows, before


def _complete(generator: Generator, name: str, item: Item) -> Row:
    start = time.perf_counter()
    made = generator.complete(item.image, item.prefix)
    seconds = time.perf_counter() - start
    return Row(
        item.item_id, name, item.prefix, made.text, made.completion, item.reference, round(seconds, 6), made.new_tokens
    )


def _speed(rows: list[Row]) -> dict[str, float]:
    seconds = sorted(row.seconds for row in rows)
    return {
        "seconds_per_completion": seconds[len(seconds) // 2],
        "tokens_per_second": round(sum(row.new_tokens for row in rows) / max(sum(seconds), 1e-6), 1),
    }


def weights_hash(generator: Generator) -> str:
    """Of the first numbers of each weight: enough to tell two trainings apart, the same on every machine."""
    digest = hashlib.sha256()
    for parameter in generator.model.parameters():
        digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, aside and then renamed."""
    with written_whole(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def read_rows(path: Path, cut: bool = False) -> list[Row]:
    """The lines of a file of completions; fields beyond those of `Row` are left out.

    Args:
        cut: whether a last line that a kill left half is taken off the file.

    Raises:
        InputError: if it cannot be read, or a line lacks a field.
    """
    content = read_text(path)
    if cut and content and not content.endswith("\n"):
        content = content[: content.rfind("\n") + 1]
        with written_whole(path) as file:
            file.write(content)
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            rows.append(Row(**{name: fields[name] for name in Row.__dataclass_fields__ if name in fields}))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: line {number} is no completion ({error})") from None
        for name in ("item_id", "model", "prefix", "text", "completion"):
            if not isinstance(getattr(rows[-1], name), str):
                raise InputError(f"{path}: line {number}: {name} is no text")
    if not rows and not cut:
        raise InputError(f"{path}: there is no completion in it")
    return rows


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # then the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """MiB: of the GPU's memory where there is one, or of the process's since `_reset_peak_memory`."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) // 2**10
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10

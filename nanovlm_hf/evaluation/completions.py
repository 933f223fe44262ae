"""Completions of items by models, generated once and kept as JSON Lines."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat

from ..devices import default_device, peak_memory_mib
from ..errors import InputError, first_line, scrub
from ..files import json_line, read_json, read_jsonl, validate, write_json
from .fingerprints import processor_hash, weights_hash
from .generators import Generator, public_name
from .items import Item, fingerprint

TWICE = "remove one, or give each sample of a model its own name"


@dataclass
class Row:
    """A completion, as a line of `completions/MODEL.jsonl`.

    Attributes:
        item_id: id of the image.
        model: short name of the model.
        prefix: the words that the model was given.
        text: prefix and completion, as the model spells them.
        completion: the words that the model added.
        reference: the true description, if there is one.
        seconds: generation time; None if unknown.
        new_tokens: number of generated tokens; None if unknown.
    """

    item_id: str
    model: str
    prefix: str
    text: str
    completion: str
    reference: str | None = None
    seconds: Annotated[FiniteFloat, Field(ge=0)] | None = None
    new_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None


def complete_items(
    generator: Generator, name: str, items: list[Item], folder: Path
) -> tuple[list[Row], dict[str, Any]]:
    """Return the completions of a model; those of an earlier run with the same settings are read from disk.

    Args:
        name: short name of the model.
        folder: where `NAME.jsonl` and `NAME.json` are kept.

    Returns:
        The rows, and a description of the model: `parameters`, `settings`, hashes of everything that the completions
        depend on, seconds per completion, tokens per second, and memory in MiB.

    Raises:
        InputError: if the folder holds completions for other settings or items, or damaged files.
    """
    about = {
        "model": public_name(generator.name),
        "parameters": generator.parameters,
        "weights": weights_hash(generator.model),
        "processor": processor_hash(generator),
        "settings": _settings(generator.model.generation_config.to_diff_dict() | generator.settings),
        "items": fingerprint(items),
    }
    about = json.loads(json.dumps(about, default=str))  # as a later run reads it
    path, about_path = folder / f"{name}.jsonl", folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    before = _about_before(path, about_path, about)
    done = _rows_before(path, name, items) if path.exists() else {}
    complete = all(item.item_id in done for item in items)
    with path.open("a", encoding="utf-8") as file:
        _reset_peak_memory()
        for item in items:
            if item.item_id not in done:
                done[item.item_id] = _complete(generator, name, item)
                file.write(json_line(asdict(done[item.item_id])))
                file.flush()
    rows = [done[item.item_id] for item in items]
    speed = _speed(rows)
    if not complete or any(before.get(field) != value for field, value in speed.items()) or _memory_of(before) is None:
        before = about | {"memory_mib": peak_memory_mib(default_device()), **speed}
        write_json(about_path, before)
    return rows, about | {"memory_mib": _memory_of(before), **speed}


def _about_before(path: Path, about_path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier run recorded about its completions, after checking that it describes the same model."""
    if not (path.exists() and path.stat().st_size):
        write_json(about_path, about)
        return about
    if not about_path.exists():
        raise InputError(f"{path}: {about_path.name}, which describes these completions, is missing: remove the file")
    before = read_json(about_path)
    if not isinstance(before, dict):
        raise InputError(f"{about_path}: not a file of `nanovlm evaluate`: remove it and {path.name}")
    for field, value in about.items():
        if (_settings(before.get(field)) if field == "settings" else before.get(field)) != value:
            raise InputError(f"{path}: these completions differ in {field}: remove the file, or choose another --out")
    return before


def _settings(settings: Any) -> Any:
    """Return the settings of `generate` without the version of Transformers, which changes no completion."""
    if not isinstance(settings, dict):
        return settings
    return {name: value for name, value in settings.items() if name != "transformers_version"}


def _rows_before(path: Path, name: str, items: list[Item]) -> dict[str, Row]:
    wanted = {item.item_id: item for item in items}
    done = {}
    for row in read_rows(path, own=True):
        item = wanted.get(row.item_id)
        measured = isinstance(row.seconds, (int, float)) and isinstance(row.new_tokens, int)
        measured = measured and 0 <= row.seconds < 1e9 and 0 <= row.new_tokens < 1e9
        if (
            item is None
            or not measured
            or (row.model, row.prefix, row.reference) != (name, item.prefix, item.reference)
        ):
            raise InputError(
                f"{path}: item {scrub(row.item_id, 40)} does not belong to this evaluation: remove the file"
            )
        done[row.item_id] = row
    return done


def _complete(generator: Generator, name: str, item: Item) -> Row:
    start = time.perf_counter()
    try:
        generated = generator.complete(item.image, item.prefix)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # any model class and processor may raise anything
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"--model {generator.name}: item {item.item_id} cannot be completed ({problem})") from error
    seconds = time.perf_counter() - start
    return Row(
        item_id=item.item_id,
        model=name,
        prefix=item.prefix,
        text=generated.text,
        completion=generated.completion,
        reference=item.reference,
        seconds=round(seconds, 6),
        new_tokens=generated.new_tokens,
    )


def _speed(rows: list[Row]) -> dict[str, float]:
    seconds = sorted(row.seconds for row in rows)
    return {
        "seconds_per_completion": seconds[len(seconds) // 2],
        "tokens_per_second": round(sum(row.new_tokens for row in rows) / max(sum(seconds), 1e-6), 1),
    }


def _memory_of(about: dict[str, Any]) -> int | None:
    memory = about.get("memory_mib")
    return memory if isinstance(memory, int) and not isinstance(memory, bool) and 0 <= memory < 2**40 else None


def read_rows(path: Path, own: bool = False) -> list[Row]:
    """Return the lines of a file of completions; fields that `Row` does not have are ignored.

    Args:
        own: whether an evaluation of this folder wrote the file: an incomplete last line, which a kill left, is cut
            off, and every row must have its time and tokens.

    Raises:
        InputError: with the line and the field, if the file cannot be read or a line is not a completion.
    """
    if own:
        _cut_incomplete_line(path)
    rows = []
    for number, content in read_jsonl(path):
        rows.append(validate(content, Row, f"{path}: line {number}"))
        missing = [name for name in ("seconds", "new_tokens") if getattr(rows[-1], name) is None]
        if own and missing:
            raise InputError(f"{path}: line {number}: {missing[0]}: missing: remove the file, and run again")
    if not rows and not own:
        raise InputError(f"{path}: the file has no completions")
    return rows


def _cut_incomplete_line(path: Path) -> None:
    content = path.read_bytes()  # a kill may also have split a character
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def read_all_rows(paths: Iterable[Path]) -> list[Row]:
    """Return the completions of several files, with each item at most once for each model.

    Raises:
        InputError: as `read_rows`, and if a model completes an item twice.
    """
    found: dict[tuple[str, str], Row] = {}
    for path in paths:
        for row in read_rows(path):
            key = (row.item_id, row.model)
            if key in found:
                raise InputError(f"{path}: {shown_item(row.item_id, row.model)} appears twice: {TWICE}")
            found[key] = row
    return list(found.values())


def texts_of_other_beginnings(rows: list[Row]) -> str | None:
    """Return in one line how many texts do not begin with their prefix, and the first of them; None if all do.

    Case, spaces and punctuation are ignored, as a model spells the prefix the way its tokenizer does.
    """
    other = [row for row in rows if not _letters(row.text).startswith(_letters(row.prefix))]
    if not other:
        return None
    first = shown_item(other[0].item_id, other[0].model)
    return f"{len(other)} of {len(rows)} texts do not begin with their prefix (first: {first})"


def shown_item(item_id: str, model: str) -> str:
    """Return the name of a completion for a message; both parts come from foreign data."""
    return f"item {scrub(item_id, 60)} of {scrub(model, 60)}"


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # without it, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")

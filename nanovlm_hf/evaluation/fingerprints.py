"""Hashes of everything that a cached result of an evaluation depends on: equal hashes mean equal results."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import foils, grounding
from .assets import read_word_list
from .generators import INSTRUCTION, Chat, Generator

# Fields of a saved config or processor that do not change any result.
_NOISE = frozenset(
    "transformers_version _name_or_path name_or_path processor_class tokenizer_class auto_map architectures is_local "
    "local_files_only padding truncation dtype torch_dtype backend".split()
)


def digest_of(parts: Iterable[bytes]) -> str:
    """Return a hash of 64 bits, in hexadecimal; each part is hashed with its length, so the boundaries count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def weights_hash(model: nn.Module) -> str:
    """Return the hash of all parameters and buffers in order, which is the same on every machine."""
    tensors = [*model.parameters(), *model.buffers()]
    return digest_of(part for tensor in tensors for part in _parts_of(tensor))


def _parts_of(tensor: torch.Tensor) -> tuple[bytes, bytes]:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)}".encode(), content.numpy().tobytes()


def processor_hash(generator: Generator) -> str:
    """Return the hash of everything else that a completion depends on: tokenizer, image processor, chat template,
    model config."""
    parts = [json.dumps(_without_noise(generator.model.config.to_dict()), sort_keys=True, default=str)]
    if isinstance(generator, Chat):
        parts.append(INSTRUCTION)
    if generator.processor is not None:
        with tempfile.TemporaryDirectory() as name:
            generator.processor.save_pretrained(name)
            for path in sorted(one for one in Path(name).rglob("*") if one.is_file()):
                parts += [path.relative_to(name).as_posix(), _content(path)]
    return digest_of(part.encode() for part in parts)


def _content(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    # A tokenizer is saved with the padding that it used last.
    return json.dumps(_without_noise(json.loads(text)), sort_keys=True) if path.suffix == ".json" else text


def _without_noise(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(name): _without_noise(value) for name, value in content.items() if name not in _NOISE}
    return [_without_noise(one) for one in content] if isinstance(content, list) else content


def rows_hash(rows: Any, captions: list[list[str]]) -> str:
    """Return the hash of a dataset's rows: ids, descriptions, captions, and the bytes of the images."""

    def parts() -> Iterable[bytes]:
        for row, own in zip(rows, captions, strict=True):
            yield json.dumps([row["image_id"], row["description"], own], ensure_ascii=True).encode()
            yield (row["image"] or {}).get("bytes") or b""

    return digest_of(parts())


def measure_hash() -> str:
    """Return the hash of the constants and word lists that grounding depends on."""
    constants = [
        grounding.MEASUREMENT_VERSION,
        sorted(grounding.GROUPS.items()),
        foils.COLOURS,
        foils.COUNTS,
        foils.COMMON,
    ]
    words = [read_word_list(name) for name in ("synonyms.txt", "not_objects.txt")]
    return digest_of(json.dumps(part).encode() for part in (constants, words))

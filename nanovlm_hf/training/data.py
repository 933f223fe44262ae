"""The images and texts of a run, loaded and checked before its first step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypedDict

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Image

from ..data.image_store import decode_once
from ..data.rows import load
from ..data.splits import lowest_hashes
from ..errors import InputError, first_line
from ..processing_nanovlm import NanoVLMProcessor
from ..variants import VARIANTS
from .arguments import TEXT_FILES, RunArguments
from .distillation import teacher_features
from .streaming import StreamedSplit, open_stream, stored_rows
from .text_files import TextFile
from .texts import TokenizedTexts


@dataclass
class Split:
    """One split, ready for training.

    Attributes:
        images: uint8 (rows, height, width, 3), memory-mapped.
        texts: the texts of the same rows.
        image_ids: the ids of the same rows.
        files: texts without images.
        teacher_features: (rows, F), what the encoder learns to predict, or None.
    """

    images: np.ndarray
    texts: TokenizedTexts
    image_ids: list[int]
    files: list[TextFile] = field(default_factory=list)
    teacher_features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        """Return the number of images, and a hash of their ids and of every text to learn, in their order.

        Files of texts follow in their order, each with a hash of its own.
        """
        digest = hashlib.sha256(np.asarray(self.image_ids, dtype=np.int64).tobytes())
        for name, texts_of_images in self.texts.ids.items():
            digest.update(name.encode())
            for texts in texts_of_images:
                for ids in texts:
                    digest.update(ids.tobytes())
        files = [{"name": file.path.name, "sha256": file.sha256()} for file in self.files]
        return {"photos": len(self), "sha256": digest.hexdigest()[:16], **({"files": files} if files else {})}


class Splits(TypedDict):
    """The data of a run. The training split may be a stream."""

    train: Split | StreamedSplit
    validation: Split


def load_splits(arguments: RunArguments, processor: NanoVLMProcessor, device: torch.device | str = "cpu") -> Splits:
    """Load the train and validation splits; validation has the first source only, and is never streamed.

    Args:
        device: where teachers compute their features.

    Raises:
        InputError: for a dataset that cannot be loaded or lacks a split or column, for images that do not decode, and
            for a text file or teacher that cannot be used.
    """
    if arguments.streaming:
        return _open_streams(arguments, processor)
    paths = [name for name in arguments.texts if name.endswith(TEXT_FILES)]
    image_tokens = [processor.image_token_id] * processor.image_seq_length
    files = [TextFile(path, processor.tokenizer, image_tokens) for path in paths]
    for file in files:
        file.report_truncated()
    datasets = {name: load_checked(arguments.dataset, name) for name in dict.fromkeys(_configs(arguments))}
    loaded: dict[str, Split] = {}
    for split in ("train", "validation"):
        rows = datasets[arguments.variant][split]
        sources = [name for name in arguments.texts if name not in paths] if split == "train" else arguments.texts[:1]
        if split == "train" and arguments.train_samples is not None:
            rows = _lowest_hashes(rows, arguments.train_samples)
        if split == "validation":  # in random order, so that the first ones represent all
            rows = _lowest_hashes(rows, min(arguments.eval_samples, len(rows)))
        images, rows = decode_once(rows, processor.image_processor)
        texts = {name: _texts_of(name, arguments.variant, rows, datasets, split) for name in sources}
        loaded[split] = _split(images, texts, rows, processor)
    train = loaded["train"]
    train.files = files
    if arguments.teacher:
        train.teacher_features = teacher_features(arguments.teacher, train.images, device)
    return {"train": train, "validation": loaded["validation"]}


def _open_streams(arguments: RunArguments, processor: NanoVLMProcessor) -> Splits:
    name, variant = arguments.dataset, arguments.variant
    with _stream_errors(name, variant):
        streams = {split: open_stream(name, variant, split) for split in ("train", "validation")}
        first = {split: list(islice(stream.rows, 2)) for split, stream in streams.items()}
    for split, stream in streams.items():
        _refuse_few(name, variant, split, len(first[split]))
        columns = stream.rows.column_names or list(first[split][0])
        if all(row.get("description") is None for row in first[split]):  # as `datasets` fills a missing column
            columns = [column for column in columns if column != "description"]
        _refuse_columns(name, columns, stream.rows.features)
    with _stream_errors(name, variant):
        rows = stored_rows(streams["validation"], arguments.eval_samples)
    images, rows = decode_once(rows, processor.image_processor)
    texts = {arguments.variant: [[description] for description in rows["description"]]}
    return {"train": streams["train"], "validation": _split(images, texts, rows, processor)}


@contextmanager
def _stream_errors(name: str, variant: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # as in `load_checked`
        raise InputError(f"dataset: {name} ({variant}) cannot be read as a stream: {first_line(error)}") from None


def _split(images: np.ndarray, texts: dict[str, list[list[str]]], rows: Dataset, processor: NanoVLMProcessor) -> Split:
    image_ids = list(rows["image_id"])
    if not all(isinstance(one, int) and abs(one) < 2**63 for one in image_ids):
        raise InputError("dataset: the column image_id has an empty or too large number: number the images")
    tokenized = TokenizedTexts(texts, list(rows["captions"]), processor, image_ids)
    tokenized.report_truncated()
    return Split(images, tokenized, image_ids)


def _configs(arguments: RunArguments) -> list[str]:
    return [arguments.variant, *(name for name in arguments.texts if name in VARIANTS)]


def load_checked(name: str, variant: str) -> DatasetDict:
    """Load a dataset that `nanovlm data build` wrote.

    Raises:
        InputError: if it cannot be loaded, or lacks a split, a column or images.
    """
    dataset = load(name, variant, where=f"dataset: {name} ({variant})")
    for split in ("train", "validation"):
        _refuse_few(name, variant, split, len(dataset[split]) if split in dataset else 0)
        _refuse_columns(name, dataset[split].column_names, dataset[split].features)
    return dataset


def _refuse_few(name: str, variant: str, split: str, images: int) -> None:
    if images < 2:
        raise InputError(f"dataset: {name} ({variant}) has no {split} split of two images or more")


def _refuse_columns(name: str, columns: list[str], features: Features | None) -> None:
    missing = [one for one in ("image", "image_id", "captions", "description") if one not in columns]
    if missing:
        remedy = ": add the images with `nanovlm data join`" if missing[0] == "image" else ""
        raise InputError(f"dataset: {name} has no column {missing[0]!r}, but {', '.join(columns)}{remedy}")
    features = features or {}  # a stream may not know them
    if not isinstance(features.get("image", Image()), Image):
        raise InputError(f"dataset: {name}: the column image does not hold images: build it with `nanovlm data build`")
    if "image_id" in features and not getattr(features["image_id"], "dtype", "").startswith(("int", "uint")):
        raise InputError(f"dataset: {name}: the column image_id does not hold integers: number the images")


def _lowest_hashes(rows: Dataset, count: int) -> Dataset:
    """Return the images with the lowest hashes: a larger number of them includes every smaller one."""
    if count > len(rows):
        raise InputError(f"train_samples: {count} images, but the train split has {len(rows)}")
    return rows.select(lowest_hashes(rows["image_id"], count))


def _texts_of(name: str, variant: str, rows: Dataset, datasets: dict[str, Any], split: str) -> list[list[str]]:
    """Return the texts of a source for each image; none for an image that the source does not have."""
    if name == "captions":
        return list(rows["captions"])
    if name == variant:
        return [[description] for description in rows["description"]]
    others = datasets[name][split]
    known = dict(zip(others["image_id"], others["description"], strict=True))
    return [[known[image_id]] if image_id in known else [] for image_id in rows["image_id"]]

"""Batches of a dataset that is read as it comes: for what fits neither on the disk nor into a day of decoding."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from batches import STEPS_PER_WINDOW, TrainingBatches
from datasets import Dataset, Image, IterableDataset, load_dataset, load_dataset_builder
from datasets.distributed import split_dataset_by_node
from photo_store import MOST_DAMAGED, decode_photo
from texts import TokenizedTexts

from nanovlm_hf import InputError, NanoVLMProcessor
from nanovlm_hf.data.splits import hash_of
from nanovlm_hf.data.threads import map_in_order
from nanovlm_hf.errors import first_line

SHUFFLED = 1000  # rows among which the next one is drawn, beside the order of the files
FEW_DAMAGED = 10  # of which nothing can be concluded


@dataclass
class StreamedSplit:
    """A split that is read as it comes.

    Attributes:
        rows: with their photos as they are stored.
        files: of the split.
    """

    rows: IterableDataset
    files: list[str]

    def identity(self) -> dict[str, Any]:
        """The number of files and a hash of their names, which hold the revision on the Hub, and in folders a hash."""
        names = [name if "://" in name else os.path.basename(name) for name in self.files]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        return {"photos": None, "files": len(names), "sha256": digest}


def open_stream(name: str, variant: str, split: str) -> StreamedSplit:
    """A split to read as it comes, nothing of it downloaded first.

    Raises:
        ValueError, OSError: and others that `datasets` raises for a dataset or split that is not there.
    """
    files = load_dataset_builder(name, variant).config.data_files or {}
    rows = load_dataset(name, variant, split=split, streaming=True).cast_column("image", Image(decode=False))
    return StreamedSplit(rows, [str(file) for file in files.get(split, [])])


def stored_rows(split: StreamedSplit, count: int) -> Dataset:
    """The rows of the lowest hashes, the same ones as without streaming; the whole split is read for them."""
    rows = heapq.nsmallest(count, split.rows, key=lambda row: hash_of(row["image_id"]))
    return Dataset.from_list(rows, features=split.rows.features)


@dataclass
class _Window:
    """What the steps of a window are made of, and where in the stream it begins."""

    position: tuple[int, int]
    photos: np.ndarray
    rows: list[dict[str, Any]]


class StreamedBatches:
    """Batches of this process, pass after pass, each window of steps as `TrainingBatches` makes them of its photos.

    The order hangs on the seed and the number of processes, so a run that goes on from `position` is the same run.

    Args:
        split: to read; each process reads a part of its own.
        processor: of the model.
        sources: short or long, whichever the dataset holds, and captions.
        batch_size, pieces, vocab_size, weights, augment: as of `TrainingBatches`.
        steps: of the whole run.

    Attributes:
        position: (pass, rows of it that were taken) where the window of the last batch began.
    """

    def __init__(
        self,
        split: StreamedSplit,
        processor: NanoVLMProcessor,
        sources: list[str],
        batch_size: int,
        steps: int,
        pieces: int = 1,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        **settings: Any,
    ):
        shuffled = split.rows.shuffle(seed=seed, buffer_size=SHUFFLED)
        self.rows = split_dataset_by_node(shuffled, process_index, num_processes)
        self.processor, self.sources, self.steps = processor, sources, steps
        self.pieces, self.settings = pieces, {"batch_size": batch_size, "pieces": pieces, **settings}
        self.photos_per_window = STEPS_PER_WINDOW * pieces * batch_size
        self.seed = (seed << 32) + process_index
        self.position = (0, 0)

    def from_step(self, step: int) -> Iterator[dict[str, object]]:
        """The batches from a step on, `pieces` of them a step; `position` has to be that step's.

        Raises:
            InputError: if the stream is empty or breaks off, or if more than 1% of the photos do not decode.
        """
        first, skipped = divmod(step, STEPS_PER_WINDOW)
        last = -(-self.steps // STEPS_PER_WINDOW)
        windows = self._windows()
        # While one window is learned from, the next two are read and decoded.
        coming = map_in_order(lambda number: next(windows), range(first, last), workers=1, ahead=1)
        for number, window in coming:
            self.position = window.position
            yield from itertools.islice(self._batches(window, number), skipped * self.pieces, None)
            skipped = 0

    def epoch(self, step: int) -> float:
        """Whole passes over this process's part of the stream before the present window."""
        return float(self.position[0])

    def _batches(self, window: _Window, number: int) -> Iterator[dict[str, object]]:
        texts = {
            name: [row["captions"] if name == "captions" else [row["description"]] for row in window.rows]
            for name in self.sources
        }
        batches = TrainingBatches(
            window.photos,
            TokenizedTexts(texts, [row["captions"] for row in window.rows], self.processor),
            [row["image_id"] for row in window.rows],
            steps=STEPS_PER_WINDOW,
            seed=(self.seed << 32) + number,
            **self.settings,
        )
        return batches.from_step(0)

    def _windows(self) -> Iterator[_Window]:
        size = self.processor.image_processor.size
        decoded = self._decoded(self.position)
        position = self.position
        while True:
            photos = np.empty((self.photos_per_window, size["height"], size["width"], 3), dtype=np.uint8)
            rows = []
            for place in range(self.photos_per_window):
                after, row, photos[place] = next(decoded)
                rows.append(row)
            yield _Window(position, photos, rows)
            position = after

    def _decoded(self, position: tuple[int, int]) -> Iterator[tuple[tuple[int, int], dict[str, Any], np.ndarray]]:
        """The photos that decode from a position on, each with its row and the position after it."""
        decode = partial(decode_photo, image_processor=self.processor.image_processor)
        seen, damaged = 0, []
        epoch, taken = position
        while True:
            before = seen - len(damaged)
            for place, (row, pixels) in enumerate(
                map_in_order(lambda row: decode(row["image"]), self._read(epoch, taken), len(os.sched_getaffinity(0))),
                start=taken + 1,
            ):
                seen += 1
                if pixels is not None:
                    yield (epoch, place), row, pixels
                    continue
                damaged.append(row["image_id"])
                if len(damaged) > max(FEW_DAMAGED, MOST_DAMAGED * seen):
                    names = ", ".join(map(str, damaged[:5]))
                    raise InputError(
                        f"dataset: {len(damaged)} of the first {seen} photos cannot be decoded (image_id {names}): "
                        "build the dataset anew"
                    )
            if taken == 0 and seen - len(damaged) == before:
                raise InputError(
                    "dataset: the stream gives this process no photo: fewer processes, or a split with more files"
                )
            epoch, taken = epoch + 1, 0

    def _read(self, epoch: int, taken: int) -> Iterator[dict[str, Any]]:
        self.rows.set_epoch(epoch)
        try:
            # `IterableDataset.skip` would change the shuffled order.
            yield from itertools.islice(self.rows, taken, None)
        except Exception as error:  # of files, networks and formats, whichever the stream comes from
            raise InputError(f"dataset: the stream broke off ({first_line(error)}): --resume auto goes on") from None

"""Batches of a streamed dataset, for datasets that are too large to store or decode in advance."""

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
from datasets import Dataset, Image, IterableDataset
from datasets.distributed import split_dataset_by_node

from ..data.image_store import MAX_DAMAGED_SHARE, decode_image
from ..data.parallel import ordered_parallel_map
from ..data.rows import files_of, image_bytes, load
from ..data.splits import split_position
from ..devices import cpu_count
from ..errors import InputError, first_line
from ..processing_nanovlm import NanoVLMProcessor
from .batches import TrainingBatches
from .text_files import STEPS_PER_WINDOW
from .texts import TokenizedTexts

SHUFFLE_BUFFER = 1000  # rows among which the next one is drawn; the order of the files is shuffled as well
MAX_DAMAGED = 10  # images that are tolerated before their share counts


@dataclass
class StreamedSplit:
    """A streamed split.

    Attributes:
        rows: the rows, with undecoded images.
        files: the data files of the split.
    """

    rows: IterableDataset
    files: list[str]

    def identity(self) -> dict[str, Any]:
        """Return the number of files and a hash of their names, which include the revision (Hub) or a hash (local)."""
        names = [name if "://" in name else os.path.basename(name) for name in self.files]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        return {"photos": None, "files": len(names), "sha256": digest}


def open_stream(name: str, variant: str, split: str) -> StreamedSplit:
    """Open a split for streaming, without downloading it.

    Raises:
        ValueError, OSError: and others that `datasets` raises for a dataset or split that does not exist.
    """
    files = files_of(name, variant)
    rows = load(name, variant, split=split, streaming=True).cast_column("image", Image(decode=False))
    return StreamedSplit(rows, files.get(split, []))


def stored_rows(split: StreamedSplit, count: int) -> Dataset:
    """Return the rows with the lowest hashes, the same as without streaming. This reads the whole split."""
    rows = heapq.nsmallest(count, split.rows, key=lambda row: split_position(row["image_id"]))
    # Given a path, `datasets` would replace the bytes by a local file of that name.
    rows = [row | {"image": {"bytes": image_bytes(row), "path": None}} for row in rows]
    return Dataset.from_list(rows, features=split.rows.features)


@dataclass
class _Window:
    """The images and rows of a window of steps, and the positions in the stream where it begins and ends."""

    begin: tuple[int, int]
    end: tuple[int, int]
    images: np.ndarray
    rows: list[dict[str, Any]]


class StreamedBatches:
    """The batches of this process, pass after pass; `TrainingBatches` makes those of each window of steps.

    The order is determined by the seed and the number of processes, so a run that resumes at `position` is the same
    run.

    Args:
        split: the split; each process reads a part of its own.
        processor: the processor of the model.
        sources: the variant of the dataset, captions, or both.
        batch_size, micro_batches, vocab_size, weights, augment, image_dropout, reads_images: as for `TrainingBatches`.
        steps: the number of optimizer steps of the whole run.

    Attributes:
        position: (pass, rows taken from it) where the window of the next batch begins.
    """

    def __init__(
        self,
        split: StreamedSplit,
        processor: NanoVLMProcessor,
        sources: list[str],
        batch_size: int,
        steps: int,
        micro_batches: int = 1,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        **settings: Any,
    ):
        shuffle = {"seed": seed, "buffer_size": SHUFFLE_BUFFER}
        if num_processes > 1 and split.rows.num_shards % num_processes == 0:
            # First: `shuffle` merges the files into one source, of which each process would read every row.
            self.rows = split.rows.shard(num_processes, process_index).shuffle(**shuffle)
        else:
            self.rows = split_dataset_by_node(split.rows.shuffle(**shuffle), process_index, num_processes)
        self.processor, self.sources, self.steps = processor, sources, steps
        self.micro_batches = micro_batches
        self.settings = {"batch_size": batch_size, "micro_batches": micro_batches, **settings}
        self.images_per_window = STEPS_PER_WINDOW * micro_batches * batch_size
        self.seed = (seed << 32) + process_index
        self.position = (0, 0)
        self._epoch = 0
        self._reported = False  # that texts are truncated, which most windows would repeat

    def from_step(self, step: int) -> Iterator[dict[str, object]]:
        """Yield the batches from a step on, `micro_batches` for each step; `position` must be that of the step.

        Raises:
            InputError: if the stream is empty or fails, or if more than 1% of the images do not decode.
        """
        first, skipped_steps = divmod(step, STEPS_PER_WINDOW)
        last = -(-self.steps // STEPS_PER_WINDOW)
        windows = self._windows()
        # The next window is read and decoded while one is trained on.
        upcoming = ordered_parallel_map(lambda number: next(windows), range(first, last), workers=1, ahead=1)
        for number, window in upcoming:
            self.position, self._epoch = window.begin, window.begin[0]
            batches = self._batches(window, number)
            for index in range(skipped_steps * self.micro_batches, len(batches)):
                batch = batches[index]
                if index == len(batches) - 1:  # a state saved after this batch resumes at the next window
                    self.position = window.end
                yield batch
            skipped_steps = 0

    def epoch(self, step: int) -> float:
        """Return the number of complete passes over the stream before the window of the last batch."""
        return float(self._epoch)

    def _batches(self, window: _Window, number: int) -> TrainingBatches:
        texts = {
            name: [row["captions"] if name == "captions" else [row["description"]] for row in window.rows]
            for name in self.sources
        }
        image_ids = [row["image_id"] for row in window.rows]
        tokenized = TokenizedTexts(texts, [row["captions"] for row in window.rows], self.processor, image_ids)
        if tokenized.truncated and not self._reported:
            tokenized.report_truncated()
            self._reported = True
        return TrainingBatches(
            window.images,
            tokenized,
            image_ids,
            steps=STEPS_PER_WINDOW,
            seed=(self.seed << 32) + number,
            **self.settings,
        )

    def _windows(self) -> Iterator[_Window]:
        size = self.processor.image_processor.size
        decoded = self._decoded(self.position)
        begin = self.position
        while True:
            images = np.empty((self.images_per_window, size["height"], size["width"], 3), dtype=np.uint8)
            rows = []
            for index in range(self.images_per_window):
                end, row, images[index] = next(decoded)
                rows.append(row)
            yield _Window(begin, end, images, rows)
            begin = end

    def _decoded(self, position: tuple[int, int]) -> Iterator[tuple[tuple[int, int], dict[str, Any], np.ndarray]]:
        """Yield the images that decode from a position on, each with its row and the position after it."""
        decode = partial(decode_image, image_processor=self.processor.image_processor)
        epoch, taken = position
        seen, damaged = 0, []
        while True:
            whole_pass, good_before = taken == 0, seen - len(damaged)
            for row, pixels in ordered_parallel_map(decode, self._read(epoch, taken), cpu_count()):
                taken += 1
                seen += 1
                if pixels is not None:
                    yield (epoch, taken), row, pixels
                    continue
                damaged.append(row["image_id"])
                _check_damaged(damaged, seen)
            if whole_pass and seen - len(damaged) == good_before:
                raise InputError(
                    "dataset: the stream has no image for this process: use fewer processes, or a split with more files"
                )
            epoch, taken = epoch + 1, 0

    def _read(self, epoch: int, taken: int) -> Iterator[dict[str, Any]]:
        self.rows.set_epoch(epoch)
        try:
            # `IterableDataset.skip` would change the shuffled order.
            yield from itertools.islice(self.rows, taken, None)
        except Exception as error:  # any error of files, networks and formats
            raise InputError(f"dataset: the stream failed ({first_line(error)}): use --resume auto") from None


def _check_damaged(damaged: list[int], seen: int) -> None:
    if len(damaged) > max(MAX_DAMAGED, MAX_DAMAGED_SHARE * seen):
        names = ", ".join(map(str, damaged[:5]))
        raise InputError(
            f"dataset: {len(damaged)} of the first {seen} images cannot be decoded (image_id {names}): "
            "build the dataset again"
        )

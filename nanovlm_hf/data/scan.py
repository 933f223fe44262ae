"""Scan the Parquet files of a dataset: files, rows, columns and statistics by variant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, first_line
from ..variants import VARIANTS
from .parquet import read_batches
from .rows import COLUMN_TYPES
from .sources import WRITTEN_FROM
from .splits import SPLITS
from .statistics import MOST_COMMON, TextStatistics

_ONE_BUILD = "the folder must hold the files of one build alone"
_COLUMNS = {name: COLUMN_TYPES[name] for name in ("image_id", "description")}


@dataclass
class Contents:
    """What the Parquet files of a dataset hold.

    Attributes:
        files: names relative to the folder, by variant and split.
        rows: number of rows, likewise.
        statistics: `TextStatistics.content` by variant, with the number of texts by origin and of images by source.
        schema: columns.
        num_bytes: size of the rows in memory, by variant and split.
    """

    files: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    schema: pa.Schema | None = None
    num_bytes: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return [] if self.schema is None else self.schema.names


def scan(folder: Path) -> Contents:
    """Read the Parquet files of a dataset.

    Args:
        folder: folder with a subfolder for each variant, as `nanovlm data build` writes it.

    Raises:
        InputError: if there is no Parquet file, or one is damaged, has other columns, or repeats an image.
    """
    contents = Contents()
    for name, variant in VARIANTS.items():
        files: dict[str, list[str]] = {}
        rows: dict[str, int] = {}
        num_bytes: dict[str, int] = {}
        counted = {WRITTEN_FROM: Counter(), "source": Counter()}
        statistics, seen = TextStatistics(variant.requested), set()
        for split in SPLITS:
            for path in sorted((folder / name).glob(f"{split}-*.parquet")):
                files.setdefault(split, []).append(f"{name}/{path.name}")
                for batch in _batches(path, set(contents.columns)):
                    contents.schema = contents.schema or batch.schema
                    for image_id in batch["image_id"].to_pylist():
                        if image_id in seen:
                            raise InputError(f"{path}: image_id {image_id} is a duplicate: {_ONE_BUILD}")
                        seen.add(image_id)
                    rows[split] = rows.get(split, 0) + len(batch)
                    num_bytes[split] = num_bytes.get(split, 0) + batch.nbytes
                    statistics.add(batch["description"].to_pylist())
                    for column, counts in counted.items():
                        counts.update(_texts(batch, column))
        if files:
            contents.files[name], contents.rows[name], contents.num_bytes[name] = files, rows, num_bytes
            contents.statistics[name] = statistics.content() | {
                "written_from": dict(counted[WRITTEN_FROM].most_common()),
                "sources": dict(counted["source"].most_common(MOST_COMMON)),
            }
    if not contents.files:
        raise InputError(f"{folder}: no Parquet file of a dataset: build it first (`nanovlm data build`)")
    return contents


def _texts(batch: pa.RecordBatch, column: str) -> list[str]:
    """Return the values of a column of texts; none if there is no such column."""
    index = batch.schema.get_field_index(column)
    if index < 0 or not _COLUMNS["description"][1](batch.schema.field(index).type):
        return []
    return [text for text in batch[column].to_pylist() if text is not None]


def _batches(path: Path, expected: set[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file in batches, the first of them empty.

    Args:
        expected: columns of the earlier files; empty for the first file.

    Raises:
        InputError: if the file is damaged, or its columns are not those of a dataset or of the earlier files.
    """
    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:  # pyarrow does not accept non-UTF-8 names
            schema = file.schema_arrow
            for name, (kind, fits) in _COLUMNS.items():
                if schema.names.count(name) != 1 or not fits(schema.field(name).type):
                    raise InputError(f"{path}: no column {name!r} of {kind}: not a file of `nanovlm data build`")
            if expected and expected != set(schema.names):
                raise InputError(f"{path}: its columns differ from those of the other files: {_ONE_BUILD}")
            yield pa.RecordBatch.from_pylist([], schema)
            for batch in read_batches(opened, path):
                if batch["image_id"].null_count or batch["description"].null_count:
                    raise InputError(f"{path}: a row without image_id or description: build the dataset again")
                yield batch
    except InputError:
        raise
    except Exception as error:  # of pyarrow, which raises many types for values that Python cannot represent
        raise InputError(f"{path}: not a readable Parquet file ({first_line(error)})") from None

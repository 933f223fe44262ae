"""Reading Parquet files in batches of bounded size, and writing one atomically in row groups of bounded size."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import InputError

ROWS_PER_GROUP = 256
BYTES_PER_GROUP = 16 * 2**20
MAX_VALUES = 5_000_000  # of a column in a file
MAX_BATCH_BYTES = 2**30
MAX_EXPANSION = 20  # of a file; texts compress to a third, and human captions repeat a little


def read_batches(file: BinaryIO, where: str | Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file in batches of at most `ROWS_PER_GROUP`.

    Equal values are stored once in a file, so that a few kilobytes can stand for any number of them. Therefore each
    batch is first read with equal values stored once, and only if it is not too large as it is.

    Args:
        file: the opened file.
        where: name of the file in errors.
        columns: columns to read; all if None.

    Raises:
        InputError: if a column has more than `MAX_VALUES` values, or a batch takes more than `MAX_BATCH_BYTES`.
        pa.ArrowException, OSError, ValueError: if the file is damaged.
    """
    source = pa.PythonFile(file, "r")  # one for both readers, whose threads would otherwise move each other's position
    plain = pq.ParquetFile(source)
    leaves = _checked_columns(plain, where)
    once = pq.ParquetFile(source, metadata=plain.metadata, read_dictionary=_texts(leaves))
    # By row group: across their borders, the two readers divide the rows differently.
    for group in range(plain.metadata.num_row_groups):
        batches = plain.iter_batches(ROWS_PER_GROUP, row_groups=[group], columns=columns)
        for batch in once.iter_batches(ROWS_PER_GROUP, row_groups=[group], columns=columns):
            if sum(map(_bytes, batch.columns)) > MAX_BATCH_BYTES:
                raise _too_large(where)
            yield next(batches)


def check_expansion(file: BinaryIO, where: str | Path) -> None:
    """Check that a file does not expand to many times its size, before a reader without such limits opens it.

    Args:
        file: the opened file.
        where: name of the file in errors.

    Raises:
        InputError: as `read_batches`, or if its equal values, which are stored once, expand to more than
            `MAX_BATCH_BYTES` and to more than `MAX_EXPANSION` times the size of the file.
        pa.ArrowException, OSError, ValueError: if the file is damaged.
    """
    source = pa.PythonFile(file, "r")
    plain = pq.ParquetFile(source)
    leaves = _checked_columns(plain, where)
    groups = [plain.metadata.row_group(number) for number in range(plain.metadata.num_row_groups)]
    stored_once = [
        leaf.path
        for index, leaf in enumerate(leaves)
        if leaf.physical_type == "BYTE_ARRAY" and any(group.column(index).has_dictionary_page for group in groups)
    ]
    most = max(MAX_BATCH_BYTES, MAX_EXPANSION * file.seek(0, io.SEEK_END))
    once = pq.ParquetFile(source, metadata=plain.metadata, read_dictionary=stored_once)
    for batch in once.iter_batches(ROWS_PER_GROUP, columns=stored_once) if stored_once else ():
        most -= sum(map(_bytes, batch.columns))
        if most < 0:
            raise InputError(f"{where}: expands to many times its size: write it again with `nanovlm data build`")


def _checked_columns(file: pq.ParquetFile, where: str | Path) -> list[Any]:
    """Return the schema of each column after a check of what the file says of their size."""
    leaves = [file.schema.column(index) for index in range(file.metadata.num_columns)]
    values = [0] * len(leaves)
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for index, leaf in enumerate(leaves):
            chunk = group.column(index)
            values[index] += chunk.num_values
            width = leaf.length if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0
            if max(chunk.total_uncompressed_size, width * chunk.num_values) > MAX_BATCH_BYTES:
                raise _too_large(where)
    if max([file.metadata.num_rows, *values]) > MAX_VALUES:
        raise _too_large(where)
    return leaves


def _texts(leaves: list[Any]) -> list[str]:
    return [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]


def _bytes(values: pa.Array) -> int:
    """Return the bytes of an array once its dictionaries are expanded."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(values.dictionary)
        return pc.sum(pc.cast(pc.take(lengths, values.indices), pa.int64())).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(map(_bytes, values.flatten()))
    return _bytes(values.flatten()) if pa.types.is_nested(kind) else values.nbytes


def _too_large(where: str | Path) -> InputError:
    limits = f"{MAX_VALUES:,} values of a column, or {MAX_BATCH_BYTES:,} bytes of {ROWS_PER_GROUP} rows"
    return InputError(f"{where}: holds more than {limits}: divide it into smaller files")


class ParquetWriter:
    """Writes rows to `STEM.parquet.partial`, which `rename` gives its final name.

    Args:
        stem: path of the file without extension; its folder is made if necessary.
        schema: columns of the file.
    """

    def __init__(self, stem: Path, schema: pa.Schema):
        stem.parent.mkdir(exist_ok=True)
        self.stem, self.schema = stem, schema
        self.partial = stem.with_name(f"{stem.name}.parquet.partial")
        self.file = self.partial.open("xb")  # pyarrow does not accept file names that are not UTF-8
        compression = "snappy" if "image" in schema.names else "zstd"
        self.writer = pq.ParquetWriter(self.file, schema, compression=compression)
        self.group: list[dict[str, Any]] = []
        self.group_bytes = 0

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and write the row group if it is complete."""
        self.group.append(row)
        self.group_bytes += len(row["image"]["bytes"]) if "image" in row else 0
        if len(self.group) == ROWS_PER_GROUP or self.group_bytes > BYTES_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        if self.group:
            self.writer.write_table(pa.Table.from_pylist(self.group, self.schema))
        self.group, self.group_bytes = [], 0

    def close(self) -> None:
        """Write the last row group and the footer."""
        self._write_group()
        self.writer.close()
        self.file.close()

    def rename(self) -> Path:
        """Rename the closed file to `STEM-HASH.parquet`, and return its path.

        `load_dataset` identifies a dataset in its cache by the folder's name and the file names in its card. With a
        hash of the content in the names, a dataset that was built again is not read from the cache of the earlier one.
        """
        with self.partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return self.partial.rename(self.stem.with_name(f"{self.stem.name}-{digest[:16]}.parquet"))

    def abandon(self) -> None:
        """Remove the file unless it has been renamed."""
        if self.partial.exists():
            with contextlib.suppress(OSError):  # a full disk has no room for the footer
                self.writer.close()
                self.file.close()
            self.partial.unlink()

"""Writing a Parquet file of a dataset atomically and in row groups of bounded size."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 256
BYTES_PER_GROUP = 16 * 2**20


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

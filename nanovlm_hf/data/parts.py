"""Parts of a build: some thousand images, encoded once for all variants and splits.

The Parquet files of a part take their names when all of them are complete, and a note in `.parts` then records them
with a hash of their sources. An interrupted build thus resumes after its last complete part. Only a few hundred images
are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..devices import cpu_count
from ..errors import InputError
from ..files import atomic_write, inside, read_json, relative_name, validate
from ..variants import VARIANTS
from .encoding import jpeg_bytes, original_bytes
from .parallel import ordered_parallel_map
from .parquet import ParquetWriter
from .schema import IMAGE_SCHEMA, TEXT_SCHEMA
from .sources import WRITTEN_FROM, ImageRecord, origin_of
from .splits import split_of

IMAGES_PER_PART = 10_000  # about 120 MB at 224 x 224


@dataclass
class Part:
    """A complete part.

    Attributes:
        fingerprint: hash of its sources.
        files: Parquet files, relative to the folder of the dataset.
        rows: number of rows by `VARIANT/SPLIT`.
        skipped: images that cannot be read: `image_id`, `file_name`, `reason`.
    """

    fingerprint: str
    files: list[str]
    rows: dict[str, int]
    skipped: list[dict[str, Any]]


class PartWriter:
    """Writes parts, or returns them from their notes if they are complete.

    Args:
        out: folder of the dataset.
        with_images: read the image of each record from its folder, or write the text-only form.
        original: keep the image files unchanged.
        shard_index: index of the machine, a part of the file names.
    """

    def __init__(self, out: Path, with_images: bool, original: bool, shard_index: int):
        self.out, self.with_images, self.original, self.shard_index = out, with_images, original, shard_index
        self.schema = IMAGE_SCHEMA if with_images else TEXT_SCHEMA
        self.notes = out / ".parts"

    def write(self, number: int, records: list[ImageRecord], texts: dict[int, dict[str, str]], bar: tqdm) -> Part:
        """Return a part, written now or by an earlier build of the same sources.

        Args:
            number: index of the part.
            records: images of the part.
            texts: descriptions by image id and variant.
            bar: progress bar, advanced by the number of images.

        Raises:
            OSError: if a file cannot be written; the part then leaves no files.
        """
        fingerprint = self._fingerprint(records, texts)
        name = f"{self.shard_index:04d}-{number:05d}"
        note = self.notes / f"{name}.json"
        part = self._read(note)
        if part is not None and part.fingerprint == fingerprint:
            bar.update(len(records))
            return part
        for variant in VARIANTS:  # files of an interrupted build, or of other sources
            for leftover in (self.out / variant).glob(f"*-{name}*.parquet*"):
                leftover.unlink()
        part = self._write_files(name, fingerprint, records, texts, bar)
        with atomic_write(note) as file:
            file.write(json.dumps(asdict(part)))
        return part

    def _fingerprint(self, records: list[ImageRecord], texts: dict[int, dict[str, str]]) -> str:
        sources = [
            [
                *(record.image_id, str(record.folder), record.file_name, record.captions),
                *(record.source, record.coco_url),
                *(texts[record.image_id], self._file_state(record)),
            ]
            for record in records
        ]
        settings = [self.with_images, self.original, IMAGES_PER_PART, self.schema.names]
        return hashlib.sha256(json.dumps([settings, sources]).encode()).hexdigest()

    def _file_state(self, record: ImageRecord) -> list[int] | None:
        """Return the size and modification time of the image file, by which a changed file is recognised."""
        if not self.with_images:
            return None
        try:
            status = image_path(record).stat()
            return [status.st_size, status.st_mtime_ns]
        except (InputError, OSError):
            return None

    def _read(self, note: Path) -> Part | None:
        """Return the part of a note, or None if the note cannot be read or one of its files is missing."""
        try:
            part = validate(read_json(note), Part, note)
            for name in part.files:
                inside(self.out, name)
            return part
        except InputError:
            return None

    def _write_files(
        self, name: str, fingerprint: str, records: list[ImageRecord], texts: dict[int, dict[str, str]], bar: tqdm
    ) -> Part:
        writers: dict[tuple[str, str], ParquetWriter] = {}
        skipped, rows = [], Counter()
        try:
            for record, content in self._encode(records):
                bar.update()
                if isinstance(content, InputError):
                    skipped.append({"image_id": record.image_id, "file_name": record.file_name, "reason": str(content)})
                    continue
                split = split_of(record.image_id)
                for variant in VARIANTS:
                    if description := texts[record.image_id].get(variant):
                        if (variant, split) not in writers:
                            writers[variant, split] = ParquetWriter(self.out / variant / f"{split}-{name}", self.schema)
                        own = texts[record.image_id]
                        origin = own.get(origin_of(variant), own.get(WRITTEN_FROM))
                        writers[variant, split].add(_row(record, origin, description, content))
                        rows[f"{variant}/{split}"] += 1
            for writer in writers.values():
                writer.close()
            files = [f"{variant}/{writer.rename().name}" for (variant, _), writer in writers.items()]
        finally:
            for writer in writers.values():
                writer.abandon()
        return Part(fingerprint, files, dict(rows), skipped)

    def _encode(self, records: list[ImageRecord]) -> Iterator[tuple[ImageRecord, bytes | InputError | None]]:
        """Yield the images in order with their file content, None in the text-only form, or the error.

        Images are encoded in threads, since Pillow releases the GIL.
        """
        if not self.with_images:
            return ((record, self._name_error(record)) for record in records)
        workers = cpu_count()
        ahead = 2 * workers if self.original else 64  # original files may be large
        return ordered_parallel_map(self._content, records, workers, ahead)

    def _name_error(self, record: ImageRecord) -> InputError | None:
        """Check the file name, by which `nanovlm data join` adds the image later."""
        try:
            relative_name("the folder of the images", record.file_name)
        except InputError as error:
            return error
        return None

    def _content(self, record: ImageRecord) -> bytes | InputError:
        try:
            path = image_path(record)
            return original_bytes(path) if self.original else jpeg_bytes(path)
        except InputError as error:
            return error


def image_path(record: ImageRecord) -> Path:
    """Return the path of a record's image.

    Raises:
        InputError: if there is no such file in the record's folder.
    """
    return inside(record.folder or Path(), record.file_name)


def _row(record: ImageRecord, written_from: str | None, description: str, content: bytes | None) -> dict[str, Any]:
    common = {
        "image_id": record.image_id,
        "description": description,
        WRITTEN_FROM: written_from,
        "source": record.source,
        "coco_url": record.coco_url,
    }
    if content is None:
        return common | {"file_name": record.file_name}
    return common | {"image": {"bytes": content, "path": Path(record.file_name).name}, "captions": record.captions}

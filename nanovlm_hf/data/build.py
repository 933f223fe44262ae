"""Writing ShortDesc and LongDesc as Parquet (section 2.1), for `datasets.load_dataset`.

Photos are taken in parts. A part is encoded once for all variants and splits, written aside and renamed when it is
whole; a build that was interrupted goes on after its last whole part. What is in memory is a few hundred photos.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage
from tqdm import tqdm

from ..errors import InputError
from ..files import written_whole
from ..image_processing_nanovlm import to_rgb
from ..photos import open_photo
from .card import write_card
from .schema import PHOTO_SCHEMA, TEXT_SCHEMA
from .sources import VARIANTS, Photo, read_captions, read_descriptions, shard_of
from .splits import SPLITS, split_of
from .threads import map_in_order

IMAGE_SIZE = 224
PHOTOS_PER_PART = 10_000  # some 120 MB of photos of 224 x 224
ROWS_PER_GROUP = 256
BYTES_PER_GROUP = 16 * 2**20
MOST_SKIPPED = 0.01  # of the photos: more that cannot be read are no accident


@dataclass
class BuildSummary:
    """What a build wrote.

    Attributes:
        rows: rows by variant and split.
        skipped: photos left out because they are missing or cannot be read; `skipped.jsonl` says why.
    """

    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: int = 0


def build_dataset(
    captions: str | Path,
    descriptions: str | Path,
    images: str | Path | None,
    out: str | Path,
    *,
    original: bool = False,
    num_shards: int = 1,
    shard_index: int = 0,
    license: str = "other",
    about: str = "",
) -> BuildSummary:
    """Writes a folder with the configs `short` and `long`, each with train, validation and test splits.

    Photos without a description in a variant stay out of it. One that is missing or damaged is named in
    `skipped.jsonl`.

    Args:
        captions: COCO caption annotations (`captions_*.json`).
        descriptions: JSONL with `image_id` and `short`, `long` or both.
        images: folder of the photos that the annotations name; None writes the text-only form, without pixels and
            human captions.
        out: folder to write; it must not hold a finished dataset yet.
        original: keep the photos' files as they are instead of 224 x 224 JPEG.
        num_shards, shard_index: the part of one of several machines, without card; `write_card` makes it when their
            Parquet files are in one folder.
        license: of the descriptions, as the Hub spells licences.
        about: Markdown for the card: where texts and photos come from.

    Raises:
        InputError: if an input is missing or malformed, no photo is described, more than 1% cannot be read, or the
            disk is full.
        UsageError: if there is no such shard.
    """
    photos = shard_of(read_captions(captions), num_shards, shard_index)
    texts = read_descriptions(descriptions)
    described = [photo for photo in photos if photo.image_id in texts]
    if not described:
        raise InputError(f"{descriptions}: none of its image_ids is an id in {captions}")
    builder = Builder(Path(out), None if images is None else Path(images), original=original, shard_index=shard_index)
    summary = builder.run(described, texts)
    if num_shards == 1:
        builder.finish(license, about)
    return summary


class Builder:
    """Writes the Parquet files of photos and their texts into a folder.

    Args:
        out: the folder.
        images: folder of the photos, or None for the text-only form.
        original: keep the photos' files as they are.
        shard_index: of the machine; it stands in the files' names.
        may_be_missing: photos that are not there are only skipped, however many.
    """

    def __init__(
        self,
        out: Path,
        images: Path | None,
        *,
        original: bool = False,
        shard_index: int = 0,
        may_be_missing: bool = False,
    ):
        if (out / "README.md").exists():
            raise InputError(f"{out}: there is a dataset already: name another folder or remove it")
        if images is not None and not images.is_dir():
            raise InputError(f"{images}: there is no such folder of photos")
        self.out, self.images, self.original, self.shard_index = out, images, original, shard_index
        self.may_be_missing = may_be_missing
        self.schema = TEXT_SCHEMA if images is None else PHOTO_SCHEMA
        self.parts = out / ".parts"  # what is whole, for going on after an interruption

    def run(self, photos: list[Photo], texts: dict[int, dict[str, str]]) -> BuildSummary:
        """Writes all parts that are not whole yet."""
        self.parts.mkdir(parents=True, exist_ok=True)
        self._refuse_many_missing(photos)
        summary, skipped, rows = BuildSummary(), [], Counter()
        with tqdm(total=len(photos), unit="photo", mininterval=1) as bar:
            for number, first in enumerate(range(0, len(photos), PHOTOS_PER_PART)):
                try:
                    part = self._part(number, photos[first : first + PHOTOS_PER_PART], texts, bar)
                except OSError as error:  # pyarrow's names no file
                    problem = os.strerror(error.errno) if error.errno else error
                    raise InputError(
                        f"{self.out}: cannot be written ({problem}): the same command goes on when it can"
                    ) from None
                skipped += part["skipped"]
                rows.update({tuple(name.split("/")): count for name, count in part["rows"].items()})
                if not self.may_be_missing:
                    self._refuse_many(skipped, len(photos))
        if skipped:
            self._write_skipped(skipped)
        if not rows:
            raise InputError(f"{self.images}: not one of the described photos is there")
        for variant in VARIANTS:
            if counts := {split: rows[variant, split] for split in SPLITS if rows[variant, split]}:
                summary.rows[variant] = counts
        summary.skipped = len(skipped)
        return summary

    def finish(self, license: str, about: str) -> None:
        """Writes the card and the statistics; with them the dataset is whole."""
        write_card(self.out, license, about)
        shutil.rmtree(self.parts)

    def _refuse_many_missing(self, photos: list[Photo]) -> None:
        """Says so before an hour's work rather than after it."""
        if self.images is None or self.may_be_missing:
            return
        missing = [photo.file_name for photo in photos if not (self.images / photo.file_name).exists()]
        if len(missing) > MOST_SKIPPED * len(photos):
            raise InputError(f"{self.images}: {len(missing)} of the described photos are not there, first {missing[0]}")

    def _refuse_many(self, skipped: list[dict[str, Any]], photos: int) -> None:
        if len(skipped) > MOST_SKIPPED * photos:
            self._write_skipped(skipped)
            raise InputError(
                f"{len(skipped)} of {photos} photos cannot be read (skipped.jsonl names them), "
                f"first {skipped[0]['reason']}"
            )

    def _write_skipped(self, skipped: list[dict[str, Any]]) -> None:
        with written_whole(self.out / "skipped.jsonl") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped)

    def _part(self, number: int, photos: list[Photo], texts: dict[int, dict[str, str]], bar: tqdm) -> dict[str, Any]:
        """Writes a part unless it is whole already; returns its files, rows and skipped photos."""
        plan = [[photo.image_id, photo.file_name, photo.captions, texts[photo.image_id]] for photo in photos]
        settings = [str(self.images), self.original, PHOTOS_PER_PART]
        fingerprint = hashlib.sha256(json.dumps([settings, plan]).encode()).hexdigest()
        note = self.parts / f"{self.shard_index:04d}-{number:05d}.json"
        if note.exists():
            part = json.loads(note.read_text(encoding="utf-8"))
            if part["fingerprint"] == fingerprint and all((self.out / name).exists() for name in part["files"]):
                bar.update(len(photos))
                return part
        part = {"fingerprint": fingerprint} | self._write_part(
            f"{self.shard_index:04d}-{number:05d}", photos, texts, bar
        )
        with written_whole(note) as file:
            file.write(json.dumps(part))
        return part

    def _write_part(
        self, name: str, photos: list[Photo], texts: dict[int, dict[str, str]], bar: tqdm
    ) -> dict[str, Any]:
        for left_over in self.out.glob(f"*/*-{name}*.parquet*"):  # of an interruption, or of other inputs
            left_over.unlink()
        writers: dict[tuple[str, str], _Writer] = {}
        skipped, rows = [], Counter()
        try:
            for photo, content in self._encoded(photos):
                bar.update()
                if isinstance(content, InputError):
                    skipped.append({"image_id": photo.image_id, "file_name": photo.file_name, "reason": str(content)})
                    continue
                split = split_of(photo.image_id)
                for variant in VARIANTS:
                    if description := texts[photo.image_id].get(variant):
                        if (variant, split) not in writers:
                            path = self.out / variant / f"{split}-{name}.parquet.partial"
                            writers[variant, split] = _Writer(path, self.schema)
                        writers[variant, split].add(_row(photo, description, content))
                        rows[f"{variant}/{split}"] += 1
            for writer in writers.values():
                writer.close()
            files = [f"{variant}/{writer.rename().name}" for (variant, _), writer in writers.items()]
        finally:
            for writer in writers.values():
                writer.abandon()
        return {"files": files, "rows": rows, "skipped": skipped}

    def _encoded(self, photos: list[Photo]) -> Iterator[tuple[Photo, bytes | InputError | None]]:
        """The photos in their order, each with its file's content; encoded in threads, which Pillow lets run."""
        if self.images is None:
            return ((photo, None) for photo in photos)
        return map_in_order(self._content, photos, workers=len(os.sched_getaffinity(0)))

    def _content(self, photo: Photo) -> bytes | InputError:
        path = self.images / photo.file_name
        try:
            return original_bytes(path) if self.original else jpeg_bytes(path)
        except InputError as error:
            return error


class _Writer:
    """One Parquet file, written aside in groups of rows."""

    def __init__(self, aside: Path, schema: pa.Schema):
        aside.parent.mkdir(exist_ok=True)
        self.aside, self.schema = aside, schema
        self.writer = pq.ParquetWriter(aside, schema, compression="snappy" if "image" in schema.names else "zstd")
        self.group: list[dict[str, Any]] = []
        self.size = 0

    def add(self, row: dict[str, Any]) -> None:
        self.group.append(row)
        self.size += len(row["image"]["bytes"]) if "image" in row else 0
        if len(self.group) == ROWS_PER_GROUP or self.size > BYTES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.group:
            self.writer.write_table(pa.Table.from_pylist(self.group, self.schema))
        self.group, self.size = [], 0

    def close(self) -> None:
        """Ends the file."""
        self._flush()
        self.writer.close()

    def rename(self) -> Path:
        """Gives a file that is whole its name, with a hash of its content."""
        # `load_dataset` caches a folder under its base name and the file names in its card: without the content in
        # them, a dataset that is built anew would come out of the cache as it was before.
        with self.aside.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        stem = self.aside.name.removesuffix(".parquet.partial")
        return self.aside.rename(self.aside.with_name(f"{stem}-{digest[:16]}.parquet"))

    def abandon(self) -> None:
        """Lets go of a file that did not become whole; does nothing after `rename`."""
        if self.aside.exists():
            with contextlib.suppress(OSError):  # on a full disk the file's end finds no room either
                self.writer.close()
            self.aside.unlink()


def _row(photo: Photo, description: str, content: bytes | None) -> dict[str, Any]:
    common = {
        "image_id": photo.image_id,
        "description": description,
        "source": photo.source,
        "coco_url": photo.coco_url,
    }
    if content is None:
        return common | {"file_name": photo.file_name}
    return common | {"image": {"bytes": content, "path": photo.file_name}, "captions": photo.captions}


def jpeg_bytes(path: Path) -> bytes:
    """The photo as a 224 x 224 JPEG: the file's own bytes where it is one, else squashed and encoded (quality 92).

    Raises:
        InputError: as `open_photo`.
    """
    image = open_photo(path)
    content = path.read_bytes()
    upright = image.getexif().get(0x0112, 1) == 1
    is_jpeg = content.startswith(b"\xff\xd8")
    if is_jpeg and upright and image.mode == "RGB" and image.size == (IMAGE_SIZE, IMAGE_SIZE):
        return content
    buffer = io.BytesIO()
    small = to_rgb(image).resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.BICUBIC, reducing_gap=3.0)
    small.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def original_bytes(path: Path) -> bytes:
    """The file's own bytes, of a photo that can be decoded.

    Raises:
        InputError: as `open_photo`.
    """
    open_photo(path)
    return path.read_bytes()

"""Collect images and captions from COCO annotations or an image folder into one folder with a `captions.json`."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError, scrub
from ..files import atomic_write, inside, locked, named_disk_errors, parse_json
from ..images import image_suffix
from .download import Downloader
from .encoding import jpeg_bytes, original_bytes
from .image_folder import read_image_folder
from .parallel import ordered_parallel_map
from .sources import ImageRecord, read_all_captions


@dataclass
class IngestSummary:
    """Result of an ingestion.

    Attributes:
        images: number of images in `captions.json`.
        failed: number of images in `failed.jsonl`.
    """

    images: int
    failed: int


def choose(records: list[ImageRecord], limit: int | None, seed: int) -> list[ImageRecord]:
    """Return a random subset in the original order; for the same seed, smaller limits select subsets of larger ones."""
    if limit is None or limit >= len(records):
        return records

    def rank(record: ImageRecord) -> bytes:
        return hashlib.sha256(f"{seed}:{record.image_id}".encode()).digest()

    chosen = {record.image_id for record in sorted(records, key=rank)[:limit]}
    return [record for record in records if record.image_id in chosen]


def ingest_coco(
    captions: Sequence[str | Path],
    out: str | Path,
    images: str | Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    original: bool = False,
    workers: int = 16,
    allow_private: bool = False,
) -> IngestSummary:
    """Copy the images of COCO annotations from a folder, or download them from their `coco_url`.

    Writes `images/` (224 x 224 JPEG) or `originals/`, `captions.json` with the images that were obtained, and
    `failed.jsonl` with the others. `sources.jsonl` records where each file came from: a second run obtains only images
    that are missing or whose source has changed.

    Args:
        captions: one or more `captions_*.json` files of COCO.
        out: folder to write.
        images: folder of the images; None downloads them.
        limit: number of images to take; all if None.
        seed: seed for the selection of images by `limit`.
        original: keep the image files unchanged.
        workers: number of concurrent downloads.
        allow_private: also download from private, loopback and link-local addresses.

    Raises:
        InputError: if annotations are malformed, the folder does not exist, no image has an address, another run uses
            `out`, or the disk is full.
        OSError: if the folder cannot be written.
    """
    for path in captions:
        if Path(path).resolve() == (Path(out) / "captions.json").resolve():
            raise InputError(f"{path}: would be overwritten: name another --out")
    records = choose(read_all_captions(captions), limit, seed)
    if not records:
        raise InputError(f"{captions[0]}: contains no images")
    if images is not None and not Path(images).is_dir():
        raise InputError(f"{images}: no such folder of images")
    if images is None and not any(record.coco_url for record in records):
        raise InputError(f"{captions[0]}: no image has a coco_url: name the folder of the images with --images")
    ingest = _Ingest(Path(out), None if images is None else Path(images), original, allow_private)
    return ingest.run(records, workers)


def ingest_image_folder(
    folder: str | Path, out: str | Path, *, limit: int | None = None, seed: int = 0, original: bool = False
) -> IngestSummary:
    """Copy the images and captions of an image folder (`read_image_folder`); arguments and output as `ingest_coco`.

    Raises:
        InputError: if the folder is not an image folder or has duplicate ids.
    """
    records = read_image_folder(Path(folder))
    return _Ingest(Path(out), Path(folder), original).run(choose(records, limit, seed), workers=2)


class _Ingest:
    """Copies or downloads images into a folder.

    Args:
        out: folder to write.
        source: folder of the images; None downloads them.
        original: keep the image files unchanged.
        allow_private: also download from private addresses.
    """

    def __init__(self, out: Path, source: Path | None, original: bool, allow_private: bool = False):
        self.out, self.source, self.original, self.allow_private = out, source, original, allow_private
        self.images = out / ("originals" if original else "images")
        self.sources_file = out / "sources.jsonl"
        self.thread = threading.local()  # a downloader for each thread
        self.stored: dict[str, str] = {}  # names of the stored files, by stem

    def run(self, records: list[ImageRecord], workers: int) -> IngestSummary:
        self.out.mkdir(parents=True, exist_ok=True)
        busy = f"{self.out}: another run is using this folder: wait for it or name another folder"
        with locked(self.out / ".lock", busy), named_disk_errors(self.out):
            return self._run(records, workers)

    def _run(self, records: list[ImageRecord], workers: int) -> IngestSummary:
        self.images.mkdir(exist_ok=True)
        for leftover in self.images.glob("*.partial"):  # of a killed run
            leftover.unlink()
        present = self._present(records)
        failed: dict[int, str] = {}
        names: dict[int, str] = {}
        results = ordered_parallel_map(lambda record: self._take(record, present), records, workers, ahead=4 * workers)
        for record, result in tqdm(results, total=len(records), unit="image", mininterval=0.5):
            if isinstance(result, InputError):
                failed[record.image_id] = str(result)
                continue
            names[record.image_id] = result
            if record.image_id not in present:
                self._note_sources([(result, self._source_of(record))])
        self._write(records, names, failed)
        return IngestSummary(len(names), len(failed))

    def _present(self, records: list[ImageRecord]) -> dict[int, str]:
        """Return the file names of images that an earlier run took from the same source, by image id."""
        self.stored = {path.stem: path.name for path in self.images.iterdir()}
        sources = self._read_sources()
        present = {}
        stale: list[tuple[str, str | None]] = []
        for record in records:
            name = self.stored.get(_stem_of(record))
            if name is None:
                continue
            source, noted = self._source_of(record), sources.get(f"{self.images.name}/{name}") or ""
            # Without size and time, the source file is gone: the stored image is still the right one.
            if noted == source or noted.startswith(f"{source} "):
                present[record.image_id] = name
            else:
                stale.append((name, None))
        if stale:
            # The captions of the earlier run must not be paired with the images that replace its images.
            (self.out / "captions.json").unlink(missing_ok=True)
            self._note_sources(stale)
        return present

    def _note_sources(self, files: list[tuple[str, str | None]]) -> None:
        lines = (json.dumps({"file": f"{self.images.name}/{name}", "source": source}) + "\n" for name, source in files)
        with self.sources_file.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def _read_sources(self) -> dict[str, str]:
        """Return the source of each file by its name.

        Malformed lines are ignored, unlike in `read_jsonl`: a killed run may leave a partial line, after which the next
        run appends.
        """
        sources = {}
        try:
            lines = self.sources_file.read_text(encoding="utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return {}
        for line in lines:
            try:
                row = parse_json(line, self.sources_file)
                sources[str(row["file"])] = row["source"]
            except (InputError, TypeError, KeyError):
                continue
        return sources

    def _source_of(self, record: ImageRecord) -> str:
        """Return a hash of the image's address, or a hash of its path with the size and time of the file."""
        location = record.coco_url if self.source is None else str(self.source.resolve() / record.file_name)
        source = hashlib.sha256(str(location).encode(errors="surrogatepass")).hexdigest()[:16]
        if self.source is not None:
            try:
                status = inside(self.source, record.file_name).stat()
                source += f" {status.st_size} {status.st_mtime_ns}"
            except (InputError, OSError):
                pass
        return source

    def _take(self, record: ImageRecord, present: dict[int, str]) -> str | InputError:
        """Store an image, and return its file name or the error."""
        if record.image_id in present:
            return present[record.image_id]
        stem = _stem_of(record)
        try:
            if self.source is not None:
                path = inside(self.source, record.file_name)
                if path.parent == self.images.resolve():
                    raise InputError(f"{path}: would be overwritten: name another --out")
                return self._store(path, stem)
            return self._download(record, stem)
        except InputError as error:
            return error

    def _store(self, path: Path, stem: str) -> str:
        if self.original:
            content = original_bytes(path)
            suffix = image_suffix(content)
        else:
            content, suffix = jpeg_bytes(path), ".jpg"
        partial = self.images / f"{stem}.partial"
        partial.write_bytes(content)
        if self.stored.get(stem) not in (None, f"{stem}{suffix}"):
            (self.images / self.stored[stem]).unlink(missing_ok=True)  # the same image in another format
        return partial.rename(self.images / f"{stem}{suffix}").name

    def _download(self, record: ImageRecord, stem: str) -> str:
        if not record.coco_url:
            raise InputError(f"{scrub(record.file_name, 120)}: coco_url is not an HTTP address")
        if not hasattr(self.thread, "downloader"):
            self.thread.downloader = Downloader(self.allow_private)
        partial = self.images / f"{stem}.download.partial"
        try:
            return self.thread.downloader.fetch(record.coco_url, partial, lambda path: self._store(path, stem))
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, records: list[ImageRecord], names: dict[int, str], failed: dict[int, str]) -> None:
        taken = [record for record in records if record.image_id in names]
        with atomic_write(self.out / "captions.json") as file:
            file.writelines(_coco_json(taken, names))
        with atomic_write(self.out / "failed.jsonl") as file:
            for record in records:
                if reason := failed.get(record.image_id):
                    line = {"image_id": record.image_id, "file_name": record.file_name, "reason": reason}
                    file.write(json.dumps(line) + "\n")


def _stem_of(record: ImageRecord) -> str:
    return f"{record.image_id:012d}"


def _coco_json(records: list[ImageRecord], names: dict[int, str]) -> Iterator[str]:
    """Yield the fragments of a file in COCO's caption format."""
    yield '{"images": [\n'
    for index, record in enumerate(records):
        row: dict[str, Any] = {"id": record.image_id, "file_name": names[record.image_id], "source": record.source}
        if record.coco_url:
            row["coco_url"] = record.coco_url
        yield (",\n" if index else "") + json.dumps(row, ensure_ascii=False)
    yield '\n], "annotations": [\n'
    number = 0
    for record in records:
        for caption in record.captions:
            row = {"id": number, "image_id": record.image_id, "caption": caption}
            yield (",\n" if number else "") + json.dumps(row, ensure_ascii=False)
            number += 1
    yield "\n]}\n"

"""From COCO's annotations, or an image folder, to a folder of photos and one `captions.json` that names them."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from PIL import Image as PILImage
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from ..errors import InputError, first_line
from ..files import written_whole
from .build import jpeg_bytes, original_bytes
from .sources import Photo, read_all_captions
from .threads import map_in_order

MOST_BYTES = 64 * 2**20  # of a photo's file
TRIES = 4  # of a download that breaks off
CHUNK = 1 << 16
CAPTION_COLUMNS = ("captions", "caption", "text")


@dataclass
class IngestSummary:
    """What came of it.

    Attributes:
        photos: those in `captions.json`.
        failed: those in `failed.jsonl`.
    """

    photos: int
    failed: int


def choose(photos: list[Photo], limit: int | None, seed: int) -> list[Photo]:
    """As many photos as asked for, in their order; a seed always takes the same, and a smaller limit some of those."""
    if limit is None or limit >= len(photos):
        return photos

    def place(photo: Photo) -> bytes:
        return hashlib.sha256(f"{seed}:{photo.image_id}".encode()).digest()

    chosen = {photo.image_id for photo in sorted(photos, key=place)[:limit]}
    return [photo for photo in photos if photo.image_id in chosen]


def ingest_coco(
    captions: Sequence[str | Path],
    out: str | Path,
    images: str | Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    original: bool = False,
    workers: int = 16,
) -> IngestSummary:
    """Takes the photos of COCO annotations from a folder, or downloads them from their `coco_url`.

    Writes `images/` (224 x 224 JPEG; `originals/` for the files as they are), `captions.json` with the photos that are
    there, and `failed.jsonl` with those that are not. A second run fetches only what is missing.

    Args:
        captions: COCO's `captions_*.json`, one or more.
        out: folder to write.
        images: folder of the photos; None downloads them.
        limit: how many photos to take.
        seed: which.
        original: keep the photos' files as they are.
        workers: downloads at a time.

    Raises:
        InputError: if the annotations are malformed, the folder is not there, or no photo has an address.
        OSError: if the folder cannot be written.
    """
    photos = choose(read_all_captions(captions), limit, seed)
    if images is not None and not Path(images).is_dir():
        raise InputError(f"{images}: there is no such folder of photos")
    if images is None and not any(photo.coco_url for photo in photos):
        raise InputError(f"{captions[0]}: no photo has a coco_url: name the folder of the photos with --images")
    local = None if images is None else {photo.image_id: Path(images) / photo.file_name for photo in photos}
    return _Ingest(Path(out), original).run(photos, local, workers)


def ingest_image_folder(
    folder: str | Path, out: str | Path, *, limit: int | None = None, seed: int = 0, original: bool = False
) -> IngestSummary:
    """As `ingest_coco`, from an image folder as `datasets` reads it: photos and `metadata.jsonl`, `.csv` or `.parquet`.

    The metadata hold `file_name`, the captions in a column `captions`, `caption` or `text` (a text or a list of them),
    and may hold an integer `image_id`; without it the id follows from the file's name.

    Raises:
        InputError: if it is no such folder, or an id is there twice.
    """
    photos, local = _read_image_folder(Path(folder))
    return _Ingest(Path(out), original).run(choose(photos, limit, seed), local, workers=2)


def _read_image_folder(folder: Path) -> tuple[list[Photo], dict[int, Path]]:
    from datasets import Image, load_dataset

    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    try:
        splits = load_dataset("imagefolder", data_dir=str(folder))
    except Exception as error:  # `datasets` raises many kinds for the one mistake
        raise InputError(f"{folder}: no image folder that `datasets` reads ({first_line(error)})") from None
    photos: dict[int, Photo] = {}
    local: dict[int, Path] = {}
    for rows in splits.values():
        column = next((name for name in CAPTION_COLUMNS if name in rows.column_names), None)
        if column is None:
            raise InputError(
                f"{folder}: its metadata have no column captions, caption or text, but {', '.join(rows.column_names)}"
            )
        for row in rows.cast_column("image", Image(decode=False)):
            path = Path(row["image"]["path"])
            name = str(path.relative_to(folder.absolute()))
            image_id = row.get("image_id")
            if image_id is None:
                image_id = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
            if not isinstance(image_id, int):
                raise InputError(f"{folder}: {name}: 'image_id' must be a whole number, not {image_id!r}")
            if image_id in photos:
                raise InputError(f"{folder}: {name}: image_id {image_id} is there twice: change one")
            texts = row[column] if isinstance(row[column], list) else [row[column]]
            captions = [" ".join(text.split()) for text in texts if text and text.strip()]
            photos[image_id] = Photo(image_id, name, folder.absolute().name, None, captions)
            local[image_id] = path
    return list(photos.values()), local


class _Ingest:
    def __init__(self, out: Path, original: bool):
        self.out, self.original = out, original
        self.images = out / ("originals" if original else "images")
        self.sessions = threading.local()

    def run(self, photos: list[Photo], local: dict[int, Path] | None, workers: int) -> IngestSummary:
        self.images.mkdir(parents=True, exist_ok=True)
        for left_over in self.images.glob("*.partial"):  # of a run that was killed
            left_over.unlink()
        there = {path.stem: path.name for path in self.images.iterdir()}
        failed: dict[int, str] = {}
        names: dict[int, str] = {}
        results = map_in_order(lambda photo: self._take(photo, local, there), photos, workers, ahead=4 * workers)
        for photo, result in tqdm(results, total=len(photos), unit="photo", mininterval=0.5):
            if isinstance(result, InputError):
                failed[photo.image_id] = str(result)
            else:
                names[photo.image_id] = result
        self._write(photos, names, failed)
        return IngestSummary(len(names), len(failed))

    def _take(self, photo: Photo, local: dict[int, Path] | None, there: dict[str, str]) -> str | InputError:
        """Puts one photo into the folder and returns its name there, or says why not."""
        stem = f"{photo.image_id:012d}"
        if stem in there:
            return there[stem]
        try:
            if local is not None:
                return self._store(local[photo.image_id], stem)
            return self._download(photo, stem)
        except InputError as error:
            return error

    def _store(self, path: Path, stem: str) -> str:
        if self.original:
            content = original_bytes(path)
            with PILImage.open(path) as image:
                suffix = f".{image.format.lower()}".replace("jpeg", "jpg")
        else:
            content, suffix = jpeg_bytes(path), ".jpg"
        aside = self.images / f"{stem}.partial"
        aside.write_bytes(content)
        return aside.rename(self.images / f"{stem}{suffix}").name

    def _download(self, photo: Photo, stem: str) -> str:
        if not photo.coco_url or urlsplit(photo.coco_url).scheme not in ("http", "https"):
            raise InputError(f"{photo.file_name}: no http address in coco_url")
        aside = self.images / f"{stem}.download.partial"
        try:
            for number in range(1, TRIES + 1):
                try:
                    self._fetch(photo.coco_url, aside)
                    return self._store(aside, stem)
                except (requests.RequestException, InputError) as error:  # broken off, or not a whole picture
                    status = getattr(getattr(error, "response", None), "status_code", None)
                    if number == TRIES or (status is not None and 400 <= status < 500):
                        problem = str(error).replace(str(aside), "what came").splitlines()[0]
                        raise InputError(f"{photo.coco_url}: {problem}") from None
                    time.sleep(0.2 * 2**number)
        finally:
            aside.unlink(missing_ok=True)

    def _fetch(self, url: str, path: Path) -> None:
        """Downloads a file whole: as many bytes as its header says, and no more than a photo may have."""
        with self._session().get(url, stream=True, timeout=(10, 60)) as response, path.open("wb") as file:
            response.raise_for_status()
            size = 0
            for chunk in response.iter_content(CHUNK):  # urllib3 raises if fewer bytes come than Content-Length says
                size += len(chunk)
                if size > MOST_BYTES:
                    raise InputError(f"more than {MOST_BYTES >> 20} MiB")
                file.write(chunk)

    def _session(self) -> requests.Session:
        """One for each thread: connections stay open, a busy server is asked again when it says."""
        if not hasattr(self.sessions, "session"):
            retry = Retry(total=TRIES, backoff_factor=0.3, status_forcelist=(429, 500, 502, 503, 504))
            session = requests.Session()
            session.mount("http://", HTTPAdapter(max_retries=retry))
            session.mount("https://", HTTPAdapter(max_retries=retry))
            self.sessions.session = session
        return self.sessions.session

    def _write(self, photos: list[Photo], names: dict[int, str], failed: dict[int, str]) -> None:
        taken = [photo for photo in photos if photo.image_id in names]
        with written_whole(self.out / "captions.json") as file:
            file.writelines(_coco(taken, names))
        lines = (
            json.dumps({"image_id": photo.image_id, "file_name": photo.file_name, "reason": failed[photo.image_id]})
            + "\n"
            for photo in photos
            if photo.image_id in failed
        )
        with written_whole(self.out / "failed.jsonl") as file:
            file.writelines(lines)


def _coco(photos: list[Photo], names: dict[int, str]) -> Iterator[str]:
    """COCO's caption format, in pieces."""
    yield '{"images": [\n'
    for place, photo in enumerate(photos):
        row: dict[str, Any] = {"id": photo.image_id, "file_name": names[photo.image_id], "source": photo.source}
        if photo.coco_url:
            row["coco_url"] = photo.coco_url
        yield (",\n" if place else "") + json.dumps(row, ensure_ascii=False)
    yield '\n], "annotations": [\n'
    number = 0
    for photo in photos:
        for caption in photo.captions:
            row = {"id": number, "image_id": photo.image_id, "caption": caption}
            yield (",\n" if number else "") + json.dumps(row, ensure_ascii=False)
            number += 1
    yield "\n]}\n"

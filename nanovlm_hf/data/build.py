"""Writing ShortDesc and LongDesc as Parquet with the photos inside (section 2.1), for `datasets.load_dataset`."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from PIL import Image as PILImage
from tqdm import tqdm

from ..errors import InputError
from ..image_processing_nanovlm import to_rgb
from ..photos import open_photo
from .sources import VARIANTS, Photo, read_captions, read_descriptions
from .splits import SPLITS, split_of

FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("int64"),
        "captions": List(Value("string")),
        "description": Value("string"),
        "source": Value("string"),
    }
)
IMAGE_SIZE = 224
ROWS_PER_GROUP = 256  # what is held in memory at a time: about 3 MB of photos
ROWS_PER_SHARD = 20_000  # about 250 MB


def build_dataset(
    captions: str | Path,
    descriptions: str | Path,
    images: str | Path,
    out: str | Path,
) -> dict[str, dict[str, int]]:
    """Writes a folder with the configs `short` and `long`, each with train, validation and test splits.

    Photos without a description in a variant stay out of it. Photos are stored as 224 x 224 JPEG; one that is so
    already is stored byte for byte. A shard is written aside and renamed when whole.

    Args:
        captions: COCO caption annotations (`captions_*.json`).
        descriptions: JSONL with `image_id` and `short`, `long` or both.
        images: folder of the photos that the annotations name.
        out: folder to write; it must not hold a dataset yet.

    Returns:
        The number of rows of each split of each config.

    Raises:
        InputError: if an input is missing or malformed, a photo is missing or damaged, or no photo is described.
    """
    images, out = Path(images), Path(out)
    if not images.is_dir():
        raise InputError(f"{images}: there is no such folder of photos")
    if (out / "README.md").exists():
        raise InputError(f"{out}: there is a dataset already: name another folder or remove it")
    photos = read_captions(captions)
    texts = read_descriptions(descriptions)
    missing = [
        photo.file_name for photo in photos if photo.image_id in texts and not (images / photo.file_name).exists()
    ]
    if missing:
        raise InputError(f"{images}: {len(missing)} of the described photos are not there, first {missing[0]}")

    counts: dict[str, dict[str, int]] = {}
    for variant in VARIANTS:
        described = [photo for photo in photos if texts.get(photo.image_id, {}).get(variant)]
        if described:
            counts[variant] = _write_config(described, texts, variant, images, out)
    if not counts:
        raise InputError(f"{descriptions}: none of its image_ids is an id in {captions}")
    (out / "README.md").write_text(_readme(counts), encoding="utf-8")
    return counts


def _write_config(
    photos: list[Photo], texts: dict[int, dict[str, str]], variant: str, images: Path, out: Path
) -> dict[str, int]:
    (out / variant).mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with tqdm(total=len(photos), desc=variant, unit="photo") as bar:
        for split in SPLITS:
            members = [photo for photo in photos if split_of(photo.image_id) == split]
            shards = math.ceil(len(members) / ROWS_PER_SHARD)
            for shard in range(shards):
                rows = members[shard * ROWS_PER_SHARD : (shard + 1) * ROWS_PER_SHARD]
                path = out / variant / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
                _write_shard(path, (_row(photo, texts[photo.image_id][variant], images) for photo in rows), bar)
            if members:
                counts[split] = len(members)
    return dict(counts)


def _write_shard(path: Path, rows: Iterator[dict[str, Any]], bar: tqdm) -> None:
    # Not a name that `load_dataset` or anybody else would take for a finished shard.
    aside = path.with_suffix(".parquet.partial")
    schema = FEATURES.arrow_schema
    with pq.ParquetWriter(aside, schema) as writer:
        group: list[dict[str, Any]] = []
        for row in rows:
            group.append(row)
            bar.update()
            if len(group) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))
    aside.rename(path)


def _row(photo: Photo, description: str, images: Path) -> dict[str, Any]:
    return {
        "image": {"bytes": jpeg_bytes(images / photo.file_name), "path": photo.file_name},
        "image_id": photo.image_id,
        "captions": photo.captions,
        "description": description,
        "source": photo.source,
    }


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


def _readme(counts: dict[str, dict[str, int]]) -> str:
    """The card's YAML head, by which `load_dataset(folder, "short")` finds the files."""
    lines = ["---", "configs:"]
    for variant, splits in counts.items():
        lines += [f"- config_name: {variant}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {variant}/{split}-*.parquet"]
    lines += ["---", "", "| config | " + " | ".join(SPLITS) + " |", "|---" * (len(SPLITS) + 1) + "|"]
    for variant, splits in counts.items():
        lines.append(f"| {variant} | " + " | ".join(str(splits.get(split, 0)) for split in SPLITS) + " |")
    return "\n".join(lines) + "\n"

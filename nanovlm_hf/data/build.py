"""Writing ShortDesc and LongDesc as Parquet with the photos inside (section 2.1), for `datasets.load_dataset`."""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
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

    configs: dict[str, dict[str, list[str]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for variant in VARIANTS:
        described = [photo for photo in photos if texts.get(photo.image_id, {}).get(variant)]
        if described:
            configs[variant] = _write_config(described, texts, variant, images, out)
            of_split = Counter(split_of(photo.image_id) for photo in described)
            counts[variant] = {split: of_split[split] for split in SPLITS if split in of_split}
    if not counts:
        raise InputError(f"{descriptions}: none of its image_ids is an id in {captions}")
    (out / "README.md").write_text(_readme(configs, counts), encoding="utf-8")
    return counts


def _write_config(
    photos: list[Photo], texts: dict[int, dict[str, str]], variant: str, images: Path, out: Path
) -> dict[str, list[str]]:
    """Writes the shards of a config and returns their names by split."""
    folder = out / variant
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("*.parquet*"):  # of a build that was interrupted
        left_over.unlink()
    names: dict[str, list[str]] = {}
    with tqdm(total=len(photos), desc=variant, unit="photo", mininterval=1) as bar:
        for split in SPLITS:
            members = [photo for photo in photos if split_of(photo.image_id) == split]
            shards = math.ceil(len(members) / ROWS_PER_SHARD)
            for shard in range(shards):
                part = members[shard * ROWS_PER_SHARD : (shard + 1) * ROWS_PER_SHARD]
                rows = (_row(photo, texts[photo.image_id][variant], images) for photo in part)
                path = _write_shard(folder, f"{split}-{shard:05d}-of-{shards:05d}", rows, bar)
                names.setdefault(split, []).append(f"{variant}/{path.name}")
    return names


def _write_shard(folder: Path, name: str, rows: Iterator[dict[str, Any]], bar: tqdm) -> Path:
    # Not a name that `load_dataset` or anybody else would take for a finished shard.
    aside = folder / f"{name}.parquet.partial"
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
    # `load_dataset` caches a folder under its base name and the file names in its card: without the content in them,
    # a dataset that is built anew would come out of the cache as it was before.
    with aside.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return aside.rename(folder / f"{name}-{digest[:16]}.parquet")


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


def _readme(configs: dict[str, dict[str, list[str]]], counts: dict[str, dict[str, int]]) -> str:
    """The card's YAML head, by which `load_dataset(folder, "short")` finds the files, and a table of the rows."""
    head = {
        "configs": [
            {
                "config_name": variant,
                "data_files": [{"split": split, "path": names} for split, names in splits.items()],
            }
            for variant, splits in configs.items()
        ]
    }
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", ""]
    lines += ["| config | " + " | ".join(SPLITS) + " |", "|---" * (len(SPLITS) + 1) + "|"]
    for variant, splits in counts.items():
        lines.append(f"| {variant} | " + " | ".join(str(splits.get(split, 0)) for split in SPLITS) + " |")
    return "\n".join(lines) + "\n"

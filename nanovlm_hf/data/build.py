"""Build ShortDesc and LongDesc as Parquet files (section 2.1) for `datasets.load_dataset`.

`datasets` defines the columns (`schema.py`) and reads the files. It does not write them: `Dataset.from_generator`
would store each row twice (in its Arrow cache and as Parquet), encode an image once for each variant and split, and
start over after an interruption. The card lists the files as `configs`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import InputError
from ..files import atomic_write, locked, named_disk_errors
from ..hub.dataset_card import write_card
from ..variants import VARIANTS
from . import parts
from .sources import ImageRecord, one_for_each, read_all_captions, read_all_descriptions, shard_of
from .splits import SPLITS

MAX_SKIPPED = 0.01  # share of images; more unreadable images are a mistake of the user's


@dataclass
class BuildSummary:
    """Result of a build.

    Attributes:
        rows: number of rows by variant and split.
        skipped: number of images that are missing or unreadable.
        skipped_file: name of the file that gives the reasons.
    """

    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: int = 0
    skipped_file: str = "skipped.jsonl"


def build_dataset(
    captions: str | Path | Sequence[str | Path],
    descriptions: str | Path | Sequence[str | Path],
    images: str | Path | Sequence[str | Path] | None,
    out: str | Path,
    *,
    written_from: Sequence[str | None] = (),
    original: bool = False,
    num_shards: int = 1,
    shard_index: int = 0,
    license: str = "other",
    about: str = "",
) -> BuildSummary:
    """Write a dataset with one config per variant and the splits train, validation and test.

    Images without a description in a variant are left out of it. `skipped.jsonl` lists missing and damaged images.

    Args:
        captions: COCO caption annotations (`captions_*.json`), one file or several.
        descriptions: JSON Lines with `image_id` and one text per variant, one file or several.
        images: folder of the images that the annotations name, one for all or one for each file of `captions`; None
            writes the text-only form, without pixels and captions.
        out: folder to write; it must not hold a finished dataset.
        written_from: what the texts were written from, `captions` or `image`: one for all or one for each file of
            `descriptions`. A line's own field `written_from` takes precedence.
        original: keep the image files unchanged instead of encoding them as 224 x 224 JPEG.
        num_shards: number of machines that share the images. With more than one, the dataset has no card until
            `write_card` makes it from the Parquet files of all shards in one folder.
        shard_index: index of this machine, from 0.
        license: licence of the descriptions, as the Hub spells it.
        about: Markdown for the card about the origin of texts and images.

    Raises:
        InputError: if an input is missing or malformed, no image is described, more than 1% of the images cannot be
            read, another build uses the folder, or the disk is full.
        UsageError: if `shard_index` is out of range, or there is another number of folders or of `written_from`.
    """
    captions, descriptions = _paths(captions), _paths(descriptions)
    folders = [None] if images is None else _folders(_paths(images))
    folders = one_for_each(folders, captions, "--images", "--captions")
    records = shard_of(read_all_captions(captions, folders), num_shards, shard_index)
    texts = read_all_descriptions(descriptions, written_from)
    described = [record for record in records if record.image_id in texts]
    if not described:
        problem = f"none of its image_ids is an id in {captions[0]}" + (" (this shard of it)" if num_shards > 1 else "")
        raise InputError(f"{descriptions[0]}: {problem}")
    builder = Builder(Path(out), with_images=images is not None, original=original, shard_index=shard_index)
    return builder.run(described, texts, card=(license, about) if num_shards == 1 else None)


def _paths(given: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(given)] if isinstance(given, (str, Path)) else [Path(path) for path in given]


def _folders(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: no such folder of images")
    return paths


class Builder:
    """Writes the Parquet files of images and their descriptions.

    Args:
        out: folder to write.
        with_images: read the image of each record from its folder, or write the text-only form.
        original: keep the image files unchanged.
        shard_index: index of this machine, a part of the file names.
        may_be_missing: skip missing images, whatever their number.
    """

    def __init__(
        self,
        out: Path,
        *,
        with_images: bool,
        original: bool = False,
        shard_index: int = 0,
        may_be_missing: bool = False,
    ):
        self.out, self.with_images, self.shard_index, self.may_be_missing = (
            out,
            with_images,
            shard_index,
            may_be_missing,
        )
        # Machines that share the images may write to one folder.
        self.skipped_path = out / (f"skipped-{shard_index:04d}.jsonl" if shard_index else "skipped.jsonl")
        self.writer = parts.PartWriter(out, with_images, original, shard_index)

    def run(
        self, records: list[ImageRecord], texts: dict[int, dict[str, str]], card: tuple[str, str] | None = None
    ) -> BuildSummary:
        """Write all parts that are not complete, and the card.

        Args:
            records: described images.
            texts: descriptions by image id and variant.
            card: licence and text about the origin; None writes a shard without a card.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        busy = f"{self.out}: another build is using this folder: wait for it or name another folder"
        with locked(self.out / f".{self.shard_index:04d}.lock", busy), named_disk_errors(self.out):
            if (self.out / "README.md").exists():
                raise InputError(f"{self.out}: already contains a dataset: name another folder or remove it")
            self._check_images(records)
            summary, files = self._write_parts(records, texts)
            self._remove_stale(files)
            if card is not None:
                self._check_shards()
                write_card(self.out, *card)
                shutil.rmtree(self.writer.notes)
            return summary

    def _check_images(self, records: list[ImageRecord]) -> None:
        """Report many missing images before any image is encoded."""
        if not self.with_images or self.may_be_missing:
            return
        missing = []
        for record in records:
            try:
                parts.image_path(record)
            except InputError as error:
                missing.append(error)
        if len(missing) > MAX_SKIPPED * len(records):
            raise InputError(f"{len(missing)} of the described images are missing, the first: {missing[0]}")

    def _write_parts(
        self, records: list[ImageRecord], texts: dict[int, dict[str, str]]
    ) -> tuple[BuildSummary, set[str]]:
        """Return the summary and the names of all Parquet files."""
        self.writer.notes.mkdir(exist_ok=True)
        skipped, rows, files = [], Counter(), set()
        size = parts.IMAGES_PER_PART
        with tqdm(total=len(records), unit="image", mininterval=1) as bar:
            for number, first in enumerate(range(0, len(records), size)):
                part = self.writer.write(number, records[first : first + size], texts, bar)
                skipped += part.skipped
                rows.update(part.rows)
                files.update(part.files)
                self._check_skipped(skipped, len(records))
        self._write_skipped(skipped)
        if not rows:
            raise InputError(f"{records[0].folder or self.out}: none of the described images exists")
        summary = BuildSummary(skipped=len(skipped), skipped_file=self.skipped_path.name)
        for variant in VARIANTS:
            counts = {split: rows[f"{variant}/{split}"] for split in SPLITS if rows[f"{variant}/{split}"]}
            if counts:
                summary.rows[variant] = counts
        return summary, files

    def _check_skipped(self, skipped: list[dict[str, Any]], total: int) -> None:
        if not self.may_be_missing and len(skipped) > MAX_SKIPPED * total:
            self._write_skipped(skipped)
            raise InputError(
                f"{len(skipped)} of {total} images cannot be read (listed in {self.skipped_path.name}), the first: "
                f"{skipped[0]['reason']}"
            )

    def _write_skipped(self, skipped: list[dict[str, Any]]) -> None:
        """Write the list of images that are left out, or remove that of an earlier build if there are none."""
        if not skipped:
            self.skipped_path.unlink(missing_ok=True)
            return
        with atomic_write(self.skipped_path) as file:
            file.writelines(json.dumps(line) + "\n" for line in skipped)

    def _remove_stale(self, files: set[str]) -> None:
        """Remove parts that an interrupted build of other sources left."""
        for variant in VARIANTS:
            for path in (self.out / variant).glob(f"*-{self.shard_index:04d}-*.parquet"):
                if f"{variant}/{path.name}" not in files:
                    path.unlink()

    def _check_shards(self) -> None:
        for path in sorted(self.out.glob("*/*.parquet")):
            if path.parent.name in VARIANTS and f"-{self.shard_index:04d}-" not in path.name:
                raise InputError(f"{path}: belongs to another build: name another folder or remove it")

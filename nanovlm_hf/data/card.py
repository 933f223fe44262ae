"""The dataset's card and statistics, from its Parquet files alone."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import pyarrow.parquet as pq
import yaml

from ..errors import InputError
from ..files import written_whole
from .schema import PHOTO_SCHEMA
from .sources import VARIANTS
from .splits import SPLITS
from .statistics import TextStatistics, plot

ABOUT, END_OF_ABOUT = "<!-- about -->", "<!-- end of about -->"
NAMES = {"short": "ShortDesc", "long": "LongDesc"}
SENTENCES = {
    "short": "Short descriptions (20-25 words) of photos in the words of a child of four or five.",
    "long": "Long descriptions (60-70 words) of photos in the words of a child of four or five.",
}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_COLUMNS = {
    "image": "the photo",
    "image_id": "its number in the source, by which the split is chosen",
    "file_name": "the photo's file in the source",
    "captions": "what people wrote of the photo; the description is made from them",
    "description": "what a model learns to write",
    "source": "where the photo is from",
    "coco_url": "the photo's address, if it has one",
}


def write_card(folder: str | Path, license: str = "other", about: str = "", address: str | None = None) -> None:
    """Writes `README.md`, `stats.json` and `statistics.png` for the Parquet files in a folder.

    With the card the folder is a whole dataset: it names the files, so nothing half-written is ever part of it.

    Args:
        folder: with `short/` or `long/` or both, as `nanovlm data build` writes them.
        license: of the descriptions, as the Hub spells licences.
        about: Markdown: where texts and photos come from.
        address: what to write in the card's `load_dataset`; the folder's name if not given.

    Raises:
        InputError: if the folder holds no finished Parquet file.
    """
    folder = Path(folder)
    names: dict[str, dict[str, list[str]]] = {}
    rows: dict[str, dict[str, int]] = {}
    statistics: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        counted = TextStatistics(variant)
        paths, counts = defaultdict(list), defaultdict(int)
        for split in SPLITS:
            for path in sorted((folder / variant).glob(f"{split}-*.parquet")):
                file = pq.ParquetFile(path)
                paths[split].append(f"{variant}/{path.name}")
                counts[split] += file.metadata.num_rows
                with_pixels = "image" in file.schema_arrow.names
                for batch in file.iter_batches(columns=["description"], batch_size=4096):
                    counted.add(batch["description"].to_pylist())
        if paths:
            names[variant], rows[variant], statistics[variant] = dict(paths), dict(counts), counted.content()
    if not names:
        raise InputError(f"{folder}: no Parquet file of ShortDesc or LongDesc in it: build it first")

    with written_whole(folder / "stats.json") as file:
        file.write(json.dumps(statistics, indent=1) + "\n")
    aside = folder / "statistics.partial.png"
    plot(statistics, aside)
    aside.rename(folder / "statistics.png")
    text = _card(names, rows, statistics, license, about, address or folder.name, with_pixels)
    with written_whole(folder / "README.md") as file:
        file.write(text)


def origin_of(folder: Path) -> tuple[str, str]:
    """The licence and the text about the origin that a dataset's card was written with."""
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    about = re.search(re.escape(ABOUT) + r"\n(.*?)\n" + re.escape(END_OF_ABOUT), body, re.DOTALL)
    return yaml.safe_load(head)["license"], about[1] if about else ""


def _card(
    names: dict[str, dict[str, list[str]]],
    rows: dict[str, dict[str, int]],
    statistics: dict[str, dict[str, Any]],
    license: str,
    about: str,
    address: str,
    with_pixels: bool,
) -> str:
    title = " and ".join(NAMES[variant] for variant in names)
    configs = []
    for place, (variant, splits) in enumerate(names.items()):
        data_files = [{"split": split, "path": paths} for split, paths in splits.items()]
        configs.append(
            {"config_name": variant} | ({"default": True} if place == 0 else {}) | {"data_files": data_files}
        )
    most = max(sum(splits.values()) for splits in rows.values())
    head = {
        "pretty_name": title,
        "license": license,
        "language": ["en"],
        "task_categories": ["image-to-text"],
        "size_categories": [next((name for size, name in _SIZES if most < size), "n>1M")],
        "tags": ["nanovlm_hf", "image-captioning", "synthetic"],
        "configs": configs,
    }
    table = ["| config | " + " | ".join(SPLITS) + " |", "|---" * (len(SPLITS) + 1) + "|"]
    for variant, splits in rows.items():
        table.append(f"| `{variant}` | " + " | ".join(f"{splits.get(split, 0):,}" for split in SPLITS) + " |")
    if not with_pixels:
        table += ["", _TEXT_ONLY]
    shown = PHOTO_SCHEMA.names if with_pixels else [name for name in _COLUMNS if name not in ("image", "captions")]
    template = files("nanovlm_hf.hub_cards").joinpath("dataset_card.md").read_text(encoding="utf-8")
    body = Template(template).substitute(
        name=title,
        sentence=" ".join(SENTENCES[variant] for variant in names),
        address=address,
        config=f', "{next(iter(names))}"' if len(names) > 1 else "",
        table="\n".join(table),
        columns="\n".join(f"- `{name}`: {_COLUMNS[name]}" for name in shown),
        about=f"\n{ABOUT}\n{about.strip()}\n{END_OF_ABOUT}\n" if about.strip() else "",
        numbers=_numbers(statistics),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{body}"


_TEXT_ONLY = """This is the text-only form, without pixels and human captions. With the photos in a folder, under the
names in the column `file_name`, they are put back by

```bash
nanovlm data join --dataset THIS_DATASET --images PHOTOS --out data
```"""


def _numbers(statistics: dict[str, dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(NAMES[variant] for variant in statistics) + " |", "|---" * (len(statistics) + 1) + "|"]
    for label, key, form in (
        ("descriptions", "descriptions", "{:,}"),
        ("words", "words", "{:,}"),
        ("distinct words", "word_types", "{:,}"),
        ("words in a description, mean", "mean_words", "{:.1f}"),
        ("sentences in a description, mean", "mean_sentences", "{:.1f}"),
        ("descriptions within the prompt's range of words", "share_in_prompt_range", "{:.1%}"),
        ("words outside a child's vocabulary", "share_outside_child_vocabulary", "{:.1%}"),
        ("words that are among the 1,500 commonest", "share_of_commonest_1500_words", "{:.1%}"),
    ):
        values = " | ".join(form.format(numbers[key]) for numbers in statistics.values())
        lines.append(f"| {label} | {values} |")
    return "\n".join(lines)

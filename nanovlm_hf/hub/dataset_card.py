"""The card and statistics of a dataset, generated from its Parquet files alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from ..data.collections import COLLECTIONS
from ..data.rows import MAX_CARD_BYTES
from ..data.scan import Contents, scan
from ..data.schema import IMAGE_FEATURES, TEXT_FEATURES
from ..data.splits import SPLITS
from ..data.statistics import plot
from ..errors import InputError, first_line
from ..files import atomic_write, named_disk_errors, parse_yaml, read_text, validate
from ..variants import VARIANTS

ABOUT, END_OF_ABOUT = "<!-- about -->", "<!-- end of about -->"
TAG = "nanovlm_hf"  # identifies datasets of this package on the Hub
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_card(folder: str | Path, license: str = "other", about: str = "", address: str | None = None) -> None:
    """Write `README.md`, `stats.json` and `statistics.png` for the Parquet files in a folder.

    The card completes the dataset: it names the files, so that an unfinished file is never a part of it.

    Args:
        folder: folder with a subfolder for each variant, as `nanovlm data build` writes it.
        license: licence of the descriptions, as the Hub spells it.
        about: Markdown about the origin of texts and images.
        address: name for the card's `load_dataset` example; the folder's name if None.

    Raises:
        InputError: if the folder holds no finished Parquet file, one is damaged, has other columns or repeats images of
            another, or the disk is full.
    """
    folder = Path(folder)
    with named_disk_errors(folder):
        contents = scan(folder)
        with atomic_write(folder / "stats.json") as file:
            file.write(json.dumps(contents.statistics, indent=1) + "\n")
        partial = folder / "statistics.partial.png"
        partial.unlink(missing_ok=True)  # do not follow a link of that name
        plot(contents.statistics, partial)
        partial.rename(folder / "statistics.png")
        name = folder.resolve().name.encode(errors="replace").decode()
        with atomic_write(folder / "README.md") as file:
            file.write(_front_matter(contents, license, folder) + "\n" + _body(contents, about, address or name))


def _title(contents: Contents) -> str:
    return " and ".join(VARIANTS[name].title for name in contents.files)


def _front_matter(contents: Contents, license: str, folder: Path) -> str:
    configs = []
    for name, splits in contents.files.items():
        data_files = [{"split": split, "path": paths} for split, paths in splits.items()]
        default = {} if configs else {"default": True}
        configs.append({"config_name": name} | default | {"data_files": data_files})
    largest = max(sum(splits.values()) for splits in contents.rows.values())
    metadata = {
        "pretty_name": _title(contents),
        "license": license,
        "language": ["en"],
        "task_categories": ["image-to-text"],
        "size_categories": [next((name for size, name in _SIZES if largest < size), "n>1M")],
        "tags": [TAG, "image-captioning", "synthetic"],
        "configs": configs,
    }
    data = DatasetCardData(**metadata)
    _dataset_infos(contents, folder).to_dataset_card_data(data)
    return f"---\n{data.to_yaml()}\n---\n"


def _dataset_infos(contents: Contents, folder: Path) -> DatasetInfosDict:
    """Return features and sizes by variant, from which `datasets` writes the field `dataset_info`."""
    known = IMAGE_FEATURES | TEXT_FEATURES
    try:
        features = Features.from_arrow_schema(contents.schema)
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder}: a column has a type that `datasets` does not read: {first_line(error)}") from None
    features = Features({name: known.get(name, feature) for name, feature in features.items()})
    infos = DatasetInfosDict()
    for name, rows in contents.rows.items():
        sizes = contents.num_bytes[name]
        paths = [folder / path for paths in contents.files[name].values() for path in paths]
        infos[name] = DatasetInfo(
            features=features,
            splits=SplitDict({split: SplitInfo(split, sizes[split], count) for split, count in rows.items()}),
            download_size=sum(path.stat().st_size for path in paths),
            dataset_size=sum(sizes.values()),
            config_name=name,
        )
    return infos


def _body(contents: Contents, about: str, address: str) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = files("nanovlm_hf.hub_cards").joinpath("dataset_card.md").read_text(encoding="utf-8")
    with_images = "image" in contents.columns
    statistics = list(contents.statistics.values())
    return environment.from_string(template).render(
        title=_title(contents),
        variants=[VARIANTS[name] for name in contents.files],
        address=address,
        splits=SPLITS,
        rows={name: [f"{splits.get(split, 0):,}" for split in SPLITS] for name, splits in contents.rows.items()},
        columns=[name for name in (IMAGE_FEATURES if with_images else TEXT_FEATURES) if name in contents.columns],
        with_images=with_images,
        about=f"{ABOUT}\n{about.strip()}\n{END_OF_ABOUT}" if about.strip() else "",
        statistics=statistics,
        origins={origin for numbers in statistics for origin in numbers["written_from"]},
        sources=[name for name in COLLECTIONS if any(name in numbers["sources"] for numbers in statistics)],
    )


@dataclass
class _FrontMatter:
    """The fields that are read from a card's front matter."""

    license: str
    configs: list[dict[str, Any]]


@dataclass
class Card:
    """Content of a dataset's card.

    Attributes:
        license: as in `write_card`.
        about: as in `write_card`.
        files: Parquet files that the card names, relative to the folder.
    """

    license: str
    about: str
    files: list[str]


def read_card(folder: Path) -> Card:
    """Read a card that `write_card` wrote.

    Raises:
        InputError: if there is no card, or it is damaged or of another kind.
    """
    path = folder / "README.md"
    parts = read_text(path, MAX_CARD_BYTES).split("---\n", 2)
    try:
        metadata = validate(
            parse_yaml(parts[1], path) if len(parts) == 3 and not parts[0] else None, _FrontMatter, path
        )
        data_files = [entry for config in metadata.configs for entry in config["data_files"]]
        names = [name for entry in data_files for name in validate(entry["path"], list[str], path)]
    except (ValueError, TypeError, KeyError):
        remedy = "`nanovlm data card` writes it again"
        raise InputError(f"{path}: its front matter was not written by `nanovlm data build`: {remedy}") from None
    # Not a regular expression, which would search for the end again from each beginning.
    about, end, _ = parts[2].partition(f"{ABOUT}\n")[2].partition(f"\n{END_OF_ABOUT}")
    return Card(metadata.license, about if end else "", names)

"""Load untrusted datasets and check their rows, with errors in one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError, first_line, scrub
from ..files import check_line_breaks, open_regular, parse_yaml, read_text
from .parquet import check_expansion
from .sources import whole_number

_CARDS = ("README.md", ".huggingface.yaml")  # files in which `datasets` looks for the names of a dataset's files
MAX_CARD_BYTES = 2**20


def load(dataset: str, name: str | None = None, where: str | None = None, **options: Any) -> Any:
    """Load a dataset as `datasets.load_dataset` does.

    Args:
        dataset: folder or Hub id.
        name: name of the config.
        where: name of the dataset in errors, if it is not `dataset`.
        options: `split`, `streaming`.

    Raises:
        InputError: if there is no such dataset, its card names files outside of it, a file in its folder expands to
            many times its size, or the cache cannot be written.
    """
    from datasets import load_dataset

    try:
        with _without_log():  # `datasets` also logs the error that it raises
            for path in (path for paths in files_of(dataset, name).values() for path in paths):
                if path.endswith(".parquet") and "://" not in path:
                    with open_regular(path) as file:
                        check_expansion(file, path)
            # The numbers of rows in a card describe the data; a folder that was filtered by hand is still loaded.
            return load_dataset(_source(dataset), name, verification_mode="no_checks", **options)
    except Exception as error:  # `datasets` raises many types for a wrong name
        raise InputError(_problem(where or dataset, error)) from None


def files_of(dataset: str, name: str | None = None) -> dict[str, list[str]]:
    """Return the data files of a config by split, after checking that they belong to the dataset.

    Raises:
        InputError: if the dataset's card names files outside of it; they are not opened, and no address is requested.
        ValueError, OSError: and others that `datasets` raises for a dataset that does not exist.
    """
    from datasets import load_dataset_builder

    _check_card(dataset)
    found = load_dataset_builder(_source(dataset), name).config.data_files or {}
    files = {str(split): list(map(str, paths)) for split, paths in found.items()}
    for path in (path for paths in files.values() for path in paths):
        if not _is_own_file(dataset, path):
            raise _foreign(dataset, path)
    return files


def configs_of(dataset: str) -> list[str]:
    """Return the names of a dataset's configs.

    Raises:
        InputError: as `load`.
    """
    from datasets import get_dataset_config_names

    try:
        _check_card(dataset)
        return get_dataset_config_names(_source(dataset))
    except Exception as error:  # as in `load`
        raise InputError(_problem(dataset, error)) from None


def image_bytes(row: dict[str, Any]) -> bytes:
    """Return the image file in a row whose image is not decoded (`bytes`, `path`).

    A path is never opened: in an untrusted dataset it may name any file of this machine.

    Raises:
        InputError: if the row has no bytes, with the row's `image_id`.
    """
    image = row.get("image")
    content = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(content, bytes):
        has = "only a path" if isinstance(image, dict) and image.get("path") else "no bytes"
        raise InputError(
            f"dataset: the image with image_id {scrub(str(row.get('image_id')), 40)} has {has} where its file should "
            "be: build the dataset with `nanovlm data build`"
        )
    return content


def image_name(row: dict[str, Any]) -> str:
    """Return the name of a row's image in messages."""
    path = row["image"].get("path") if isinstance(row.get("image"), dict) else None
    return scrub(Path(path).name, 120) if isinstance(path, str) and path else f"image {row.get('image_id')}"


def checked(row: dict[str, Any], dataset: str, texts: Iterable[str] = ("description",)) -> dict[str, Any]:
    """Return a row after checking that its `image_id` is a whole number and its texts are strings.

    Raises:
        InputError: if a value is of another type.
    """
    row["image_id"] = whole_number(row.get("image_id"), f"{dataset}: 'image_id'")
    for name in texts:
        if not isinstance(row.get(name), str):
            raise InputError(f"{dataset}: image_id {row['image_id']}: {name!r} must be a string")
    return row


def check_columns(rows: Any, where: str, needed: Iterable[str]) -> None:
    """Check the columns of a split: that those needed exist, and that ShortDesc's and LongDesc's have their types.

    Raises:
        InputError: if a column is missing, has another type, or has missing values.
    """
    for name in needed:
        if name not in rows.column_names:
            remedy = (
                "add the images with `nanovlm data join`"
                if name == "image"
                else f"it has {scrub(', '.join(rows.column_names), 120)}"
            )
            raise InputError(f"{where}: it has no column {name!r}: {remedy}")
    with readable(where):
        for name, (kind, fits) in COLUMN_TYPES.items():
            if name not in rows.column_names:
                continue
            column = rows.data.column(name)
            if not fits(column.type):
                raise InputError(f"{where}: its column {name!r} must hold {kind}, not {scrub(str(column.type), 80)}")
            column.validate(full=True)  # checks that texts are UTF-8
            if name == "captions" and column.null_count == len(column):
                continue  # the card lists a column that the files do not have
            if column.null_count or (name == "captions" and pc.list_flatten(column).null_count):
                raise InputError(f"{where}: its column {name!r} has missing values")


def is_text(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is one of strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_texts(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is one of lists of strings."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type)


# Columns of a dataset by name: what they hold, and whether an Arrow type is of that kind.
COLUMN_TYPES: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "image_id": ("whole numbers", pa.types.is_integer),
    "description": ("strings", is_text),
    "captions": ("lists of strings", is_texts),
}


@contextmanager
def readable(dataset: str) -> Iterator[None]:
    """Turn errors of the libraries that read a dataset's files into one line.

    Raises:
        InputError: for any error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of Arrow, of invalid UTF-8, of a missing file
        raise InputError(f"{dataset}: cannot be read: {first_line(error)}") from None


@contextmanager
def _without_log() -> Iterator[None]:
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _source(dataset: str) -> str:
    """Return the name by which `datasets` loads a dataset: it takes the name of a folder from the path, and "." has
    none.
    """
    return os.path.abspath(dataset) if os.path.isdir(dataset) else dataset


def _check_card(dataset: str) -> None:
    """Check the names of files in a dataset's card before `datasets` looks for them, as that requests addresses."""
    for file in _CARDS:
        path = _card(dataset, file)
        if path is None:
            continue
        text = read_text(path, MAX_CARD_BYTES)
        content = parse_yaml(_front_matter(text, path) if file == "README.md" else text, path)
        configs = content.get("configs") if isinstance(content, dict) else None
        for config in configs if isinstance(configs, list) else []:
            named = [config.get("data_files"), config.get("data_dir")] if isinstance(config, dict) else config
            for name in _strings(named):
                if not _is_own_name(name):
                    raise _foreign(dataset, name, file)


def _card(dataset: str, file: str) -> str | None:
    """Return the path of a dataset's card; None without one, or if it cannot be downloaded, as `datasets` reports."""
    if os.path.isdir(dataset):
        path = os.path.join(dataset, file)
        return path if os.path.exists(path) else None
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(dataset.removeprefix("hf://datasets/"), file, repo_type="dataset")
    except Exception:  # there is no such file or dataset, no network, or the id is invalid
        return None


def _front_matter(text: str, path: str) -> str:
    from huggingface_hub.repocard import REGEX_YAML_BLOCK  # with which `datasets` finds it

    check_line_breaks(text, path)
    match = REGEX_YAML_BLOCK.search(text)
    return match[2] if match else ""


def _strings(content: Any) -> Iterator[str]:
    """Yield the strings in a content of lists and dictionaries."""
    waiting = [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _is_own_name(name: str) -> bool:
    """Return whether a name or pattern in a card is one of files in the dataset's folder."""
    try:
        is_address = "::" in name or bool(urlsplit(name).scheme)
    except ValueError:  # such as an unclosed bracket after "//"
        return False
    return not is_address and not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != ".."


def _is_own_file(dataset: str, path: str) -> bool:
    """Return whether a data file that `datasets` has found is one of the dataset: in its folder or its repository."""
    if "::" in path:  # a file in an archive
        return False
    if os.path.isdir(dataset):
        folders = (os.path.abspath(dataset) + os.sep, os.path.realpath(dataset) + os.sep)
        return "://" not in path and os.path.abspath(path).startswith(folders)
    return path.startswith(f"hf://datasets/{dataset.removeprefix('hf://datasets/')}@")


def _foreign(dataset: str, path: str, file: str = "README.md") -> InputError:
    return InputError(
        f"{dataset}: its {file} names a file outside the dataset ({scrub(path, 120)}): "
        "name files of its own folder by relative paths"
    )


def _problem(where: str, error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        from datasets import config

        return (
            f"{where}: the cache of `datasets` ({config.HF_DATASETS_CACHE}) cannot be written ({first_line(error)}): "
            "set HF_HOME to a writable folder with free space"
        )
    return f"{where}: cannot be loaded as a dataset: {first_line(error)}"

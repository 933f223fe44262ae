"""Load untrusted datasets and check their rows, with errors in one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError, first_line, scrub
from .sources import whole_number


def load(dataset: str, name: str | None = None, where: str | None = None, **options: Any) -> Any:
    """Load a dataset as `datasets.load_dataset` does.

    Args:
        dataset: folder or Hub id.
        name: name of the config.
        where: name of the dataset in errors, if it is not `dataset`.
        options: `split`, `streaming`.

    Raises:
        InputError: if there is no such dataset, its card names files outside of it, or the cache cannot be written.
    """
    from datasets import load_dataset, load_dataset_builder

    try:
        with _without_log():  # `datasets` also logs the error that it raises
            _refuse_foreign_files(dataset, load_dataset_builder(dataset, name).config.data_files or {})
            # The numbers of rows in a card describe the data; a folder that was filtered by hand is still loaded.
            return load_dataset(dataset, name, verification_mode="no_checks", **options)
    except Exception as error:  # `datasets` raises many types for a wrong name
        raise InputError(_problem(where or dataset, error)) from None


def configs_of(dataset: str) -> list[str]:
    """Return the names of a dataset's configs.

    Raises:
        InputError: as `load`.
    """
    from datasets import get_dataset_config_names

    try:
        return get_dataset_config_names(dataset)
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


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_texts(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type)


# Columns of a dataset by name: what they hold, and whether an Arrow type is of that kind.
COLUMN_TYPES: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "image_id": ("whole numbers", pa.types.is_integer),
    "description": ("strings", _is_text),
    "captions": ("lists of strings", _is_texts),
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


def _refuse_foreign_files(dataset: str, data_files: dict[str, list[str]]) -> None:
    """Refuse a card that names files outside the dataset, which may be any file of this machine."""
    folders = [os.path.abspath(dataset) + os.sep, os.path.realpath(dataset) + os.sep]
    for paths in data_files.values():
        for path in map(str, paths):
            if not (os.path.abspath(path).startswith(tuple(folders)) if os.path.isdir(dataset) else "://" in path):
                raise InputError(f"{dataset}: its README.md names a file outside the dataset ({scrub(path, 120)})")


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

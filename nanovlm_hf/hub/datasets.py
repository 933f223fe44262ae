"""Publish a dataset on the Hub: one repository with one config for each variant (ShortDesc and LongDesc)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from ..data.parquet import read_batches
from ..data.rows import is_text, is_texts
from ..data.schema import IMAGE_FEATURES, TEXT_FEATURES
from ..errors import InputError, first_line, scrub
from ..files import inside, link_or_copy, named_disk_errors, relative_name
from ..variants import VARIANTS
from .auth import hub_errors, need_name, need_token
from .dataset_card import TAG, read_card, write_card
from .publishable import check_private
from .repositories import existing_files


def write_repositories(
    dataset: str | Path,
    out: str | Path,
    license: str | None = None,
    about: str | None = None,
    namespace: str | None = None,
) -> list[Path]:
    """Write the content of the Hub repository of each variant: the card's Parquet files, a card and statistics.

    Args:
        dataset: folder written by `nanovlm data build`.
        out: folder in which one folder for each variant is made (`ShortDesc`, `LongDesc`).
        license: licence for the cards; that of the dataset's card if None.
        about: Markdown about the origin for the cards; that of the dataset's card if None.
        namespace: user or organization that the cards name.

    Returns:
        The folders.

    Raises:
        InputError: if the dataset is incomplete, a folder exists already, a file has other columns than those of a
            dataset, or a file or the card holds a token, a path with folders, or the path of a home directory.
    """
    dataset, out = Path(dataset), Path(out)
    if not (dataset / "README.md").exists():
        raise InputError(f"{dataset}: no finished dataset: build it first (`nanovlm data build`)")
    card = read_card(dataset)
    files = _files_of(dataset, card.files)
    license, about = license or card.license, card.about if about is None else about
    check_private(f"{license}\n{about}", "--about, --license, or those of the dataset's card")
    for path in (path for paths in files.values() for path in paths):
        _check_content(path)
    folders = []
    with named_disk_errors(out):
        for variant, paths in files.items():
            title = VARIANTS[variant].title
            folder = out / title
            if folder.exists():
                raise InputError(f"{folder}: already exists: name another folder or remove it")
            (folder / variant).mkdir(parents=True)
            for path in paths:
                link_or_copy(path, folder / variant / path.name)
            address = f"{namespace}/{title}" if namespace else title
            write_card(folder, license, about, address)
            folders.append(folder)
    return folders


def _files_of(dataset: Path, names: list[str]) -> dict[str, list[Path]]:
    """Return the Parquet files that the card names, by variant; nothing else is published, and no links."""
    files: dict[str, list[Path]] = {}
    for name in names:
        path = inside(dataset, name)
        variant = Path(name).parts[0]
        if variant not in VARIANTS or path != dataset.resolve() / variant / path.name or path.suffix != ".parquet":
            raise InputError(
                f"{dataset}: README.md names {scrub(name, 120)}, which is not a Parquet file of the dataset"
            )
        files.setdefault(variant, []).append(path)
    if not files:
        raise InputError(f"{dataset}: README.md names no Parquet file: `nanovlm data card` writes it again")
    return files


def _check_content(path: Path) -> None:
    """Check that a Parquet file holds the columns of a dataset alone, and nothing private in them.

    Raises:
        InputError: if it does not, with the column and the remedy.
    """
    try:
        with path.open("rb") as file:  # pyarrow does not accept file names that are not UTF-8
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            for about in (parquet.metadata.metadata, schema.metadata):
                text = b"\n".join(part for item in (about or {}).items() for part in item if item[0] != b"ARROW:schema")
                check_private(text.decode("utf-8", "replace"), f"{path}: its metadata")
            for field in schema:
                _check_column(path, field)
            columns = ["image.path" if name == "image" else name for name in schema.names]
            for batch in read_batches(file, path, columns):
                for name in batch.schema.names:
                    _check_texts(path, name, list(_texts_in(batch[name].to_pylist())))
    except InputError:
        raise
    except Exception as error:  # pyarrow raises many types
        raise InputError(
            f"{path}: not a readable Parquet file ({first_line(error)}): build the dataset again"
        ) from None


def _check_column(path: Path, field: pa.Field) -> None:
    where = f"{path}: column {scrub(field.name, 80)!r}"
    if field.name not in IMAGE_FEATURES | TEXT_FEATURES:
        raise InputError(f"{where}: it is not one of a dataset of `nanovlm data build`: remove it before publishing")
    kind = field.type
    if field.name == "image":
        fits = pa.types.is_struct(kind) and {kind[index].name for index in range(kind.num_fields)} == {"bytes", "path"}
    else:
        fits = pa.types.is_integer(kind) or pa.types.is_null(kind) or is_text(kind) or is_texts(kind)
    if not fits:
        raise InputError(f"{where}: it has the type {scrub(str(kind), 80)}: build the dataset again")
    for key, value in (field.metadata or {}).items():
        check_private((key + b"\n" + value).decode("utf-8", "replace"), f"{where}: its metadata")


def _check_texts(path: Path, column: str, texts: list[str]) -> None:
    where = f"{path}: column {column!r}"
    check_private("\n".join(texts), where)
    for text in texts:
        if column == "image" and ("/" in text or "\\" in text):
            raise InputError(f"{where}: {scrub(text, 80)}: a path must be the name of a file, without a folder")
        if column == "file_name":
            relative_name(where, text)


def _texts_in(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, dict)):
        for one in content.values() if isinstance(content, dict) else content:
            yield from _texts_in(one)


def push_dataset(
    dataset: str | Path,
    namespace: str,
    license: str | None = None,
    about: str | None = None,
    *,
    private: bool = False,
) -> list[str]:
    """Upload a dataset as `namespace/ShortDesc` and `namespace/LongDesc` in one commit each.

    The same commit deletes the Parquet files of an earlier upload. The token of `hf auth login` or `HF_TOKEN` is used
    and never printed.

    Args:
        dataset: folder written by `nanovlm data build`.
        namespace: user or organization on the Hub.
        license: licence for the cards; that of the dataset's card if None.
        about: Markdown about the origin for the cards; that of the dataset's card if None.
        private: whether the repositories have to be private.

    Returns:
        Addresses of the repositories.

    Raises:
        UsageError: if the name is invalid or there is no token.
        InputError: if a repository holds anything else than a dataset of this package or is public although it has to
            be private, or the Hub refuses the upload or cannot be reached; the repository is then unchanged.
    """
    for variant in VARIANTS.values():
        need_name(f"{namespace}/{variant.title}")
    need_token()
    api = HfApi()
    addresses = []
    with tempfile.TemporaryDirectory() as stage:
        folders = write_repositories(dataset, stage, license, about, namespace)
        for folder in folders:
            with hub_errors(f"{namespace}/{folder.name}"):
                _check_repository(api, f"{namespace}/{folder.name}", private)
        for folder in folders:
            repository = f"{namespace}/{folder.name}"
            with hub_errors(repository):
                api.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
                api.upload_folder(
                    repo_id=repository,
                    repo_type="dataset",
                    folder_path=folder,
                    delete_patterns=["*.parquet"],
                    commit_message=f"Upload {folder.name}",
                )
            addresses.append(f"{api.endpoint}/datasets/{repository}")
    return addresses


def unpublished(dataset: str | Path) -> list[str]:
    """Return the sorted names of files in a dataset's folder that are not published, without hidden files."""
    dataset = Path(dataset)
    listed = {"README.md", "stats.json", "statistics.png", *read_card(dataset).files}
    entries = [*dataset.iterdir(), *(path for variant in VARIANTS for path in (dataset / variant).glob("*"))]
    names = (str(path.relative_to(dataset)) for path in entries if not path.name.startswith("."))
    return sorted(name for name in names if name not in listed and name not in VARIANTS)


def _check_repository(api: HfApi, repository: str, private: bool) -> None:
    """Refuse to overwrite a repository that is not a dataset of this package."""
    if existing_files(api, repository, "dataset", private) and TAG not in (api.dataset_info(repository).tags or []):
        raise InputError(f"{repository}: holds another dataset: remove it or use another namespace")

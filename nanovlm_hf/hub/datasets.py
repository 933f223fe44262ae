"""Publish a dataset on the Hub: one repository with one config for each variant (ShortDesc and LongDesc)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..errors import InputError, scrub
from ..files import inside, link_or_copy, named_disk_errors
from ..variants import VARIANTS
from .auth import hub_errors, need_name, need_token
from .dataset_card import TAG, read_card, write_card
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
        InputError: if the dataset is incomplete, or a folder exists already.
    """
    dataset, out = Path(dataset), Path(out)
    if not (dataset / "README.md").exists():
        raise InputError(f"{dataset}: no finished dataset: build it first (`nanovlm data build`)")
    card = read_card(dataset)
    files = _files_of(dataset, card.files)
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
            write_card(folder, license or card.license, card.about if about is None else about, address)
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

"""Publishing a dataset on the Hub as two repositories, ShortDesc and LongDesc, each with one config."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from ..errors import InputError
from ..files import link_or_copy
from ..uploading import need_token, reason_of
from .card import NAMES, origin_of, write_card
from .sources import VARIANTS


def write_repositories(
    dataset: str | Path,
    out: str | Path,
    license: str | None = None,
    about: str | None = None,
    namespace: str | None = None,
) -> list[Path]:
    """Writes a folder for each variant as it is on the Hub: Parquet files, card, statistics.

    Args:
        dataset: folder that `nanovlm data build` wrote.
        out: folder in which `ShortDesc` and `LongDesc` are made.
        license, about: for the cards, as `write_card`; those of the dataset's own card if not given.
        namespace: user or organization that the cards name.

    Raises:
        InputError: if the dataset is not whole, or a folder to be made is there.
    """
    dataset, out = Path(dataset), Path(out)
    if not (dataset / "README.md").exists():
        raise InputError(f"{dataset}: no finished dataset: build it first (`nanovlm data build`)")
    variants = [variant for variant in VARIANTS if (dataset / variant).is_dir()]
    if not variants:
        raise InputError(f"{dataset}: neither `short` nor `long` in it: build it with `nanovlm data build`")
    own_license, own_about = origin_of(dataset)
    folders = []
    for variant in variants:
        folder = out / NAMES[variant]
        if folder.exists():
            raise InputError(f"{folder}: it is there already: name another folder or remove it")
        shutil.copytree(dataset / variant, folder / variant, copy_function=link_or_copy)
        address = f"{namespace}/{NAMES[variant]}" if namespace else NAMES[variant]
        write_card(folder, license or own_license, own_about if about is None else about, address)
        folders.append(folder)
    return folders


def push_dataset(
    dataset: str | Path,
    namespace: str,
    license: str | None = None,
    about: str | None = None,
    *,
    private: bool = False,
) -> list[str]:
    """Uploads a dataset as `namespace/ShortDesc` and `namespace/LongDesc`, one commit each.

    Shards of an earlier upload leave with the same commit. The token is the one that `hf auth login` or `HF_TOKEN`
    gives; it is never printed.

    Returns:
        The repositories' addresses.

    Raises:
        UsageError: if there is no token.
        InputError: if the Hub refuses it or cannot be reached; the repository is then as it was.
    """
    need_token()
    api = HfApi()
    addresses = []
    with tempfile.TemporaryDirectory() as stage:
        folders = write_repositories(dataset, stage, license, about, namespace)
        for folder in folders:
            repository = f"{namespace}/{folder.name}"
            try:
                api.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
                api.upload_folder(
                    repo_id=repository,
                    repo_type="dataset",
                    folder_path=folder,
                    delete_patterns=["*.parquet"],
                    commit_message=f"Upload {folder.name}",
                )
            except Exception as error:
                raise InputError(f"{repository}: {reason_of(error)}") from None
            addresses.append(f"{api.endpoint}/datasets/{repository}")
    return addresses

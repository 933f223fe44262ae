"""Publishing checkpoints and the demo on the Hub, each in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

from ..configuration_nanovlm import NanoVLMConfig
from ..errors import InputError, warn
from ..files import read_json
from .auth import hub_errors, need_name, need_token
from .publishable import skipped_line
from .repositories import existing_files
from .staging import stage_checkpoint, stage_page, stage_space

MAX_CONFIG = 1_000_000  # bytes of a config.json


def push_checkpoint(
    checkpoint: str,
    repo_id: str,
    *,
    code: bool = True,
    onnx: bool = False,
    private: bool = False,
    dry_run: bool = False,
) -> tuple[str, list[tuple[str, int]]]:
    """Upload a checkpoint as a model repository, in one commit.

    Files of its folder that are not part of a published checkpoint are named on stderr.

    Args:
        checkpoint: short name, or folder with `README.md` and `metrics.json`.
        repo_id: `namespace/name`.
        code: whether to add the Python files and the `auto_map` with which it loads without this package.
        onnx: whether to export it to `onnx/` as well, for onnxruntime and transformers.js.
        private: whether the repository has to be private.
        dry_run: whether to stop before any request to the Hub.

    Returns:
        The repository's URL, and the files with their sizes in bytes.

    Raises:
        UsageError: for an invalid name, or if there is no token.
        InputError: if the checkpoint cannot be published (see `stage_checkpoint`), the repository holds anything but a
            checkpoint of this package or is public although it has to be private, or the Hub refuses the upload or
            cannot be reached; the repository is then unchanged.
    """
    api = _hub(repo_id, dry_run)
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name) / "checkpoint"
        skipped = stage_checkpoint(checkpoint, repo_id, stage, code, onnx)
        if skipped:
            warn(skipped_line(skipped))
        paths = sorted(path for path in stage.rglob("*") if path.is_file())
        staged = [(path.relative_to(stage).as_posix(), path.stat().st_size) for path in paths]
        if not dry_run:
            with hub_errors(repo_id):
                before = existing_files(api, repo_id, "model", private)
                _check_same_model_type(api, repo_id, before)
                api.create_repo(repo_id, private=private or None, exist_ok=True)
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=stage,
                    delete_patterns=[name for name in before if _is_of_a_checkpoint(name)],
                    commit_message=f"Upload {Path(checkpoint).name}",
                )
    return f"{api.endpoint}/{repo_id}", staged


def _hub(repo_id: str, dry_run: bool = False) -> HfApi:
    """Return the Hub's client, after checking the name and that there is a token."""
    need_name(repo_id)
    if not dry_run:
        need_token()
    return HfApi()


def push_space(repo_id: str) -> str:
    """Upload the demo as a Gradio Space, in one commit.

    Args:
        repo_id: `namespace/name`.

    Returns:
        The Space's URL.

    Raises:
        UsageError: for an invalid name, or if there is no token.
        InputError: if a checkpoint cannot be published, the Space holds another app, or the Hub refuses the upload or
            cannot be reached.
    """
    return _push_space(repo_id, "gradio", stage_space, ["nanovlm_hf/", "checkpoints/"])


def push_static_space(repo_id: str) -> str:
    """Upload the page that runs the model in the browser as a static Space, in one commit.

    Args:
        repo_id: `namespace/name`.

    Returns:
        The Space's URL.

    Raises:
        UsageError: for an invalid name, or if there is no token.
        InputError: if a checkpoint cannot be exported, the Space holds another app, or the Hub refuses the upload or
            cannot be reached.
    """
    return _push_space(repo_id, "static", stage_page, ["models/", "assets/"])


def _push_space(repo_id: str, sdk: str, stage: Callable[[Path], None], replaced: list[str]) -> str:
    """Upload a Space; an earlier upload is recognised by the first of the folders that are replaced."""
    api = _hub(repo_id)
    with tempfile.TemporaryDirectory() as name:
        stage(Path(name))
        with hub_errors(repo_id):
            before = existing_files(api, repo_id, "space")
            others = _without_card(before)
            if others and not any(file.startswith(replaced[0]) for file in others):
                raise InputError(f"{repo_id}: it already holds another app ({others[0]}): choose another Space")
            api.create_repo(repo_id, repo_type="space", space_sdk=sdk, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                repo_type="space",
                folder_path=name,
                delete_patterns=[file for file in before if file.startswith(tuple(replaced))],
                commit_message="Upload the demo",
            )
    return f"{api.endpoint}/spaces/{repo_id}"


def _is_of_a_checkpoint(name: str) -> bool:
    """Return whether a file may be one of an earlier upload that a later one does not have."""
    ours = name.endswith((".safetensors", ".safetensors.index.json", ".py"))
    return name.startswith("onnx/") or ("/" not in name and ours)


def _without_card(files: list[str]) -> list[str]:
    """Return the files of a repository that are not there when it is made on the website."""
    return [name for name in files if name != "README.md"]


def _check_same_model_type(api: HfApi, repo_id: str, before: list[str]) -> None:
    others = _without_card(before)
    if not others:
        return
    if "config.json" not in others:
        raise InputError(f"{repo_id}: it holds {others[0]} and no model of this kind: choose another repository")
    size = get_hf_file_metadata(hf_hub_url(repo_id, "config.json", endpoint=api.endpoint)).size or 0
    config = None
    if size <= MAX_CONFIG:
        with suppress(InputError):
            config = read_json(api.hf_hub_download(repo_id, "config.json"))
    if not isinstance(config, dict):
        raise InputError(f"{repo_id}: its config.json is not that of a model: choose another repository")
    if config.get("model_type") != NanoVLMConfig.model_type:
        raise InputError(
            f"{repo_id}: it already holds a model of type {config.get('model_type')!r}: choose another repository"
        )

"""Publishing a checkpoint on the Hub: weights, processor, card, figures, and the code that loads it, in one commit."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .checkpoints import PACKAGED
from .configuration_nanovlm import NanoVLMConfig
from .errors import InputError, UsageError, first_line
from .files import link_or_copy
from .uploading import need_token, reason_of

METRICS = {
    "eval_loss": "Validation loss (nats per token)",
    "eval_loss_wrong_photo": "Validation loss with a wrong photo (nats per token)",
    "grounding_gap": "Grounding gap (nats per token)",
}
WITH_AUTO_MAP = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def stage_checkpoint(checkpoint: str, repo_id: str, folder: Path, code: bool = True) -> None:
    """Writes a folder as it is on the Hub.

    Args:
        checkpoint: packaged name or folder, with `README.md` and `metrics.json`.
        repo_id: `namespace/name`, which the card's example loads from.
        folder: to write.
        code: with the Python files and the `auto_map` that let it load where the package is not installed.

    Raises:
        InputError: if the checkpoint is not whole, or its card does not say what its metrics are.
    """
    from .completion import load_model

    source = Path(PACKAGED.get(checkpoint, checkpoint))
    model, processor = load_model(checkpoint)
    for name in ("README.md", "metrics.json"):
        if not (source / name).exists():
            raise InputError(f"{checkpoint}: there is no {name}: training writes it, and training/export.py")
    # The files go as they are: saving anew could change the weights' precision.
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file():
            link_or_copy(path, folder / path.name)
    if code:
        _add_code(model, processor, folder)
    card = _card(source, repo_id)
    (folder / "README.md").unlink()
    (folder / "README.md").write_text(card, encoding="utf-8")


def _add_code(model: Any, processor: Any, folder: Path) -> None:
    from .hub import save_with_code

    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        save_with_code(model, processor, made)
        for path in made.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
        for file in WITH_AUTO_MAP:
            if not ((made / file).exists() and (folder / file).exists()):
                continue
            auto_map = json.loads((made / file).read_text(encoding="utf-8")).get("auto_map")
            if auto_map is not None:
                fields = json.loads((folder / file).read_text(encoding="utf-8")) | {"auto_map": auto_map}
                (folder / file).unlink()  # it may be a link to the checkpoint's own
                (folder / file).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _card(source: Path, repo_id: str) -> str:
    """The checkpoint's card with its address on the Hub, and its metrics in the metadata."""
    metrics = json.loads((source / "metrics.json").read_text(encoding="utf-8"))
    card = ModelCard.load(source / "README.md", ignore_metadata_errors=False)
    for name in METRICS:
        if not isinstance(metrics.get(name), (int, float)):
            raise InputError(f"{source.name}: metrics.json has no {name}: make the checkpoint anew")
        if f"{metrics[name]:.3f}" not in card.text:
            raise InputError(
                f"{source.name}: README.md does not say {name} {metrics[name]:.3f} of metrics.json: make it anew"
            )
    card.data.model_name = repo_id.split("/")[1]
    card.data.eval_results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="nanovlm_hf",
            dataset_name="validation photos, see the card",
            metric_type=name,
            metric_name=title,
            metric_value=round(metrics[name], 4),
        )
        for name, title in METRICS.items()
    ]
    card.text = re.sub(r"^folder = .*$", f'folder = "{repo_id}"', card.text, count=1, flags=re.MULTILINE)
    return str(card)


def push_checkpoint(
    checkpoint: str, repo_id: str, *, code: bool = True, private: bool = False, dry_run: bool = False
) -> tuple[str, list[tuple[str, int]]]:
    """Uploads a checkpoint as a model repository, in one commit: all of it, or nothing.

    Args:
        checkpoint, repo_id, code: as `stage_checkpoint`.
        dry_run: writes nothing and asks nobody.

    Returns:
        The repository's address, and the files with their sizes in bytes.

    Raises:
        UsageError: for an impossible name, or if there is no token.
        InputError: if the checkpoint is not whole, the repository holds another kind of model, or the Hub refuses it or
            cannot be reached; the repository is then as it was.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id}: {first_line(error)}") from None
    if repo_id.count("/") != 1:
        raise UsageError(f"{repo_id}: name it as namespace/name")
    if not dry_run:
        need_token()
    api = HfApi()
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name) / "checkpoint"
        stage_checkpoint(checkpoint, repo_id, stage, code)
        files = [(path.name, path.stat().st_size) for path in sorted(stage.iterdir())]
        if not dry_run:
            try:
                _refuse_other_model(api, repo_id)
                api.create_repo(repo_id, private=private or None, exist_ok=True)
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=stage,
                    # What an earlier upload left and this one has not.
                    delete_patterns=["*.safetensors", "*.safetensors.index.json", "*.py"],
                    commit_message=f"Upload {Path(checkpoint).name}",
                )
            except InputError:
                raise
            except Exception as error:
                raise InputError(f"{repo_id}: {reason_of(error)}") from None
    return f"{api.endpoint}/{repo_id}", files


def _refuse_other_model(api: HfApi, repo_id: str) -> None:
    if not (api.repo_exists(repo_id) and api.file_exists(repo_id, "config.json")):
        return
    config = json.loads(Path(api.hf_hub_download(repo_id, "config.json")).read_text(encoding="utf-8"))
    if config.get("model_type") != NanoVLMConfig.model_type:
        raise InputError(
            f"{repo_id}: there is a model of type {config.get('model_type')!r} already: name another repository"
        )

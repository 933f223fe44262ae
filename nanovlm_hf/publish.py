"""Publishing a checkpoint on the Hub: weights, processor, card, figures, and the code that loads it, in one commit."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .checkpoints import SHIPPED
from .configuration_nanovlm import NanoVLMConfig
from .data.sources import read_json
from .errors import InputError, UsageError, first_line
from .files import link_or_copy
from .uploading import need_token, reason_of

# What a card's metadata say: of `metrics.json`, and of `evaluation.json` where a checkpoint has one.
METRICS = {
    "eval_loss": "Validation loss (nats per token)",
    "eval_loss_wrong_photo": "Validation loss with a wrong photo (nats per token)",
    "grounding_gap": "Grounding gap (nats per token)",
}
EVALUATED = {
    "r_at_1_of_32": ("Own description the likeliest of 32", ("grounding", "retrieval", "32", "r_at_1", "mean")),
    "things_precision": ("Things named that people saw", ("in_domain", "mentions", "precision", "mean")),
    "rouge1_nearest": ("ROUGE-1 to the nearest training text", ("in_domain", "originality", "rouge1_nearest")),
}
WITH_AUTO_MAP = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def stage_checkpoint(checkpoint: str, repo_id: str, folder: Path, code: bool = True) -> None:
    """Writes a folder as it is on the Hub.

    Args:
        checkpoint: short name or folder, with `README.md` and `metrics.json`.
        repo_id: `namespace/name`, which the card's example loads from.
        folder: to write.
        code: with the Python files and the `auto_map` that let it load where the package is not installed.

    Raises:
        InputError: if the checkpoint is not whole, or its card does not say what its metrics are.
    """
    from .completion import load_model

    source = Path(SHIPPED.get(checkpoint, checkpoint))
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


def eval_results(folder: Path) -> list[EvalResult]:
    """A checkpoint's numbers as the Hub's model-index has them, rounded to four digits.

    Raises:
        InputError: if a metric is missing.
    """
    metrics = read_json(folder / "metrics.json")
    for name in METRICS:
        if not isinstance(metrics.get(name), (int, float)):
            raise InputError(f"{folder.name}: metrics.json has no {name}: make the checkpoint anew")
    found = [("validation", name, title, metrics[name]) for name, title in METRICS.items()]
    if (folder / "evaluation.json").exists():
        evaluation = read_json(folder / "evaluation.json")
        for name, (title, keys) in EVALUATED.items():
            value = evaluation
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is None:
                raise InputError(f"{folder.name}: evaluation.json has no {'.'.join(keys)}: evaluate it anew")
            found.append(("validation" if keys[0] == "grounding" else "test", name, title, value))
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="nanovlm_hf",
            dataset_name=f"{split} photos, see the card",
            dataset_split=split,
            metric_type=name,
            metric_name=title,
            metric_value=round(value, 4),
        )
        for split, name, title, value in found
    ]


def _card(source: Path, repo_id: str) -> str:
    """The checkpoint's card with its address on the Hub; its table and metadata have to say what its files do."""
    card = ModelCard.load(source / "README.md", ignore_metadata_errors=False)
    metrics = read_json(source / "metrics.json")
    said = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    for result in eval_results(source):
        name, value = result.metric_type, result.metric_value
        if said.get(name) != value or (name in METRICS and f"| {metrics[name]:.3f}" not in card.text):
            raise InputError(f"{source.name}: README.md does not say that {name} is {value}: use training/card.py")
    namespace, card.data.model_name = repo_id.split("/")
    datasets = card.data.datasets or []
    card.data.datasets = [name if "/" in name else f"{namespace}/{name}" for name in datasets] or None
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
    api = _hub(repo_id, dry_run)
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name) / "checkpoint"
        stage_checkpoint(checkpoint, repo_id, stage, code)
        staged = [(path.name, path.stat().st_size) for path in sorted(stage.iterdir())]
        if not dry_run:
            with _one_line(repo_id):
                _refuse_other_model(api, repo_id)
                api.create_repo(repo_id, private=private or None, exist_ok=True)
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=stage,
                    # What an earlier upload left and this one has not.
                    delete_patterns=["*.safetensors", "*.safetensors.index.json", "*.py"],
                    commit_message=f"Upload {Path(checkpoint).name}",
                )
    return f"{api.endpoint}/{repo_id}", staged


def _hub(repo_id: str, dry_run: bool = False) -> HfApi:
    """The Hub, after what can be known without asking it: the name, and that there is a token."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id}: {first_line(error)}") from None
    if repo_id.count("/") != 1:
        raise UsageError(f"{repo_id}: name it as namespace/name")
    if not dry_run:
        need_token()
    return HfApi()


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # huggingface_hub's, and those of the two HTTP libraries that its versions use
        raise InputError(f"{repo_id}: {reason_of(error)}") from None


def stage_space(folder: Path) -> None:
    """Writes the demo as a Space has it: the page, this package, and the checkpoints at hand."""
    page = Path(str(files("nanovlm_hf.hub_cards.space")))
    shutil.copytree(page, folder, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"), dirs_exist_ok=True)
    shutil.copytree(Path(__file__).parent, folder / "nanovlm_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name, checkpoint in SHIPPED.items():
        if Path(__file__).parent not in checkpoint.parents:
            shutil.copytree(checkpoint, folder / "checkpoints" / name)


def push_space(repo_id: str) -> str:
    """Uploads the demo as a Gradio Space, in one commit.

    Args:
        repo_id: `namespace/name`.

    Returns:
        The Space's address.

    Raises:
        UsageError, InputError: as `push_checkpoint`.
    """
    api = _hub(repo_id)
    with tempfile.TemporaryDirectory() as name:
        stage_space(Path(name))
        with _one_line(repo_id):
            api.create_repo(repo_id, repo_type="space", space_sdk="gradio", exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                repo_type="space",
                folder_path=name,
                delete_patterns=["nanovlm_hf/**", "checkpoints/**"],
                commit_message="Upload the demo",
            )
    return f"{api.endpoint}/spaces/{repo_id}"


def _refuse_other_model(api: HfApi, repo_id: str) -> None:
    if not (api.repo_exists(repo_id) and api.file_exists(repo_id, "config.json")):
        return
    config = json.loads(Path(api.hf_hub_download(repo_id, "config.json")).read_text(encoding="utf-8"))
    if config.get("model_type") != NanoVLMConfig.model_type:
        raise InputError(
            f"{repo_id}: there is a model of type {config.get('model_type')!r} already: name another repository"
        )

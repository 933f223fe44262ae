"""Local copies of what is published: a checkpoint with its code, and the demo as a Space."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..checkpoints import SHIPPED
from ..errors import InputError, first_line
from ..files import link_or_copy, read_json, read_jsonl, validate
from .model_metadata import hub_card
from .publishable import publishable

PACKAGE = Path(__file__).parents[1]
SPACE_FILES = ("README.md", "app.py", "requirements.txt", "examples/*.jpg", "examples/README.md")
PACKAGE_FILES = ("**/*.py", "data/prompts/*.txt", "evaluation/assets/*.*", "evaluation/templates/*.*", "stop_words.txt")
WITH_AUTO_MAP = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def stage_checkpoint(checkpoint: str, repo_id: str, folder: Path, code: bool = True, onnx: bool = False) -> list[str]:
    """Write a checkpoint's folder as it will be on the Hub.

    Args:
        checkpoint: short name, or folder with `README.md` and `metrics.json`.
        repo_id: `namespace/name`, for the example in the card.
        folder: folder to write.
        code: whether to add the Python files and the `auto_map` with which it loads without this package.
        onnx: whether to export it to `onnx/` as well, for onnxruntime and transformers.js.

    Returns:
        The names in the checkpoint's folder that are not published.

    Raises:
        InputError: if the checkpoint is incomplete, its card does not state its metrics, or a file holds a secret or
            the path of a home directory.
    """
    from ..loading import load_model

    source = Path(SHIPPED.get(checkpoint, checkpoint))
    if not source.is_dir():
        raise InputError(f"{checkpoint}: not a local folder or a released checkpoint ({', '.join(SHIPPED)})")
    chosen, skipped = publishable(source)
    for name in ("README.md", "metrics.json"):
        if name not in chosen:
            raise InputError(
                f"{checkpoint}: {name} is missing: training writes it, and `python -m nanovlm_hf.training.export`"
            )
    card = hub_card(source, repo_id, code, onnx)
    if "metrics.jsonl" in chosen:
        list(read_jsonl(source / "metrics.jsonl"))  # raises if a line is not JSON
    # The files are published unchanged, as saving them again could change the precision of the weights.
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in chosen.items():
        link_or_copy(path, folder / name)
    try:
        model, processor = load_model(str(folder))  # it has to load without the files that are not published
        if onnx:
            _add_onnx(folder)
        for file in WITH_AUTO_MAP:
            _set_auto_map(folder / file, None)  # it may name the code of another project
        if code:
            _add_code(model, processor, folder)
    except InputError as error:
        raise InputError(str(error).replace(str(folder), checkpoint)) from None
    except Exception as error:  # Transformers loads some settings that it refuses to save
        raise InputError(f"{checkpoint}: cannot be saved with its code ({first_line(error)})") from None
    (folder / "README.md").unlink()  # it may be a hard link to the checkpoint's own
    (folder / "README.md").write_text(card, encoding="utf-8")
    return skipped


def _add_onnx(folder: Path) -> None:
    """Export a staged checkpoint to its `onnx/`, with the configuration files that transformers.js needs."""
    from ..export.onnx import export_onnx

    with tempfile.TemporaryDirectory() as name:
        exported = Path(name)
        export_onnx(str(folder), exported)
        shutil.copytree(exported / "onnx", folder / "onnx")
        for file in ("config.json", "generation_config.json"):
            shutil.copyfile(exported / file, folder / "onnx" / file)


def _add_code(model: Any, processor: Any, folder: Path) -> None:
    from .code import save_with_code

    with tempfile.TemporaryDirectory() as name:
        saved = Path(name)
        save_with_code(model, processor, saved)
        for path in saved.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
        for file in WITH_AUTO_MAP:
            if (saved / file).exists():
                _set_auto_map(folder / file, read_json(saved / file).get("auto_map"))


def _set_auto_map(path: Path, auto_map: dict[str, str] | None) -> None:
    """Set or remove the `auto_map` of a staged configuration file, if there is such a file."""
    if not path.exists():
        return
    before = validate(read_json(path), dict[str, Any], path.name)
    fields = {name: value for name, value in before.items() if name != "auto_map"}
    if auto_map is not None:
        fields["auto_map"] = auto_map
    if fields != before:
        path.unlink()  # it may be a hard link to the checkpoint's own
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def stage_space(folder: Path) -> None:
    """Write the demo as a Space: the app, this package and the released checkpoints, without other files.

    Args:
        folder: folder to write.

    Raises:
        InputError: if a file of a checkpoint holds a secret or the path of a home directory.
    """
    _copy(Path(str(files("nanovlm_hf.hub_cards.space"))), folder, SPACE_FILES)
    _copy(PACKAGE, folder / "nanovlm_hf", PACKAGE_FILES)
    for name, checkpoint in SHIPPED.items():
        inside = PACKAGE in checkpoint.parents
        target = folder / ("nanovlm_hf/checkpoints" if inside else "checkpoints") / name
        target.mkdir(parents=True)
        for file, path in publishable(checkpoint)[0].items():
            shutil.copyfile(path, target / file)


def stage_page(folder: Path) -> None:
    """Write the page that runs the model in the browser as a static Space.

    Args:
        folder: folder to write.

    Raises:
        InputError: if a checkpoint cannot be exported.
    """
    from ..export.page import build_page

    build_page(folder)
    shutil.copyfile(Path(str(files("nanovlm_hf.hub_cards"))) / "space_static.md", folder / "README.md")


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if not hidden and path.is_file() and path.resolve().is_relative_to(source.resolve()):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)

"""Local copies of what is published: a checkpoint with its code, and the demo as a Space."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..checkpoints import SHIPPED
from ..errors import InputError, first_line
from ..files import link_or_copy, parse_json, read_json, read_jsonl, read_text, validate
from ..untrusted_files import read_object
from .model_metadata import hub_card
from .publishable import VOCABULARIES, publishable

PACKAGE = Path(__file__).parents[1]
SPACE_FILES = ("README.md", "app.py", "requirements.txt", "examples/*.jpg", "examples/README.md")
PACKAGE_FILES = ("**/*.py", "data/prompts/*.txt", "evaluation/assets/*.*", "evaluation/templates/*.*", "stop_words.txt")
WITH_AUTO_MAP = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
# Fields with which Transformers or Diffusers loads code, compiled kernels or files of another repository.
FOREIGN_CODE = frozenset(
    (
        *(
            "auto_map",
            "custom_generate",
            "custom_pipelines",
            "trust_remote_code",
            "code_revision",
            "quantization_config",
        ),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"),
        *("_experts_implementation", "_experts_implementation_internal", "use_kernels", "kernel_config"),
        *("_name_or_path", "name_or_path", "base_model_name_or_path", "assistant_model", "transformers_weights"),
        *("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file"),
    )
)


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

    source = Path(SHIPPED.get(checkpoint, checkpoint)).expanduser()
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
    # The weights keep their values: saving the model again could change their precision.
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in chosen.items():
        link_or_copy(path, folder / name)
    try:
        model, processor = load_model(str(folder))  # it has to load without the files that are not published
        if onnx:
            _add_onnx(folder)
        _write_current_names(folder)
        for path in folder.glob("*.json"):
            if path.name not in VOCABULARIES:
                _remove_foreign_code(path)
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


def _remove_foreign_code(path: Path) -> None:
    """Remove the fields that name code of another project from a staged JSON file, however deep they are."""
    text = read_text(path)
    before = parse_json(text, path)
    try:
        after = _without_foreign_code(before)
        # A file that names a field twice holds more than what is parsed.
        if after != before or any(f'"{name}"' in text for name in FOREIGN_CODE):
            _write_json(path, after)
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply") from None


def _without_foreign_code(content: Any) -> Any:
    if isinstance(content, list):
        return [_without_foreign_code(one) for one in content]
    if isinstance(content, dict):
        return {name: _without_foreign_code(one) for name, one in content.items() if name not in FOREIGN_CODE}
    return content


def _set_auto_map(path: Path, auto_map: dict[str, str] | None) -> None:
    """Set the `auto_map` of a staged configuration file, if there is such a file."""
    if path.exists() and auto_map is not None:
        _write_json(path, validate(read_json(path), dict[str, Any], path.name) | {"auto_map": auto_map})


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    path.unlink()  # it may be a hard link to the checkpoint's own
    path.write_text(text, encoding="utf-8")


def _write_current_names(folder: Path) -> None:
    """Rename the weights of a staged checkpoint of version 0.1.0, whose names only this package knows."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from ..loading import INDEX, MAX_HEADER

    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = {name: _current_name(name) for name in file.keys()}  # noqa: SIM118
        if len(set(names.values())) != len(names):
            raise InputError(f"{path}: it has a weight under two names: save the model again")
        if any(new != old for old, new in names.items()):
            weights = {names[name]: weight for name, weight in load_file(path).items()}
            path.unlink()  # it may be a hard link to the checkpoint's own
            save_file(weights, path, metadata={"format": "pt"})
    path = folder / INDEX
    if path.exists():
        index = read_object(folder, INDEX, MAX_HEADER)
        files_of = validate(index.get("weight_map"), dict[str, str], f"{path}: weight_map")
        renamed = {_current_name(name): file for name, file in files_of.items()}
        if renamed != files_of:
            _write_json(path, index | {"weight_map": renamed})


def _current_name(name: str) -> str:
    """Return the name of a weight that version 0.1.0 may have called `name`."""
    from ..modeling_nanovlm import NanoVLMForConditionalGeneration

    for pattern, replacement in NanoVLMForConditionalGeneration._names_0_1_0.items():
        current, found = re.subn(pattern, replacement, name)
        if found:
            return current
    return name


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

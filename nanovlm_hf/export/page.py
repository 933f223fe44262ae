"""The page that runs the model in the browser: its files, the exported checkpoints and the example images.

The page itself, `hub_cards/space_static/`, is built from `hub_cards/space_static_src/`. The weights are exported when
the page is first needed, and kept in the cache of `huggingface_hub`: the package holds no second copy of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from .._version import __version__
from ..checkpoints import SHIPPED
from ..configuration_nanovlm import NanoVLMConfig
from ..files import link_or_copy
from ..variants import VARIANTS

MODELS = tuple(name for variant in VARIANTS if (name := f"mini-{variant}") in SHIPPED)
DTYPE = "fp16"
EXPORTED_FROM = ("config.json", "generation_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Images of `hub_cards/space/examples/` by name, and the beginning of a sentence about each.
EXAMPLES = {
    "camera": "A man in a black coat",
    "astronaut": "A woman in an orange suit",
    "cat": "A brown cat looks",
    "coffee": "A red cup of coffee",
    "rocket": "A tall rocket in the dark sky",
}


def build_page(folder: Path, names: Sequence[str] = MODELS) -> None:
    """Write the page with its models and examples; exporting the models takes about half a minute the first time.

    Args:
        folder: folder to write.
        names: of released checkpoints.

    Raises:
        InputError: if a checkpoint cannot be loaded.
    """
    page = Path(str(files("nanovlm_hf.hub_cards"))) / "space_static"
    for path in sorted(page.rglob("*")):
        if path.is_file():
            _place(path, folder / path.relative_to(page))
    examples = Path(str(files("nanovlm_hf.hub_cards.space"))) / "examples"
    for path in sorted(examples.iterdir()):
        _place(path, folder / "examples" / path.name)
    models = [_add_model(name, folder) for name in names]
    listing = {
        "models": models,
        "examples": [{"file": f"examples/{name}.jpg", "prefix": prefix} for name, prefix in EXAMPLES.items()],
    }
    (folder / "models.json").write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")


def _add_model(name: str, folder: Path) -> dict[str, Any]:
    """Export a released checkpoint into the page's folder and return its entry in `models.json`."""
    exported = exported_folder(name)
    target = folder / "models" / exported.name
    for path in sorted(exported.rglob("*")):
        if path.is_file():
            _place(path, target / path.relative_to(exported))
    size, _, variant = name.partition("-")
    return {
        "name": name,
        "folder": exported.name,  # changes with the weights, as browsers keep what is in it
        "style": variant,
        "words": "{} to {}".format(*VARIANTS[variant].requested.words),
        "parameters": f"{NanoVLMConfig.from_preset(size).parameter_counts()['total'] / 1e6:.1f}M",
        "bytes": sum(path.stat().st_size for path in target.glob("onnx/*.onnx")),
    }


def exported_folder(name: str) -> Path:
    """Return the folder of an exported checkpoint in the cache; it is exported if it is not there.

    Args:
        name: of a released checkpoint.

    Raises:
        InputError: if the checkpoint cannot be loaded.
    """
    cached = cached_assets_path("nanovlm_hf", namespace="page", subfolder=f"{name}-{_fingerprint(name)}")
    if (cached / "onnx").is_dir():
        return cached
    print(f"exporting {name} to {cached}", file=sys.stderr, flush=True)
    from .onnx import write_onnx

    with tempfile.TemporaryDirectory(dir=cached.parent) as temporary:
        partial = Path(temporary) / "export"
        write_onnx(name, partial, DTYPE)
        try:
            cached.rmdir()  # `cached_assets_path` creates it
            os.replace(partial, cached)
        except OSError:
            if not (cached / "onnx").is_dir():  # or another process has stored the same export meanwhile
                raise
    return cached


def _fingerprint(name: str) -> str:
    """Return a hash of what an export depends on."""
    digest = hashlib.sha256(__version__.encode())
    weights = sorted(SHIPPED[name].glob("model*.safetensors"))
    for path in (*weights, *(SHIPPED[name] / file for file in (*EXPORTED_FROM, *TOKENIZER_FILES))):
        digest.update(path.read_bytes())
    for module in ("export/onnx.py", "export/page.py", "generation_nanovlm.py", "modeling_nanovlm.py"):
        digest.update((Path(__file__).parents[1] / module).read_bytes())
    return digest.hexdigest()[:12]


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    link_or_copy(source, target)

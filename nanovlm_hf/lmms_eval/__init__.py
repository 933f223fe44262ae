"""For lmms-eval: the model `nanovlm_hf`, and in `tasks/` captions from their beginning, which `--include_path` adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASKS = Path(__file__).parent / "tasks"


def manifest() -> Any:
    """Return the model's entry in lmms-eval's registry, which reads the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("nanovlm_hf", simple_class_path=f"{__name__}.model.NanoVLM")

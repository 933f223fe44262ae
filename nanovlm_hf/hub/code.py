"""Save checkpoints with their code, for `trust_remote_code=True` without the package."""

from __future__ import annotations

from pathlib import Path

from ..configuration_nanovlm import NanoVLMConfig
from ..hub_nanovlm import registered
from ..image_processing_nanovlm import NanoVLMImageProcessor
from ..modeling_nanovlm import NanoVLMForConditionalGeneration
from ..processing_nanovlm import NanoVLMProcessor

AUTO_CLASSES = {
    NanoVLMConfig: "AutoConfig",
    NanoVLMForConditionalGeneration: "AutoModelForImageTextToText",
    NanoVLMProcessor: "AutoProcessor",
    NanoVLMImageProcessor: "AutoImageProcessor",
}


def save_with_code(model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor, folder: str | Path) -> None:
    """Save a model and its processor with the code that loads them and the `auto_map` that names it."""
    with registered(AUTO_CLASSES):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def register_code() -> None:
    """Make every later `save_pretrained` of this process write the code, for a `Trainer` with `push_to_hub=True`.

    `push_to_hub` of models and processors does so by itself. A `Trainer` does not call it, but uploads its folder.
    """
    for one, auto_class in AUTO_CLASSES.items():
        one.register_for_auto_class(auto_class)


__all__ = ["register_code", "save_with_code"]

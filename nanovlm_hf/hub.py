"""Checkpoint folders that carry their code, for `trust_remote_code=True` where the package is not installed."""

from __future__ import annotations

import copy
from pathlib import Path

from .configuration_nanovlm import NanoVLMConfig
from .image_processing_nanovlm import NanoVLMImageProcessor
from .modeling_nanovlm import NanoVLMForConditionalGeneration
from .processing_nanovlm import NanoVLMProcessor

MODEL_AUTO_CLASSES = {
    "AutoModel": "NanoVLMModel",
    "AutoModelForImageTextToText": "NanoVLMForConditionalGeneration",
    "AutoModelForVision2Seq": "NanoVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "NanoVLMForConditionalGeneration",
}


def save_with_code(model: NanoVLMForConditionalGeneration, processor: NanoVLMProcessor, folder: str | Path) -> None:
    """Saves a model and its processor with the code that loads them and the `auto_map` that names it.

    Transformers copies the files that the classes stand in, and those that these import.
    """
    classes = {
        NanoVLMConfig: "AutoConfig",
        NanoVLMForConditionalGeneration: "AutoModelForImageTextToText",
        NanoVLMProcessor: "AutoProcessor",
        NanoVLMImageProcessor: "AutoImageProcessor",
    }
    config = model.config
    model.config = copy.deepcopy(config)
    # Saving adds one entry, that of the class which is saved; the others are put there before.
    model.config.auto_map = {name: f"modeling_nanovlm.{class_name}" for name, class_name in MODEL_AUTO_CLASSES.items()}
    try:
        for one, auto_class in classes.items():
            one.register_for_auto_class(auto_class)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:
        model.config = config
        for one in classes:
            one._auto_class = None


__all__ = ["save_with_code"]

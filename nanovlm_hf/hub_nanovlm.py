"""Register classes for the time in which they are saved, so that their code is saved with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MODEL_AUTO_CLASSES = {
    "AutoModel": "modeling_nanovlm.NanoVLMModel",
    "AutoModelForImageTextToText": "modeling_nanovlm.NanoVLMForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_nanovlm.NanoVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_nanovlm.NanoVLMForConditionalGeneration",
}


@contextmanager
def registered(classes: dict[Any, str]) -> Iterator[None]:
    """Register classes with Auto classes for the block: `save_pretrained` copies their files and those they import.

    Elsewhere it writes no code, because `pipeline` of Transformers 5 asks whether to run the code of a local folder.

    Args:
        classes: the name of the Auto class of each class.
    """
    before = {one: one._auto_class for one in classes}
    try:
        for one, auto_class in classes.items():
            one.register_for_auto_class(auto_class)
        yield
    finally:
        for one, auto_class in before.items():
            one._auto_class = auto_class


__all__ = ["MODEL_AUTO_CLASSES", "registered"]

"""NanoVLM for Transformers: vision-language models of 5M to 25M parameters that complete a sentence about a picture.

Importing this package registers its classes with Transformers' Auto classes.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from ._compat import AutoModelForVision2Seq
    from .checkpoints import SHIPPED
    from .configuration_nanovlm import PRESETS, NanoVLMConfig, NanoVLMTextConfig, NanoVLMVisionConfig
    from .errors import InputError
    from .image_processing_nanovlm import NanoVLMImageProcessor
    from .modeling_nanovlm import (
        NanoVLMForConditionalGeneration,
        NanoVLMModel,
        NanoVLMPreTrainedModel,
        NanoVLMTextModel,
        NanoVLMVisionModel,
    )
    from .processing_nanovlm import NanoVLMProcessor

_MODULE_OF = {
    "AutoModelForVision2Seq": "_compat",
    "InputError": "errors",
    "NanoVLMConfig": "configuration_nanovlm",
    "NanoVLMForConditionalGeneration": "modeling_nanovlm",
    "NanoVLMImageProcessor": "image_processing_nanovlm",
    "NanoVLMModel": "modeling_nanovlm",
    "NanoVLMPreTrainedModel": "modeling_nanovlm",
    "NanoVLMProcessor": "processing_nanovlm",
    "NanoVLMTextConfig": "configuration_nanovlm",
    "NanoVLMTextModel": "modeling_nanovlm",
    "NanoVLMVisionConfig": "configuration_nanovlm",
    "NanoVLMVisionModel": "modeling_nanovlm",
    "PRESETS": "configuration_nanovlm",
    "SHIPPED": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])


# The `nanovlm` command needs no Auto class: its --help and its messages need not wait seconds for PyTorch.
if PurePath(next(iter(getattr(sys, "argv", [])), "")).name not in ("nanovlm", "nanovlm.exe"):
    from . import auto as _auto  # noqa: F401

__all__ = [
    "PRESETS",
    "SHIPPED",
    "AutoModelForVision2Seq",
    "InputError",
    "NanoVLMConfig",
    "NanoVLMForConditionalGeneration",
    "NanoVLMImageProcessor",
    "NanoVLMModel",
    "NanoVLMPreTrainedModel",
    "NanoVLMProcessor",
    "NanoVLMTextConfig",
    "NanoVLMTextModel",
    "NanoVLMVisionConfig",
    "NanoVLMVisionModel",
    "__version__",
]

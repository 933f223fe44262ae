"""NanoVLM for Transformers: vision-language models of 5M to 25M parameters that complete descriptions of images.

Importing this package registers its classes with Transformers' Auto classes.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoints import SHIPPED
    from .compat_nanovlm import AutoModelForVision2Seq
    from .configuration_nanovlm import NanoVLMConfig, NanoVLMTextConfig, NanoVLMVisionConfig
    from .errors import InputError
    from .image_processing_nanovlm import NanoVLMImageProcessor
    from .modeling_nanovlm import (
        NanoVLMForConditionalGeneration,
        NanoVLMModel,
        NanoVLMPreTrainedModel,
        NanoVLMTextModel,
        NanoVLMVisionModel,
    )
    from .paper_nanovlm import PRESETS
    from .processing_nanovlm import NanoVLMProcessor

_MODULE_OF = {
    "AutoModelForVision2Seq": "compat_nanovlm",
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
    "PRESETS": "paper_nanovlm",
    "SHIPPED": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])


# The `nanovlm` command registers no Auto class, so that its --help does not wait for PyTorch to be imported.
if "nanovlm_command" not in sys.modules:
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

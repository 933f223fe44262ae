"""Differences between Transformers 4.57 and 5.x.

The selection of the attention implementation in `modeling_nanovlm.py` is the exception: Transformers searches that file
for it. This file is saved with checkpoints that carry their code, so it imports no other module of the package; its
name does not begin with an underscore, as `Trainer` uploads no such file.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")

if IS_TRANSFORMERS_4:
    from torch.nn import init
    from transformers import AutoModelForVision2Seq
else:
    # The functions of version 5 do not overwrite weights that were loaded from a checkpoint.
    from transformers import AutoModelForImageTextToText as AutoModelForVision2Seq
    from transformers import initialization as init

# The Auto classes of the model with its head: the second exists in version 4 only, the third in version 5 only.
AUTO_MODEL_CLASSES = [
    getattr(transformers, name)
    for name in ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForMultimodalLM")
    if hasattr(transformers, name)
]
HAS_IMAGE_BACKENDS = "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters
_MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters


def causal_mask(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache_position: torch.Tensor,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    eager: bool = False,
) -> torch.Tensor | None:
    """Return the causal mask for `inputs_embeds` (batch, length, width).

    It has the form that the config's attention implementation takes, or with `eager` that of eager attention.
    """
    if eager and config._attn_implementation != "eager":
        config = copy.copy(config)
        config._attn_implementation = "eager"
    embeds_name = "inputs_embeds" if "inputs_embeds" in _MASK_PARAMETERS else "input_embeds"
    arguments = {
        "config": config,
        embeds_name: inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    if "cache_position" in _MASK_PARAMETERS:
        arguments["cache_position"] = cache_position
    return create_causal_mask(**arguments)


def register_image_processor(config_class: type, image_processor_class: type) -> None:
    """Register an image processor with `AutoImageProcessor`, since version 5.4 for both backends.

    Earlier versions have no backends, and accept as a fast image processor only a class that inherits from their own.
    """
    if not HAS_IMAGE_BACKENDS:
        AutoImageProcessor.register(config_class, slow_image_processor_class=image_processor_class, exist_ok=True)
        return
    backends = {"pil": image_processor_class, "torchvision": image_processor_class}
    AutoImageProcessor.register(config_class, image_processor_classes=backends, exist_ok=True)


def mismatched_weights(loading_info: dict[str, Any]) -> list[str]:
    """Return the names of the weights with another shape than the model's, from the report of `from_pretrained`."""
    return sorted(key if isinstance(key, str) else key[0] for key in loading_info["mismatched_keys"])


def forget_renaming(model: PreTrainedModel, key_mapping: dict[str, str]) -> None:
    """Make `save_pretrained` write a model's own weight names: version 5 restores those that `key_mapping` renamed."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [one for one in conversions if key_mapping.keys().isdisjoint(one.source_patterns)]


def make_tokenizer_portable(folder: str | Path) -> None:
    """Rewrite a saved `tokenizer_config.json` so that 4.57 and 5.x both load it, without how it was loaded last.

    Version 5 names a class that 4.57 does not have and stores additional special tokens under another key.
    """
    path = Path(folder) / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    for name in ("backend", "is_local", "local_files_only"):
        fields.pop(name, None)
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = [
    "AUTO_MODEL_CLASSES",
    "HAS_IMAGE_BACKENDS",
    "IS_TRANSFORMERS_4",
    "AutoModelForVision2Seq",
    "causal_mask",
    "forget_renaming",
    "init",
    "make_tokenizer_portable",
    "mismatched_weights",
    "register_image_processor",
]

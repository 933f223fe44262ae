"""Every difference between Transformers 4.57 and 5.x that this package meets.

The two attention look-ups in `modeling_nanovlm.py` are the exception: Transformers searches that file for them.
This file travels with checkpoints that carry their code, so it imports nothing else of the package.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")

if IS_TRANSFORMERS_4:
    from torch.nn import init
    from transformers import AutoModelForVision2Seq
else:
    # Version 5's functions leave weights alone that a checkpoint has filled already.
    from transformers import AutoModelForImageTextToText as AutoModelForVision2Seq
    from transformers import initialization as init

_MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters


def causal_mask(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache_position: torch.Tensor,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor | None:
    """Transformers' causal mask for `inputs_embeds` (batch, length, width), whatever its parameters are called."""
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


def mismatched_weights(loading_info: dict[str, Any]) -> list[str]:
    """Names of the weights whose shape in the file is not the model's, out of `from_pretrained`'s loading info."""
    return sorted(key if isinstance(key, str) else key[0] for key in loading_info["mismatched_keys"])


def make_tokenizer_portable(folder: str | Path) -> None:
    """Rewrites a saved `tokenizer_config.json` so that 4.57 and 5.x both load it.

    Version 5 names a class that 4.57 does not have and keeps the further special tokens under another key.
    """
    path = Path(folder) / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = [
    "IS_TRANSFORMERS_4",
    "AutoModelForVision2Seq",
    "causal_mask",
    "init",
    "make_tokenizer_portable",
    "mismatched_weights",
]

"""NanoVLM (section 2.2 of the paper) as a Transformers model: vision encoder, projector and decoder.

Shapes in comments and docstrings: B batch, T length of the sequence, D width of the encoder, C width of the decoder,
P patches of an image (196), I tokens of an image in the sequence (1, 196 or 197).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    ModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .compat_nanovlm import causal_mask, forget_renaming, init
from .configuration_nanovlm import NanoVLMConfig, NanoVLMTextConfig, NanoVLMVisionConfig
from .generation_nanovlm import greedy_settings
from .hub_nanovlm import MODEL_AUTO_CLASSES, registered
from .paper_nanovlm import projector_widths

logger = logging.get_logger(__name__)


@dataclass
class NanoVLMModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `NanoVLMModel`.

    Args:
        last_hidden_state: (B, T, C), after the decoder's last LayerNorm.
        past_key_values: keys and values of the decoder, with `use_cache`.
        hidden_states: one (B, T, C) for the embeddings and one for each layer, with `output_hidden_states`.
        attentions: one (B, heads, T, T) for each layer of the decoder, with `output_attentions`.
        image_hidden_states: (images, I, C), the projected image features; None without images.
    """

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class NanoVLMCausalLMOutputWithPast(ModelOutput):
    """Output of `NanoVLMForConditionalGeneration`: the fields of `NanoVLMModelOutputWithPast`, and these.

    Args:
        loss: mean cross-entropy in nats over the labels that are not -100; None without labels.
        logits: (B, T, vocabulary), of the positions in `logits_to_keep`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention with plain matrix products.

    Takes (B, heads, length, head width); returns (B, length, heads, head width) and the attention weights.
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :, : key.shape[-2]]
        if attention_mask.dtype == torch.bool:  # the caller prepared it for SDPA
            weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
        else:
            weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attention_forward(
    module: NanoVLMVisionAttention | NanoVLMTextAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    output_attentions: bool,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with the implementation that the config selects, or eagerly if the weights are to be returned.

    Takes (B, heads, length, head width); returns (B, length, width) and the weights, None unless they are computed.
    """
    # `set_attn_implementation` searches this file for the call of `get_interface` below (Transformers 5) or for the
    # text `ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]` (4.57).
    implementation = module.config._attn_implementation
    attention: Callable = eager_attention_forward
    if not output_attentions:
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        elif implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[implementation]
    dropout = module.config.attention_dropout if module.training else 0.0
    output, weights = attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, **kwargs
    )
    return output.flatten(2).contiguous(), weights


class NanoVLMVisionAttention(nn.Module):
    """Multi-head attention of every position to every position."""

    def __init__(self, config: NanoVLMVisionConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_queries: int | None = None,
        output_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = split_heads(self.q_proj(hidden_states[:, :num_queries]), self.head_dim)
        key = split_heads(self.k_proj(hidden_states), self.head_dim)
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        output, weights = attention_forward(self, query, key, value, None, output_attentions, **kwargs)
        return self.out_proj(output), weights


class NanoVLMTextAttention(nn.Module):
    """Multi-head causal attention with a cache."""

    def __init__(self, config: NanoVLMTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_position: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = split_heads(self.q_proj(hidden_states), self.head_dim)
        key = split_heads(self.k_proj(hidden_states), self.head_dim)
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})
        output, weights = attention_forward(self, query, key, value, attention_mask, output_attentions, **kwargs)
        return self.out_proj(output), weights


def split_heads(projected: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return (B, length, width) as (B, heads, length, head width)."""
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class NanoVLMMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: NanoVLMVisionConfig | NanoVLMTextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class NanoVLMVisionLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer of the vision encoder (figure 5)."""

    def __init__(self, config: NanoVLMVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = NanoVLMVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = NanoVLMMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the states of the first `num_queries` positions (all if None), which attend to every position."""
        attended, weights = self.self_attn(self.layer_norm1(hidden_states), num_queries=num_queries, **kwargs)
        hidden_states = hidden_states[:, :num_queries] + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.mlp(self.layer_norm2(hidden_states)))
        return hidden_states, weights


class NanoVLMTextLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer of the decoder (figure 5)."""

    def __init__(self, config: NanoVLMTextConfig, layer_idx: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = NanoVLMTextAttention(config, layer_idx)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = NanoVLMMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.self_attn(self.layer_norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.mlp(self.layer_norm2(hidden_states)))
        return hidden_states, weights


class NanoVLMPatchEmbeddings(nn.Module):
    """Turn patches into tokens (figure 4): two convolutions, each with LayerNorm and ReLU, then a linear layer.

    Takes (B, channels, height, width); returns (B, P, D), or (B, K, D) of the patches `kept` (B, K) alone.
    """

    def __init__(self, config: NanoVLMVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.conv1 = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size)
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc = nn.Linear(width, width)

    def forward(self, pixel_values: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        # The channels stay last throughout: LayerNorm needs it, and it is the faster layout for the convolutions.
        grid = self.conv1(pixel_values.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        grid = nn.functional.relu(self.layer_norm1(grid))
        if kept is None or type(self.conv2) is not nn.Conv2d:  # such as an adapter around it
            patches = self.conv2(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
            patches = patches if kept is None else patches.take_along_dim(kept[..., None], dim=1)
        else:
            patches = _convolve_at(kept, grid, self.conv2)
        return self.fc(nn.functional.relu(self.layer_norm2(patches)))


class NanoVLMVisionEmbeddings(nn.Module):
    """[CLS] and patch embeddings with learned positions, and PatchDropout while training."""

    def __init__(self, config: NanoVLMVisionConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches + 1, config.hidden_size))
        self.patch_embeddings = NanoVLMPatchEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        batch, _, height, width = pixel_values.shape
        positions = self.position_embeddings
        if interpolate_pos_encoding:
            positions = self.interpolate_pos_encoding(height, width)
        cls_position, patch_positions = positions[:, :1], positions[:, 1:]
        kept = None
        if self.training and self.config.patch_dropout:
            kept = _kept_patches(batch, patch_positions.shape[1], self.config.patch_dropout, pixel_values.device)
            patch_positions = nn.functional.embedding(kept, patch_positions[0])
        patches = self.patch_embeddings(pixel_values.to(self.cls_token.dtype), kept) + patch_positions
        cls_token = (self.cls_token + cls_position).expand(batch, -1, -1).to(patches.dtype)
        return self.dropout(torch.cat([cls_token, patches], dim=1))

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """Return the position embeddings of an image of `height` x `width` pixels, (1, P + 1, D)."""
        side, patch = self.config.image_size // self.config.patch_size, self.config.patch_size
        grid = (height // patch, width // patch)
        if grid == (side, side):
            return self.position_embeddings
        of_patches = self.position_embeddings[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        of_patches = nn.functional.interpolate(of_patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([self.position_embeddings[:, :1], of_patches.flatten(2).transpose(1, 2)], dim=1)


class NanoVLMProjector(nn.Module):
    """Visual-textual connector (section 2.2.2): two linear layers with GELU between them, as Table 2 requires.

    Takes (..., D); returns (..., C).
    """

    def __init__(self, config: NanoVLMConfig):
        super().__init__()
        width, hidden_width, text_width = projector_widths(config)
        self.fc1 = nn.Linear(width, hidden_width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.fc2 = nn.Linear(hidden_width, text_width)
        self.dropout = nn.Dropout(config.text_config.hidden_dropout)

    def forward(self, image_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.act(self.fc1(image_states))))


# Patterns for weight names of version 0.1.0, and the names that replace them. Transformers 4.57 applies only the first
# pattern that matches, version 5 all of them in turn: no name that results may match another pattern.
_LAYERS_0_1_0 = {
    r"(?<!\w)blocks\.(\d+\.)norm1\.": r"layers.\1layer_norm1.",
    r"(?<!\w)blocks\.(\d+\.)norm2\.": r"layers.\1layer_norm2.",
    r"(?<!\w)blocks\.": "layers.",
}


def _vision_names_0_1_0(tower: str, anchor: str = "") -> dict[str, str]:
    """Return the renaming of the vision encoder's weights where their names start with `tower`."""
    old = anchor + tower.replace(".", r"\.")
    return {
        old + r"cls_token$": f"{tower}embeddings.cls_token",
        old + r"position_embedding$": f"{tower}embeddings.position_embeddings",
        old + r"patch_embedding\.norm(\d)\.": tower + r"embeddings.patch_embeddings.layer_norm\1.",
        old + r"patch_embedding\.": f"{tower}embeddings.patch_embeddings.",
        old + r"pre_norm\.": f"{tower}pre_layernorm.",
        old + r"norm\.": f"{tower}post_layernorm.",
    }


class NanoVLMPreTrainedModel(PreTrainedModel):
    """Base class: weight initialisation, loading of old weight names, and capabilities of the model."""

    config: NanoVLMConfig
    config_class = NanoVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoVLMVisionEmbeddings", "NanoVLMVisionLayer", "NanoVLMTextLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _auto_class_of_code: str | None = None  # that loads the class with `trust_remote_code`; None for parts of the model
    _names_0_1_0 = {
        **_vision_names_0_1_0("vision_tower."),
        r"language_model\.position_embedding\.": "language_model.embed_positions.",
        **_LAYERS_0_1_0,
    }

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        """Load a checkpoint as every Transformers model does.

        Weights of version 0.1.0, which had other names, are renamed unless `key_mapping` is given; saving the model
        writes the current names.
        """
        if key_mapping is not None:
            return super().from_pretrained(*args, key_mapping=key_mapping, **kwargs)
        loaded = super().from_pretrained(*args, key_mapping=dict(cls._names_0_1_0), **kwargs)
        forget_renaming(loaded[0] if isinstance(loaded, tuple) else loaded, cls._names_0_1_0)
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model; with `push_to_hub`, upload it with its code, as `push_to_hub()` does."""
        save = super().save_pretrained
        if not inspect.signature(save).bind(*args, **kwargs).arguments.get("push_to_hub") and self._auto_class is None:
            return save(*args, **kwargs)
        with self._saved_with_code():
            return save(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the model with the code that loads it by `trust_remote_code=True`; push the processor as well."""
        with self._saved_with_code():
            return super().push_to_hub(*args, **kwargs)

    @contextmanager
    def _saved_with_code(self) -> Iterator[None]:
        if self._auto_class_of_code is None:
            yield
            return
        before = getattr(self.config, "auto_map", None)
        self.config.auto_map = dict(MODEL_AUTO_CLASSES)
        try:
            with registered({type(self.config): "AutoConfig", type(self): self._auto_class_of_code}):
                yield
        finally:
            del self.config.auto_map
            if before is not None:
                self.config.auto_map = before

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            std = self._initializer_range()
            init.normal_(module.weight, std=module.weight[0].numel() ** -0.5 if std is None else std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.get_text_config().initializer_range)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, NanoVLMVisionEmbeddings):
            std = self._initializer_range()
            init.normal_(module.cls_token, std=0.02 if std is None else std)
            init.normal_(module.position_embeddings, std=0.02 if std is None else std)

    def _initializer_range(self) -> float | None:
        """Return the standard deviation of the layers that belong to this model but not to a model inside it.

        None stands for fan_in ** -0.5.
        """
        return self.config.initializer_range


class NanoVLMVisionModel(NanoVLMPreTrainedModel):
    """Vision encoder (section 2.2.1): pixels to the states of [CLS] and the patches."""

    config: NanoVLMVisionConfig
    config_class = NanoVLMVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _names_0_1_0 = {**_vision_names_0_1_0("", anchor="^"), **_LAYERS_0_1_0}

    def __init__(self, config: NanoVLMVisionConfig):
        super().__init__(config)
        self.embeddings = NanoVLMVisionEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(NanoVLMVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        cls_only: bool = False,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (B, channels, image_size, image_size), normalised.
            cls_only: return the state of [CLS] alone as `last_hidden_state` (B, 1, D). The last layer then computes no
                other position, unless hidden states or attentions are requested.
            interpolate_pos_encoding: accept images of any size and interpolate the position embeddings.

        Returns:
            `last_hidden_state` (B, P + 1, D), [CLS] first; `pooler_output` (B, D), the state of [CLS]; with
            `output_hidden_states` one (B, P + 1, D) for the embeddings and one for each layer; with
            `output_attentions` one (B, heads, P + 1, P + 1) for each layer.

        Raises:
            ValueError: if the images do not have the size of the config.
        """
        self._check_size(pixel_values, interpolate_pos_encoding)
        output_attentions, output_hidden_states = _resolve_output_flags(
            self.config, output_attentions, output_hidden_states
        )
        hidden_states = self.pre_layernorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        all_hidden_states, all_attentions = [hidden_states], []
        num_queries = 1 if cls_only and not (output_hidden_states or output_attentions) else None
        for number, layer in enumerate(self.layers, start=1):
            hidden_states, weights = layer(
                hidden_states,
                num_queries=num_queries if number == len(self.layers) else None,
                output_attentions=output_attentions,
                **kwargs,
            )
            all_hidden_states.append(hidden_states)
            all_attentions.append(weights)
        hidden_states = self.post_layernorm(hidden_states[:, :1] if cls_only else hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def _check_size(self, pixel_values: torch.Tensor, any_size: bool) -> None:
        channels, size, patch = self.config.num_channels, self.config.image_size, self.config.patch_size
        if any_size:
            if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or min(pixel_values.shape[2:]) < patch:
                raise ValueError(
                    f"pixel_values is {tuple(pixel_values.shape)}, this model takes (batch, {channels}, height, width) "
                    f"of at least {patch} x {patch} pixels"
                )
        elif pixel_values.shape[1:] != (channels, size, size):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}, this model takes "
                f"(batch, {channels}, {size}, {size}): prepare images with its image processor or pass "
                "interpolate_pos_encoding=True"
            )


class NanoVLMTextModel(NanoVLMPreTrainedModel):
    """Decoder without the LM head (section 2.2.3)."""

    config: NanoVLMTextConfig
    config_class = NanoVLMTextConfig
    input_modalities = ("text",)
    _names_0_1_0 = {r"^position_embedding\.": "embed_positions.", **_LAYERS_0_1_0}

    def __init__(self, config: NanoVLMTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            NanoVLMTextLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Decode a sequence of tokens (B, T) or embeddings (B, T, C).

        Without `position_ids`, positions are counted along a 2-D `attention_mask`: padding takes none. Given positions
        are checked on the CPU only, since reading them elsewhere would synchronise with the device.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, or a position lies past the
                table of learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_attentions, output_hidden_states = _resolve_output_flags(
            self.config, output_attentions, output_hidden_states
        )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        length = inputs_embeds.shape[1]
        end = None  # upper bound of the positions, where it is known without reading the tensor
        # Transformers 4 passes the positions in the cache during generation; in version 5 the cache knows them.
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(length, device=inputs_embeds.device) + seen
            end = seen + length
        if attention_mask is not None and (end is None or attention_mask.ndim == 2):
            end = attention_mask.shape[-1]
        if position_ids is None:
            position_ids = _count_positions(attention_mask, cache_position)
        elif position_ids.device.type == "cpu":
            end = None
        elif end is None:
            end = 0
        self._check_positions(position_ids, end)

        mask = causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            cache_position,
            past_key_values,
            position_ids,
            eager=output_attentions,
        )
        hidden_states = self.dropout(inputs_embeds + self.embed_positions(position_ids))
        all_hidden_states, all_attentions = [hidden_states], []
        for layer in self.layers:
            hidden_states, weights = layer(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                cache_position=cache_position,
                position_ids=position_ids,
                output_attentions=output_attentions,
                **kwargs,
            )
            all_hidden_states.append(hidden_states)
            all_attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        all_hidden_states[-1] = hidden_states  # as in other Transformers decoders, the last one is normalised
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def _check_positions(self, position_ids: torch.Tensor, end: int | None) -> None:
        """Raise a ValueError for a position past the table; read the positions only if `end` does not rule it out."""
        entries = self.config.max_position_embeddings
        if torch.compiler.is_compiling() or position_ids.numel() == 0 or (end is not None and end <= entries):
            return
        last = int(position_ids.max())
        if last >= entries:
            raise ValueError(
                f"the sequence reaches position {last + 1}, this model has {entries} (image tokens included): "
                "shorten the prefix or lower max_new_tokens"
            )


class NanoVLMModel(NanoVLMPreTrainedModel):
    """Vision encoder, projector and decoder, without the LM head."""

    _auto_class_of_code = "AutoModel"

    def __init__(self, config: NanoVLMConfig):
        super().__init__(config)
        self.vision_tower = NanoVLMVisionModel(config.vision_config)
        self.multi_modal_projector = NanoVLMProjector(config)
        self.language_model = NanoVLMTextModel(config.text_config)
        self.post_init()

    def _initializer_range(self) -> float | None:
        return self.config.vision_config.initializer_range  # of the projector

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_decoder(self) -> nn.Module:
        return self.language_model

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the image tokens that the decoder reads.

        Args:
            pixel_values: (images, channels, image_size, image_size), normalised.
            kwargs: arguments of `NanoVLMVisionModel.forward`, such as `output_hidden_states`.

        Returns:
            The output of the vision encoder, with the projected features (images, I, C) as `pooler_output`. With the
            `cls` strategy `last_hidden_state` is the state of [CLS] alone.
        """
        strategy = self.config.vision_feature_select_strategy
        outputs = self.vision_tower(pixel_values, cls_only=strategy == "cls", **kwargs | {"return_dict": True})
        selected = outputs.last_hidden_state
        if strategy == "patch":
            selected = selected[:, 1:]
        outputs.pooler_output = self.multi_modal_projector(selected)
        return outputs

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        image_features: torch.FloatTensor,
    ) -> torch.BoolTensor:
        """Return the mask of the `<image>` tokens, (B, T, 1).

        Raises:
            ValueError: if their number differs from that of the image features.
        """
        if input_ids is None:
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        features = image_features.shape[0] * image_features.shape[1]
        if not torch.compiler.is_compiling() and int(mask.sum()) != features:
            raise ValueError(
                f"the text has {int(mask.sum())} <image> tokens and the images give {features} features: each image "
                f"needs {image_features.shape[1]} in a row, as NanoVLMProcessor puts them"
            )
        return mask.unsqueeze(-1).to(inputs_embeds.device)  # a device map may put the decoder elsewhere

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NanoVLMModelOutputWithPast:
        """Replace the embeddings of the `<image>` tokens by the image features and decode the sequence.

        Args:
            input_ids: (B, T), `<image>` tokens included; or `inputs_embeds`, (B, T, C).
            pixel_values: (images, channels, image_size, image_size); None after the first step of generation.
            attention_mask: (B, T with the cache), 1 for tokens and 0 for padding.
            interpolate_pos_encoding: accept images of any size; with `patch` and `full` their number of patches must
                match the number of `<image>` tokens.

        Raises:
            ValueError: if the `<image>` tokens and the images do not match, and as `NanoVLMTextModel.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = None
        if pixel_values is not None:
            image_features = self.get_image_features(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True
            ).pooler_output
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs | {"return_dict": True},
        )
        return NanoVLMModelOutputWithPast(**outputs, image_hidden_states=image_features)


class NanoVLMForConditionalGeneration(NanoVLMPreTrainedModel, GenerationMixin):
    """NanoVLM with its LM head: complete a description of an image.

    Example:

    ```python
    >>> from PIL import Image
    >>> from nanovlm_hf import NanoVLMForConditionalGeneration, NanoVLMProcessor

    >>> model = NanoVLMForConditionalGeneration.from_pretrained(folder)
    >>> processor = NanoVLMProcessor.from_pretrained(folder)
    >>> inputs = processor(images=Image.open("dog.jpg"), text="There is a big", return_tensors="pt")
    >>> processor.batch_decode(model.generate(**inputs, max_new_tokens=40), skip_special_tokens=True)
    ```
    """

    _auto_class_of_code = "AutoModelForImageTextToText"
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: NanoVLMConfig):
        super().__init__(config)
        self.model = NanoVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _initializer_range(self) -> float | None:
        return self.config.text_config.initializer_range  # of the LM head

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.vision_tower

    @property
    def language_model(self) -> nn.Module:
        return self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as every Transformers model does.

        Beam search cannot be streamed: with a streamer, a config that asks for beams, given or of the checkpoint, is
        replaced by greedy search (see `greedy_settings`), unless `num_beams` is given.
        """
        if kwargs.get("streamer") is not None and "num_beams" not in kwargs:
            kwargs = greedy_settings(self.generation_config, generation_config) | kwargs
        return super().generate(inputs, generation_config, *args, **kwargs)

    def get_decoder(self) -> nn.Module:
        return self.model.language_model

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `NanoVLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        interpolate_pos_encoding: bool = False,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NanoVLMCausalLMOutputWithPast:
        """Run `NanoVLMModel.forward`, whose arguments it shares, and the LM head.

        Args:
            labels: (B, T), the ids of the sequence itself (they are shifted here), -100 at positions without a loss.
                Image tokens have none either.
            logits_to_keep: number of last positions, or indices of positions, to compute logits for; 0 means all.
            mm_token_type_ids: ignored; processors may return it.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs | {"return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return NanoVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, *args: Any, inputs_embeds: torch.FloatTensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare the inputs of a generation step; only the first one has the image."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        cache_position = kwargs.get("cache_position")  # of Transformers 4; version 5 drops the image itself
        if cache_position is not None and cache_position[0] != 0:
            inputs.pop("pixel_values", None)
        return inputs


def _count_positions(attention_mask: torch.Tensor | None, cache_position: torch.Tensor) -> torch.Tensor:
    """Return the positions (B or 1, T) of the tokens at `cache_position` (T,), not counting padding."""
    if attention_mask is None or attention_mask.ndim != 2:
        return cache_position.unsqueeze(0)
    counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted[:, -cache_position.shape[0] :]


def _kept_patches(batch: int, patches: int, share: float, device: torch.device) -> torch.Tensor:
    """Return the indices (B, K) of random patches of each image, all but a share (PatchDropout, Liu et al. 2022)."""
    kept = max(1, round(patches * (1 - share)))
    return torch.rand(batch, patches, device=device).argsort(dim=1)[:, :kept]


def _convolve_at(kept: torch.Tensor, grid: torch.Tensor, convolution: nn.Conv2d) -> torch.Tensor:
    """Return a 3x3 convolution over the grid of patches (B, H, W, D), at the patches `kept` (B, K) alone, (B, K, D)."""
    batch, height, width, _ = grid.shape
    if torch.is_autocast_enabled(grid.device.type):  # before the states of a patch are copied to its nine neighbours
        grid = grid.to(torch.get_autocast_dtype(grid.device.type))
    padded = nn.functional.pad(grid, (0, 0, 1, 1, 1, 1)).flatten(0, 2)
    steps = torch.arange(3, device=grid.device)
    images = torch.arange(batch, device=grid.device)[:, None] * ((height + 2) * (width + 2))
    corners = images + kept // width * (width + 2) + kept % width
    neighbours = corners[..., None] + (steps[:, None] * (width + 2) + steps).flatten()
    states = nn.functional.embedding(neighbours, padded).flatten(2)
    return nn.functional.linear(states, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)


def _resolve_output_flags(config: Any, attentions: bool | None, hidden_states: bool | None) -> tuple[bool, bool]:
    """Return whether to output attentions and hidden states; warn once if that needs eager attention."""
    attentions = bool(config.output_attentions if attentions is None else attentions)
    hidden_states = bool(config.output_hidden_states if hidden_states is None else hidden_states)
    if attentions and config._attn_implementation != "eager" and not torch.compiler.is_compiling():
        logger.warning_once(
            f"{config._attn_implementation} attention does not return its weights, so output_attentions=True falls "
            "back to eager attention. Load the model with attn_implementation='eager' to avoid this warning."
        )
    return attentions, hidden_states


__all__ = [
    "NanoVLMForConditionalGeneration",
    "NanoVLMModel",
    "NanoVLMPreTrainedModel",
    "NanoVLMTextModel",
    "NanoVLMVisionModel",
]

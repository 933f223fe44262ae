"""NanoVLM (section 2.2 of the paper): visual encoder, projector and decoder, as a Transformers model.

Shapes in comments and docstrings: B batch, T length of the sequence, D width of the encoder, C width of the decoder,
P patches of an image (196), I tokens that an image takes in the sequence (1, 196 or 197).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
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
from transformers.utils import can_return_tuple

from ._compat import causal_mask, init
from .configuration_nanovlm import NanoVLMConfig, NanoVLMTextConfig, NanoVLMVisionConfig


@dataclass
class NanoVLMModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `NanoVLMModel`.

    Args:
        last_hidden_state: (B, T, C), after the decoder's last LayerNorm.
        past_key_values: keys and values of the decoder, with `use_cache`.
        hidden_states: one (B, T, C) for the embeddings and one after each block, with `output_hidden_states`.
        attentions: one (B, heads, T, T) a block, with `output_attentions`.
        image_hidden_states: (images, I, C), the projected picture, where there was one.
    """

    image_hidden_states: torch.FloatTensor | None = None


@dataclass
class NanoVLMCausalLMOutputWithPast(ModelOutput):
    """Output of `NanoVLMForConditionalGeneration`: that of `NanoVLMModel`, and

    Args:
        loss: mean cross-entropy in nats over the labels that are not -100, where labels were given.
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
    """Attention written out. (B, heads, queries, head width) in, (B, queries, heads, head width) and weights out."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask[:, :, :, : key.shape[-2]]
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class NanoVLMAttention(nn.Module):
    """Multi-head attention of either tower; the projections have biases, as the counts of Table 2 ask."""

    def __init__(self, config: NanoVLMVisionConfig | NanoVLMTextConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
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
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_position: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query = heads(self.q_proj(hidden_states[:, :num_queries]))
        key, value = heads(self.k_proj(hidden_states)), heads(self.v_proj(hidden_states))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})

        # Transformers searches this file for both look-ups: version 5 for the first, 4.57 for the second.
        attention: Callable = eager_attention_forward
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        elif self.config._attn_implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.out_proj(output.flatten(2).contiguous()), weights


class NanoVLMMLP(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, config: NanoVLMVisionConfig | NanoVLMTextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class NanoVLMBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block (figure 5), of the encoder (full attention) or of the decoder (causal).

    With `num_queries` it gives the states of the first so many positions alone, each having seen all of them.
    """

    def __init__(self, config: NanoVLMVisionConfig | NanoVLMTextConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = NanoVLMAttention(config, layer_idx, is_causal)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = NanoVLMMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.self_attn(self.norm1(hidden_states), num_queries, **kwargs)
        hidden_states = hidden_states[:, :num_queries] + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.mlp(self.norm2(hidden_states)))
        return hidden_states, weights


class NanoVLMPatchEmbedding(nn.Module):
    """Patches to tokens (figure 4): two convolutions, each with LayerNorm and ReLU, then a linear layer.

    (B, channels, height, width) in, (B, P, D) out.
    """

    def __init__(self, config: NanoVLMVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.conv1 = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc = nn.Linear(width, width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        # The channels stay last throughout, which the LayerNorms need and the convolutions like.
        grid = self.conv1(pixel_values.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        grid = nn.functional.relu(self.norm1(grid)).permute(0, 3, 1, 2)
        grid = self.conv2(grid).permute(0, 2, 3, 1)
        return self.fc(nn.functional.relu(self.norm2(grid))).flatten(1, 2)


class NanoVLMProjector(nn.Module):
    """The visual-textual connector (section 2.2.2): two layers with GELU between, as the shares of Table 2 ask.

    (..., D) in, (..., C) out.
    """

    def __init__(self, config: NanoVLMConfig):
        super().__init__()
        width = config.vision_config.hidden_size
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.fc2 = nn.Linear(4 * width, config.text_config.hidden_size)
        self.dropout = nn.Dropout(config.text_config.hidden_dropout)

    def forward(self, image_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.act(self.fc1(image_states))))


class NanoVLMPreTrainedModel(PreTrainedModel):
    """What every NanoVLM class shares: how weights begin, and what Transformers may do with the model."""

    config: NanoVLMConfig
    config_class = NanoVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoVLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, std=self._weight_std(module))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self._weight_std(module))
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, NanoVLMVisionModel):
            std = 0.02 if module.config.initializer_range is None else module.config.initializer_range
            init.normal_(module.cls_token, std=std)
            init.normal_(module.position_embedding, std=std)

    def _weight_std(self, module: nn.Module) -> float:
        config = self.config
        if isinstance(config, NanoVLMConfig):  # the projector belongs to the vision side, the LM head to the text's
            is_head = module is self.get_output_embeddings()
            config = config.text_config if is_head else config.vision_config
        if config.initializer_range is not None:
            return config.initializer_range
        return module.weight[0].numel() ** -0.5


class NanoVLMVisionModel(NanoVLMPreTrainedModel):
    """The visual encoder (section 2.2.1): pixels to the states of [CLS] and the patches."""

    config: NanoVLMVisionConfig
    config_class = NanoVLMVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: NanoVLMVisionConfig):
        super().__init__(config)
        self.patch_embedding = NanoVLMPatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_patches + 1, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(
            NanoVLMBlock(config, layer_idx, is_causal=False) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embedding

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        cls_only: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values: (B, channels, image_size, image_size), normalised.
            cls_only: skip what the last block would do for the patches, which [CLS] does not see any more.
                `last_hidden_state` is then (B, 1, D).

        Returns:
            `last_hidden_state` (B, P + 1, D), [CLS] first; `pooler_output` (B, D), the state of [CLS].

        Raises:
            ValueError: if the images are not of the config's size.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (self.config.num_channels, size, size):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}, this model takes "
                f"(batch, {self.config.num_channels}, {size}, {size}): prepare images with its image processor"
            )
        output_attentions, output_hidden_states = _outputs_asked_for(
            self.config, output_attentions, output_hidden_states
        )
        patches = self.patch_embedding(pixel_values.to(self.cls_token.dtype))
        hidden_states = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype), patches], dim=1)
        hidden_states = hidden_states + self.position_embedding
        if self.training and self.config.patch_dropout:
            hidden_states = _drop_patches(hidden_states, self.config.patch_dropout)
        hidden_states = self.pre_norm(self.dropout(hidden_states))

        all_hidden_states, all_attentions = [hidden_states], []
        for block in self.blocks:
            num_queries = 1 if cls_only and block is self.blocks[-1] else None
            hidden_states, weights = block(hidden_states, num_queries)
            all_hidden_states.append(hidden_states)
            all_attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class NanoVLMTextModel(NanoVLMPreTrainedModel):
    """The decoder without its head (section 2.2.3): embeddings to the states that the LM head reads."""

    config: NanoVLMTextConfig
    config_class = NanoVLMTextConfig
    input_modalities = ("text",)

    def __init__(self, config: NanoVLMTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList(
            NanoVLMBlock(config, layer_idx, is_causal=True) for layer_idx in range(config.num_hidden_layers)
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Decodes a sequence of tokens (B, T) or embeddings (B, T, C).

        Without `position_ids` they are counted along a 2-D `attention_mask`, so padding on either side moves nothing.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, or a position lies past the
                table of learned positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_attentions, output_hidden_states = _outputs_asked_for(
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
        # Transformers 4 passes the positions in the cache while it generates, 5 leaves them to the cache itself.
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            cache_position = torch.arange(length, device=inputs_embeds.device) + seen
        if position_ids is None:
            position_ids = _count_positions(attention_mask, cache_position)
        self._check_positions(position_ids, attention_mask)

        mask = causal_mask(self.config, inputs_embeds, attention_mask, cache_position, past_key_values, position_ids)
        hidden_states = self.dropout(inputs_embeds + self.position_embedding(position_ids))
        all_hidden_states, all_attentions = [hidden_states], []
        for block in self.blocks:
            hidden_states, weights = block(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                cache_position=cache_position,
                position_ids=position_ids,
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

    def _check_positions(self, position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        entries = self.config.max_position_embeddings
        if torch.compiler.is_compiling() or position_ids.numel() == 0:
            return
        # A mask that is short enough answers without waiting for a GPU.
        if position_ids.device.type != "cpu" and attention_mask is not None and attention_mask.shape[-1] <= entries:
            return
        last = int(position_ids.max())
        if last >= entries:
            raise ValueError(
                f"the sequence reaches position {last + 1}, this model has {entries} (image tokens included): "
                "shorten the prefix or lower max_new_tokens"
            )


class NanoVLMModel(NanoVLMPreTrainedModel):
    """Encoder, projector and decoder, without the LM head."""

    def __init__(self, config: NanoVLMConfig):
        super().__init__(config)
        self.vision_tower = NanoVLMVisionModel(config.vision_config)
        self.multi_modal_projector = NanoVLMProjector(config)
        self.language_model = NanoVLMTextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_decoder(self) -> nn.Module:
        return self.language_model

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """What the decoder sees of each image.

        Args:
            pixel_values: (images, channels, image_size, image_size), normalised.

        Returns:
            The encoder's output, with the projected features (images, I, C) as `pooler_output`.
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
        """Where the `<image>` tokens stand, (B, T, 1).

        Raises:
            ValueError: if they are not as many as the image features.
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
        return mask.unsqueeze(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> NanoVLMModelOutputWithPast:
        """Puts the picture in the place of the `<image>` tokens and decodes.

        Args:
            input_ids: (B, T), `<image>` tokens included; or `inputs_embeds`, (B, T, C).
            pixel_values: (images, channels, image_size, image_size); None after the first step of a generation.
            attention_mask: (B, T so far), 1 for tokens and 0 for padding.

        Raises:
            ValueError: if the `<image>` tokens and the images do not match, and as `NanoVLMTextModel.forward`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_features = None
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, return_dict=True).pooler_output
            image_features = image_features.to(inputs_embeds.dtype)
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
    """NanoVLM with its LM head: completes a sentence about a picture.

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

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: NanoVLMConfig):
        super().__init__(config)
        self.model = NanoVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

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

    def get_decoder(self) -> nn.Module:
        return self.model.language_model

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As `NanoVLMModel.get_image_features`."""
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
        **kwargs: Any,
    ) -> NanoVLMCausalLMOutputWithPast:
        """As `NanoVLMModel.forward`, and

        Args:
            labels: (B, T), the ids of the sequence itself (they are shifted inside), -100 where there is no loss.
            logits_to_keep: compute the last so many logits alone, or those at these indices; 0 means all.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs | {"return_dict": True},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
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
        """As every model's; the picture goes in with the first step alone."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        cache_position = kwargs.get("cache_position")  # given by Transformers 4; version 5 drops the picture itself
        if cache_position is not None and cache_position[0] != 0:
            inputs.pop("pixel_values", None)
        return inputs


def _count_positions(attention_mask: torch.Tensor | None, cache_position: torch.Tensor) -> torch.Tensor:
    """Positions (B or 1, T) of the tokens at `cache_position` (T,), padding left out of the count."""
    if attention_mask is None or attention_mask.ndim != 2:
        return cache_position.unsqueeze(0)
    counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted[:, -cache_position.shape[0] :]


def _drop_patches(hidden_states: torch.Tensor, share: float) -> torch.Tensor:
    """[CLS] and patches drawn at random, others for each image (PatchDropout, Liu et al. 2022). (B, P + 1, D) in."""
    batch, length, _ = hidden_states.shape
    kept = max(1, round((length - 1) * (1 - share)))
    drawn = torch.rand(batch, length - 1, device=hidden_states.device).argsort(dim=1)[:, :kept] + 1
    rows = torch.arange(batch, device=hidden_states.device)[:, None] * length
    places = torch.cat([rows, rows + drawn], dim=1)
    return hidden_states.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)


def _outputs_asked_for(config: Any, attentions: bool | None, hidden_states: bool | None) -> tuple[bool, bool]:
    return (
        config.output_attentions if attentions is None else attentions,
        config.output_hidden_states if hidden_states is None else hidden_states,
    )


__all__ = [
    "NanoVLMForConditionalGeneration",
    "NanoVLMModel",
    "NanoVLMPreTrainedModel",
    "NanoVLMTextModel",
    "NanoVLMVisionModel",
]

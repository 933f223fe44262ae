"""Initialise a model from a smaller checkpoint, or its vision encoder from one (beyond the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..modeling_nanovlm import (
    NanoVLMForConditionalGeneration,
    NanoVLMTextAttention,
    NanoVLMTextLayer,
    NanoVLMVisionAttention,
    NanoVLMVisionLayer,
    NanoVLMVisionModel,
)

# Fields that must agree with the smaller checkpoint for its weights to mean the same.
ENCODER_FIELDS = ("image_size", "patch_size", "num_channels", "hidden_act", "layer_norm_eps")
DECODER_FIELDS = ("hidden_act", "layer_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id")
NOISE = 0.05  # added to duplicated weights, relative to their standard deviation, to break the symmetry between copies


@torch.no_grad()
def grow(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> None:
    """Initialise a model's vision encoder and, unless it is smaller than the other one, its decoder.

    The decoder's added layers come last, and its text tokens keep their position embeddings behind any number of image
    tokens. A smaller decoder keeps its random weights, and so does the second layer of the projector.

    Raises:
        InputError: as `grow_vision_encoder`, and if the decoders differ in `DECODER_FIELDS`, in tying or in the
            `<image>` token.
    """
    hidden = grow_vision_encoder(model, other)
    own, others = model.model.multi_modal_projector.fc2, other.model.multi_modal_projector.fc2
    if _decoder_fits(model, other):
        _check_same("decoder", model.config.text_config, other.config.text_config, DECODER_FIELDS)
        _check_same("model", model.config, other.config, ("tie_word_embeddings", "image_token_id"))
        _fill(own, others, _grow_decoder(model, other), hidden)


@torch.no_grad()
def grow_vision_encoder(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> _Expansion:
    """Initialise a model's vision encoder and the first layer of its projector from a smaller checkpoint.

    Layers that the smaller encoder lacks are inserted before its last one and start as the identity (as in progressive
    stacking, Gong et al. 2019), so that the initial output is that of the smaller encoder. A wider encoder duplicates
    random features, and the weights that read them are divided by the number of copies (Net2Net, Chen et al. 2015),
    which nearly preserves the mean and variance in LayerNorm. With more heads, several approximate the attention of
    one, each for a part of its values.

    Returns:
        The expansion of the output of the projector's first layer.

    Raises:
        InputError: if the other encoder is wider, has more layers, differs in `ENCODER_FIELDS`, or its number of heads
            does not divide the width and the number of heads.
    """
    own_tower, tower = model.model.vision_tower, other.model.vision_tower
    _check_not_larger(own_tower, tower)
    _check_same("projector", model.config, other.config, ("projector_hidden_act",))
    features = _grow_encoder(own_tower, tower)
    own_layer, layer = model.model.multi_modal_projector.fc1, other.model.multi_modal_projector.fc1
    hidden = _expand(own_layer.out_features, layer.out_features)
    _fill(own_layer, layer, hidden, features)
    return hidden


@dataclass(frozen=True)
class _Expansion:
    """A mapping from the features of a layer to those of a smaller one, some of which are duplicated.

    Attributes:
        index: (features,), the feature of the smaller layer.
        share: (features,), one over the number of copies of that feature.
        copied: (features,), 1.0 for the second and further copies, else 0.0.
    """

    index: torch.Tensor
    share: torch.Tensor
    copied: torch.Tensor


def _expand(own: int, others: int, groups: int = 1) -> _Expansion:
    """Return a mapping with every feature once and random duplicates, drawn within each of `groups` equal groups."""
    size, others_size = own // groups, others // groups
    parts = [
        torch.cat([torch.arange(others_size), torch.randint(others_size, (size - others_size,))]) + group * others_size
        for group in range(groups)
    ]
    copied = (torch.arange(own) % size >= others_size).float()
    index = torch.cat(parts)
    return _Expansion(index, 1 / torch.bincount(index)[index], copied)


def _fill(
    own: nn.Linear | nn.Conv2d, other: nn.Linear | nn.Conv2d, rows: _Expansion, columns: _Expansion | None = None
) -> None:
    """Fill a layer with the weights of a smaller one; `rows` expand its outputs and `columns` its inputs."""
    weight = other.weight[rows.index]
    if columns is not None:
        weight = weight[:, columns.index] * columns.share.view(1, -1, *[1] * (weight.ndim - 2))
    noise = torch.randn_like(weight) * (NOISE * weight.std())
    own.weight.copy_(weight + noise * rows.copied.view(-1, *[1] * (weight.ndim - 1)))
    own.bias.copy_(other.bias[rows.index])


def _fill_norm(own: nn.LayerNorm, other: nn.LayerNorm, features: _Expansion) -> None:
    own.weight.copy_(other.weight[features.index])
    own.bias.copy_(other.bias[features.index])


def _check_same(part: str, own: Any, other: Any, names: tuple[str, ...]) -> None:
    for name in names:
        wanted, found = getattr(own, name), getattr(other, name)
        if wanted != found:
            raise InputError(f"grow_from: its {part}'s {name} is {found}, this model's is {wanted}")


def _check_not_larger(own: NanoVLMVisionModel, other: NanoVLMVisionModel) -> None:
    _check_same("encoder", own.config, other.config, ENCODER_FIELDS)
    if len(other.layers) > len(own.layers):
        raise InputError(f"grow_from: its encoder has {len(other.layers)} layers, this model's {len(own.layers)}")
    width, others_width = own.config.hidden_size, other.config.hidden_size
    heads, others_heads = own.config.num_attention_heads, other.config.num_attention_heads
    if others_width > width:
        raise InputError(f"grow_from: its encoder's hidden_size is {others_width}, this model's is {width}")
    inner, others_inner = own.config.intermediate_size, other.config.intermediate_size
    if others_inner > inner:
        raise InputError(f"grow_from: its encoder's intermediate_size is {others_inner}, this model's is {inner}")
    if heads % others_heads or width % others_heads:
        raise InputError(
            f"grow_from: its encoder has {others_heads} heads, this model's {heads} and a hidden_size of {width}"
        )


def _grow_encoder(own: NanoVLMVisionModel, other: NanoVLMVisionModel) -> _Expansion:
    """Fill the encoder and return the expansion of its output."""
    features = _expand(own.config.hidden_size, other.config.hidden_size)
    patches, others = own.embeddings.patch_embeddings, other.embeddings.patch_embeddings
    _fill(patches.conv1, others.conv1, features)
    _fill(patches.conv2, others.conv2, features, features)
    _fill(patches.fc, others.fc, features, features)
    _fill_norm(patches.layer_norm1, others.layer_norm1, features)
    _fill_norm(patches.layer_norm2, others.layer_norm2, features)
    for name in ("cls_token", "position_embeddings"):
        getattr(own.embeddings, name).copy_(getattr(other.embeddings, name)[..., features.index])
    for name in ("pre_layernorm", "post_layernorm"):
        _fill_norm(getattr(own, name), getattr(other, name), features)
    _grow_layers(own.layers, other.layers, features, before=len(other.layers) - 1)
    return features


def _grow_layers(own: nn.ModuleList, others: nn.ModuleList, features: _Expansion, before: int) -> None:
    """Fill the layers; those that the other model lacks are inserted at index `before` and start as the identity."""
    added = own[before : before + len(own) - len(others)]
    for layer in added:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    kept = [*own[:before], *own[before + len(added) :]]
    for layer, source in zip(kept, others, strict=True):
        _grow_layer(layer, source, features)


def _grow_layer(
    own: NanoVLMVisionLayer | NanoVLMTextLayer, other: NanoVLMVisionLayer | NanoVLMTextLayer, features: _Expansion
) -> None:
    attention, others = own.self_attn, other.self_attn
    width, others_width = attention.q_proj.out_features, others.q_proj.out_features
    within_heads = _expand(width, others_width, groups=others.config.num_attention_heads)
    for name in ("q_proj", "k_proj", "v_proj"):
        _fill(getattr(attention, name), getattr(others, name), within_heads, features)
    # Preserve the products of queries and keys: copies share their weight, and the scaling depends on the head width.
    for layer, scale in ((attention.q_proj, (width / others_width) ** 0.5), (attention.k_proj, 1.0)):
        factors = within_heads.share.sqrt() * scale
        layer.weight.mul_(factors[:, None])
        layer.bias.mul_(factors)
    _split_heads(attention, others.config.num_attention_heads)
    _fill(attention.out_proj, others.out_proj, features, within_heads)
    hidden = _expand(own.mlp.fc1.out_features, other.mlp.fc1.out_features)
    _fill(own.mlp.fc1, other.mlp.fc1, hidden, features)
    _fill(own.mlp.fc2, other.mlp.fc2, features, hidden)
    _fill_norm(own.layer_norm1, other.layer_norm1, features)
    _fill_norm(own.layer_norm2, other.layer_norm2, features)


def _split_heads(attention: NanoVLMVisionAttention | NanoVLMTextAttention, heads: int) -> None:
    """Split each of `heads` heads into several, if the attention has more.

    They divide its values among them and share the low-rank approximation of its queries and keys.
    """
    parts = attention.config.num_attention_heads // heads
    if parts == 1:
        return
    layers = (attention.q_proj, attention.k_proj)
    # The bias becomes the weight of an additional input that is always 1.
    whole = [torch.cat([layer.weight, layer.bias[:, None]], dim=1).unflatten(0, (heads, -1)) for layer in layers]
    bases, factors = zip(*(torch.linalg.qr(weights.mT) for weights in whole), strict=True)
    left, singular, right = torch.linalg.svd(factors[0] @ factors[1].mT)
    # Narrower heads scale their products differently.
    strength = (singular / parts**0.5).sqrt()[:, None]
    for layer, basis, side in zip(layers, bases, (left, right.mT), strict=True):
        nearest = ((basis @ side) * strength)[..., : attention.head_dim].mT
        shared = nearest.repeat_interleave(parts, dim=0).flatten(0, 1)
        layer.weight.copy_(shared[:, :-1])
        layer.bias.copy_(shared[:, -1])


def _decoder_fits(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> bool:
    own, others = (one.config.text_config for one in (model, other))
    return (
        own.vocab_size == others.vocab_size
        and own.hidden_size >= others.hidden_size
        and own.intermediate_size >= others.intermediate_size
        and own.num_hidden_layers >= others.num_hidden_layers
        and own.hidden_size % others.num_attention_heads == 0
        and own.num_attention_heads % others.num_attention_heads == 0
    )


def _grow_decoder(model: NanoVLMForConditionalGeneration, other: NanoVLMForConditionalGeneration) -> _Expansion:
    """Fill the decoder and the LM head and return the expansion of the embeddings."""
    own, others = model.model.language_model, other.model.language_model
    features = _expand(own.config.hidden_size, others.config.hidden_size)
    own.embed_tokens.weight.copy_(others.embed_tokens.weight[:, features.index])
    model.lm_head.weight.copy_(other.lm_head.weight[:, features.index])
    image, others_image = (one.config.image_seq_length for one in (model, other))
    positions, source = own.embed_positions.weight, others.embed_positions.weight[:, features.index]
    shared, text = min(image, others_image), min(len(positions) - image, len(source) - others_image)
    positions[:shared] = source[:shared]
    positions[image : image + text] = source[others_image : others_image + text]
    _grow_layers(own.layers, others.layers, features, before=len(others.layers))
    # The LM head reads every copy of a feature, so the copies share its weight.
    _fill_norm(own.norm, others.norm, features)
    own.norm.weight.mul_(features.share)
    own.norm.bias.mul_(features.share)
    return features

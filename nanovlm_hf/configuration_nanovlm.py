"""Configuration of NanoVLM: two small transformers and a projector (sections 2.2 and 2.3, Tables 1 and 2)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Table 1 of the paper, under the paper's own names.
PRESETS = {
    "mini": {"n_blks": 1, "n_layer": 4, "n_head": 8, "head_size": 12, "n_embd": 96, "img_embd_dim": 400},
    "base": {"n_blks": 3, "n_layer": 8, "n_head": 8, "head_size": 16, "n_embd": 128, "img_embd_dim": 512},
    "large": {"n_blks": 5, "n_layer": 10, "n_head": 16, "head_size": 12, "n_embd": 192, "img_embd_dim": 512},
}

VISION_FEATURE_SELECT_STRATEGIES = ("cls", "patch", "full")

# The text positions of a sequence whose picture is one token. More picture tokens lengthen the table by as many.
TEXT_POSITIONS = 256


class NanoVLMVisionConfig(PretrainedConfig):
    """The visual encoder (section 2.2.1): patch embedding by two convolutions and a linear layer, `[CLS]`, blocks.

    Args:
        hidden_size: width of the encoder, the paper's `img_embd_dim`.
        num_hidden_layers: transformer blocks, the paper's `n_blks`.
        num_attention_heads: heads of a block, the paper's `n_head`.
        intermediate_size: width inside a block's MLP; four times `hidden_size` when None.
        image_size: side of the square input, in pixels.
        patch_size: side of a patch, in pixels.
        num_channels: colour channels of the input.
        hidden_act: activation inside a block's MLP.
        hidden_dropout: dropout on the embeddings and on each residual branch.
        attention_dropout: dropout on the attention probabilities (0: PyTorch keeps its fast attention).
        patch_dropout: share of the patches, others for each image, that the blocks do not see while training: faster,
            and harder to learn by heart (beyond the paper).
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of the first weights; None scales each by its inputs (fan_in ** -0.5),
            without which the picture reaches `[CLS]` too faintly for the decoder to learn to look (beyond the paper).

    Raises:
        ValueError: if the width is no multiple of the heads, the image no multiple of the patch, or `patch_dropout`
            would leave none.
    """

    model_type = "nanovlm_hf_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 400,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 8,
        intermediate_size: int | None = None,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        hidden_act: str = "gelu",
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        patch_dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        initializer_range: float | None = None,
        **kwargs: Any,
    ):
        _check_heads("vision_config", hidden_size, num_attention_heads)
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"vision_config.patch_dropout={patch_dropout} is not from 0 to below 1")
        if image_size % patch_size:
            raise ValueError(f"vision_config.image_size={image_size} is no multiple of patch_size={patch_size}")
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_act = hidden_act
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.patch_dropout = patch_dropout
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def num_patches(self) -> int:
        """Patches of an image: 196 for 224 x 224 pixels in patches of 16 x 16."""
        return (self.image_size // self.patch_size) ** 2


class NanoVLMTextConfig(PretrainedConfig):
    """The decoder (section 2.2.3): learned positions, pre-norm causal blocks, LayerNorm, LM head.

    Args:
        vocab_size: entries of the tokenizer (the paper does not tell its own; 5,120 meets its Table 2).
        hidden_size: width of the decoder, the paper's `n_embd`.
        num_hidden_layers: transformer blocks, the paper's `n_layer`.
        num_attention_heads: heads of a block, the paper's `n_head`; their width is the paper's `head_size`.
        intermediate_size: width inside a block's MLP; four times `hidden_size` when None.
        max_position_embeddings: entries of the position table, picture tokens included.
        hidden_act: activation inside a block's MLP.
        hidden_dropout: dropout on the embeddings, on each residual branch and after the projector.
        attention_dropout: dropout on the attention probabilities (0: PyTorch keeps its fast attention).
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of the first weights.
        use_cache: whether `forward` returns its keys and values for the next token.
        tie_word_embeddings: whether the LM head is the token embedding.
        pad_token_id, bos_token_id, eos_token_id: ids of the special tokens.

    Raises:
        ValueError: if the width is no multiple of the heads.
    """

    model_type = "nanovlm_hf_text"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size: int = 5120,
        hidden_size: int = 96,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 8,
        intermediate_size: int | None = None,
        max_position_embeddings: int = TEXT_POSITIONS,
        hidden_act: str = "gelu",
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        **kwargs: Any,
    ):
        _check_heads("text_config", hidden_size, num_attention_heads)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        # Transformers 5 has these as fields of the class, 4.57 takes them from the keywords: said both ways.
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )


class NanoVLMConfig(PretrainedConfig):
    """A whole NanoVLM. `NanoVLMConfig()` is the paper's mini; see `from_preset` and `from_paper` for the others.

    Args:
        vision_config: the visual encoder, as a config or a dict of its fields.
        text_config: the decoder, as a config or a dict of its fields. Without `max_position_embeddings` in it, the
            position table holds the picture's tokens and 255 of text.
        image_token_id: id of the `<image>` token, whose embedding the picture replaces.
        vision_feature_select_strategy: what the decoder sees of the picture: `cls` (the paper: one token), `patch`
            (every patch: 196 tokens) or `full` (both: 197 tokens; the last two are beyond the paper).
        projector_hidden_act: activation between the projector's two layers (section 2.2.2).
        tie_word_embeddings: whether the LM head is the token embedding.

    Raises:
        ValueError: for an unknown strategy, for `patch_dropout` where the decoder sees the patches, for widths that do
            not fit, and for the config of another project (huggingface/nanoVLM).
    """

    model_type = "nanovlm_hf"
    sub_configs = {"vision_config": NanoVLMVisionConfig, "text_config": NanoVLMTextConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vision_config: NanoVLMVisionConfig | dict | None = None,
        text_config: NanoVLMTextConfig | dict | None = None,
        image_token_id: int = 3,
        vision_feature_select_strategy: str = "cls",
        projector_hidden_act: str = "gelu",
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        _refuse_other_project(kwargs)
        if vision_feature_select_strategy not in VISION_FEATURE_SELECT_STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy={vision_feature_select_strategy!r} is none of "
                + ", ".join(VISION_FEATURE_SELECT_STRATEGIES)
            )
        if not isinstance(vision_config, NanoVLMVisionConfig):
            vision_config = NanoVLMVisionConfig(**(vision_config or {}))
        if vision_config.patch_dropout and vision_feature_select_strategy != "cls":
            raise ValueError(
                f"vision_config.patch_dropout={vision_config.patch_dropout} would leave empty places where "
                f"vision_feature_select_strategy={vision_feature_select_strategy!r} shows the patches: it goes with cls"
            )
        self.vision_config = vision_config
        self.vision_feature_select_strategy = vision_feature_select_strategy
        if not isinstance(text_config, NanoVLMTextConfig):
            text_fields = dict(text_config or {})
            text_fields.setdefault("max_position_embeddings", TEXT_POSITIONS - 1 + self.image_seq_length)
            text_fields.setdefault("tie_word_embeddings", tie_word_embeddings)
            text_config = NanoVLMTextConfig(**text_fields)
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.projector_hidden_act = projector_hidden_act
        self.tie_word_embeddings = tie_word_embeddings
        # The ids travel up because generation reads them here.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(text_config, name))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # Transformers 4 reads this in the text config, 5 in the whole one: one value in both.
        if name == "tie_word_embeddings" and "text_config" in self.__dict__:
            self.text_config.tie_word_embeddings = value

    @property
    def image_seq_length(self) -> int:
        """Tokens that a picture takes in the decoder's sequence: 1, 196 or 197 for the paper's images."""
        patches = self.vision_config.num_patches
        return {"cls": 1, "patch": patches, "full": patches + 1}[self.vision_feature_select_strategy]

    @classmethod
    def from_paper(
        cls,
        n_blks: int,
        n_layer: int,
        n_head: int,
        head_size: int,
        n_embd: int,
        img_embd_dim: int,
        dropout: float = 0.1,
        vocab_size: int = 5120,
        **kwargs: Any,
    ) -> NanoVLMConfig:
        """A config from the names of the paper's Table 1; `kwargs` are fields of `NanoVLMConfig`.

        Raises:
            ValueError: if `n_head * head_size` is not `n_embd`.
        """
        if n_head * head_size != n_embd:
            raise ValueError(f"n_head * head_size = {n_head} * {head_size} = {n_head * head_size}, n_embd is {n_embd}")
        vision_config = {
            "hidden_size": img_embd_dim,
            "num_hidden_layers": n_blks,
            "num_attention_heads": n_head,
            "hidden_dropout": dropout,
        }
        text_config = {
            "vocab_size": vocab_size,
            "hidden_size": n_embd,
            "num_hidden_layers": n_layer,
            "num_attention_heads": n_head,
            "hidden_dropout": dropout,
        }
        vision_config |= kwargs.pop("vision_config", {})
        text_config |= kwargs.pop("text_config", {})
        return cls(vision_config=vision_config, text_config=text_config, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **kwargs: Any) -> NanoVLMConfig:
        """The paper's `mini`, `base` or `large` (Table 1); `kwargs` as those of `from_paper`.

        Raises:
            ValueError: for another name.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls.from_paper(**PRESETS[name], **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> NanoVLMConfig:
        """As every config's; refuses that of huggingface/nanoVLM by name (ValueError)."""
        _refuse_other_project(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part by closed formula, as in Table 2: `encoder`, `projector`, `decoder`, `total`.

        Tied weights count once.
        """
        vision, text = self.vision_config, self.text_config
        width, patch_pixels = vision.hidden_size, vision.num_channels * vision.patch_size**2
        patch_embedding = (patch_pixels + 1) * width + (9 * width + 1) * width + (width + 1) * width + 4 * width
        encoder = (
            patch_embedding
            + width  # [CLS]
            + (vision.num_patches + 1) * width  # positions
            + 4 * width  # the LayerNorms before and after the blocks
            + vision.num_hidden_layers * _block_parameters(vision)
        )
        projector = (width + 1) * 4 * width + (4 * width + 1) * text.hidden_size
        decoder = (
            text.vocab_size * text.hidden_size * (1 if self.tie_word_embeddings else 2)
            + text.max_position_embeddings * text.hidden_size
            + text.num_hidden_layers * _block_parameters(text)
            + 2 * text.hidden_size  # the last LayerNorm
        )
        return {
            "encoder": encoder,
            "projector": projector,
            "decoder": decoder,
            "total": encoder + projector + decoder,
        }


def _block_parameters(config: NanoVLMVisionConfig | NanoVLMTextConfig) -> int:
    width, inner = config.hidden_size, config.intermediate_size
    attention = 4 * (width + 1) * width
    mlp = (width + 1) * inner + (inner + 1) * width
    return attention + mlp + 4 * width


def _check_heads(where: str, hidden_size: int, num_attention_heads: int) -> None:
    if hidden_size % num_attention_heads:
        raise ValueError(
            f"{where}.hidden_size={hidden_size} is no multiple of num_attention_heads={num_attention_heads}"
        )


def _refuse_other_project(fields: dict[str, Any]) -> None:
    if "vit_hidden_dim" in fields or "lm_hidden_dim" in fields:
        raise ValueError(
            "this is a checkpoint of huggingface/nanoVLM, another project of nearly the same name: "
            "load it with that project's own code, or choose a checkpoint whose model_type is 'nanovlm_hf'"
        )


__all__ = ["PRESETS", "NanoVLMConfig", "NanoVLMTextConfig", "NanoVLMVisionConfig"]

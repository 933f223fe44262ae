"""Configuration of NanoVLM: vision encoder, projector and decoder (sections 2.2 and 2.3)."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from .paper_nanovlm import PRESETS, config_fields, parameter_counts

VISION_FEATURE_SELECT_STRATEGIES = ("cls", "patch", "full")

# Positions of a sequence with one image token. More image tokens lengthen the position table by as many.
TEXT_POSITIONS = 256

# Upper limits of sizes, far beyond any model of this kind, to catch mistakes and hostile files; the lower limit is 1.
LARGEST = {
    "hidden_size": 65_536,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 65_536,
    "intermediate_size": 1_048_576,
    "image_size": 16_384,
    "patch_size": 16_384,
    "num_channels": 1_024,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 10_000_000,
}


class NanoVLMVisionConfig(PretrainedConfig):
    """Configuration of the vision encoder (section 2.2.1).

    Args:
        hidden_size: width of the encoder, `img_embd_dim` in the paper.
        num_hidden_layers: transformer layers, `n_blks` in the paper.
        num_attention_heads: attention heads of a layer, `n_head` in the paper.
        intermediate_size: width inside a block's MLP; four times `hidden_size` when None.
        image_size: height and width of the input in pixels.
        patch_size: height and width of a patch in pixels.
        num_channels: colour channels of the input.
        hidden_act: activation inside a block's MLP.
        hidden_dropout: dropout on the embeddings and on each residual branch.
        attention_dropout: dropout on the attention probabilities (0: PyTorch keeps its fast attention).
        patch_dropout: share of the patches of each image that are dropped at random during training (PatchDropout,
            beyond the paper): it is faster and regularises.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of the initial weights. None means fan_in ** -0.5 (beyond the paper):
            with smaller weights the image signal at `[CLS]` is too weak for the decoder to learn from it.

    Raises:
        ValueError: naming the first field whose value has the wrong type, is out of range or not divisible (the width
            by the heads, the image by the patch).
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
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_act = hidden_act
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.patch_dropout = patch_dropout
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        _check_fields(self.base_config_key, self)
        if image_size % patch_size:
            raise ValueError(f"vision_config.image_size={image_size} is not a multiple of patch_size={patch_size}")
        if intermediate_size is None:
            self.intermediate_size = 4 * hidden_size
        _init_base(self, self.base_config_key, kwargs)

    @property
    def num_patches(self) -> int:
        """Number of patches of an image: 196 for 224 x 224 pixels in patches of 16 x 16."""
        return (self.image_size // self.patch_size) ** 2


class NanoVLMTextConfig(PretrainedConfig):
    """Configuration of the decoder (section 2.2.3).

    Args:
        vocab_size: entries of the tokenizer (not stated in the paper; 5,120 agrees with its Table 2).
        hidden_size: width of the decoder, `n_embd` in the paper.
        num_hidden_layers: transformer layers, `n_layer` in the paper.
        num_attention_heads: attention heads of a layer, `n_head` in the paper; their width is its `head_size`.
        intermediate_size: width inside a block's MLP; four times `hidden_size` when None.
        max_position_embeddings: entries of the position table, image tokens included.
        hidden_act: activation inside a block's MLP.
        hidden_dropout: dropout on the embeddings, on each residual branch and after the projector.
        attention_dropout: dropout on the attention probabilities (0: PyTorch keeps its fast attention).
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of the initial weights.
        use_cache: whether `forward` returns keys and values for the next token.
        tie_word_embeddings: whether the LM head shares the weight of the token embedding.
        pad_token_id: id of the padding token, if any.
        bos_token_id: id of the token before a text, if any.
        eos_token_id: id or ids that end a text, if any.

    Raises:
        ValueError: see `NanoVLMVisionConfig`.
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
        eos_token_id: int | list[int] | None = 2,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        # Transformers 5 reads these attributes, 4.57 the keyword arguments below.
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        _check_fields(self.base_config_key, self)
        if intermediate_size is None:
            self.intermediate_size = 4 * hidden_size
        tokens = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        _init_base(self, self.base_config_key, kwargs | tokens | {"tie_word_embeddings": tie_word_embeddings})


class NanoVLMConfig(PretrainedConfig):
    """Configuration of a NanoVLM. `NanoVLMConfig()` is the paper's mini; see also `from_preset` and `from_paper`.

    `vocab_size` and `use_cache` are those of `text_config`.

    Args:
        vision_config: config of the vision encoder, or a dict of its fields.
        text_config: config of the decoder, or a dict of its fields. If a dict lacks `max_position_embeddings`, the
            position table holds the image tokens and 255 text tokens.
        image_token_id: id of the `<image>` token, whose embedding is replaced by the image features.
        vision_feature_select_strategy: image tokens that the decoder reads: `cls` (one, as in the paper), `patch` (196)
            or `full` (197; both are beyond the paper).
        projector_hidden_act: activation between the projector's two layers (section 2.2.2).
        tie_word_embeddings: whether the LM head shares the weight of the token embedding. The value is stored in
            `text_config` and can be given in either place: False in one of them unties.

    Raises:
        ValueError: naming the first field with an invalid value, here or in a sub-config; for `patch_dropout` with
            `patch` or `full`; for the config of another project (huggingface/nanoVLM).
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
        refuse_other_project(kwargs)
        if vision_feature_select_strategy not in VISION_FEATURE_SELECT_STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy={vision_feature_select_strategy!r} is not one of "
                + ", ".join(VISION_FEATURE_SELECT_STRATEGIES)
            )
        _check_flag("tie_word_embeddings", tie_word_embeddings)
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_config = vision_config = _part(NanoVLMVisionConfig, vision_config, {})
        if vision_config.patch_dropout and vision_feature_select_strategy != "cls":
            raise ValueError(
                f"vision_config.patch_dropout={vision_config.patch_dropout} drops patches, which the decoder reads "
                f"with vision_feature_select_strategy={vision_feature_select_strategy!r}: use 'cls'"
            )
        positions = TEXT_POSITIONS - 1 + self.image_seq_length
        self.text_config = text_config = _part(NanoVLMTextConfig, text_config, {"max_position_embeddings": positions})
        if text_config.max_position_embeddings <= self.image_seq_length:
            raise ValueError(
                f"text_config.max_position_embeddings={text_config.max_position_embeddings} leaves no room for text "
                f"after the {self.image_seq_length} tokens of an image"
            )
        _check_integer("image_token_id", image_token_id, 0, text_config.vocab_size - 1)
        _check_activation("projector_hidden_act", projector_hidden_act)
        self.image_token_id = image_token_id
        self.projector_hidden_act = projector_hidden_act
        if "use_cache" in kwargs:  # version 5 would drop it as an argument of generation
            self.use_cache = kwargs.pop("use_cache")
        # Generation reads the ids from the top level.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(text_config, name))
            _check_token_ids(name, kwargs[name], text_config.vocab_size)
        tied = tie_word_embeddings and text_config.tie_word_embeddings
        _init_base(self, "config", kwargs | {"tie_word_embeddings": tied})

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the LM head is tied. Transformers 4 reads the field of the text config, version 5 this one."""
        return self.text_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    @property
    def vocab_size(self) -> int:
        """Entries of the decoder's vocabulary."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        _check_integer("vocab_size", value, self.image_token_id + 1, LARGEST["vocab_size"])
        self.text_config.vocab_size = value

    @property
    def use_cache(self) -> bool:
        """Whether `forward` returns the decoder's keys and values by default."""
        return self.text_config.use_cache

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        _check_flag("use_cache", value)
        self.text_config.use_cache = value

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of all fields, with `tie_word_embeddings` here and in `text_config`."""
        return super().to_dict() | {"tie_word_embeddings": self.tie_word_embeddings}

    @property
    def image_seq_length(self) -> int:
        """Number of tokens of an image in the decoder's sequence: 1, 196 or 197 for the paper's image size."""
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
        """Create a config from the names of Table 1.

        Args:
            kwargs: fields of `NanoVLMConfig`. A dict as `vision_config` or `text_config` overrides single fields; a
                config object replaces the sub-config.

        Raises:
            ValueError: if `n_head * head_size` is not `n_embd`; see also `NanoVLMConfig`.
        """
        parts = config_fields(n_blks, n_layer, n_head, head_size, n_embd, img_embd_dim, dropout, vocab_size)
        for name, fields in parts.items():
            given = kwargs.get(name)
            if given is None or isinstance(given, dict):
                kwargs[name] = fields | (given or {})
        return cls(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **kwargs: Any) -> NanoVLMConfig:
        """Create the config of `mini`, `base` or `large` (Table 1). `from_paper` describes `kwargs`.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls.from_paper(**PRESETS[name], **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> NanoVLMConfig:
        """Create a config from a dict of fields.

        Raises:
            ValueError: for the config of huggingface/nanoVLM and for anything but a dict; see also the class.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"a config is a dict of fields, not a {type(config_dict).__name__}")
        refuse_other_project(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the fields of a config file; raise a ValueError for JSON that is not an object."""
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (RecursionError, TypeError) as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: not an object of fields, or nested too deeply"
            ) from error

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters of `encoder`, `projector` and `decoder`, and their `total`, as in Table 2.

        They are computed in closed form; tied weights count once.
        """
        return parameter_counts(self)


def _part(kind: type[PretrainedConfig], given: Any, defaults: dict[str, Any]) -> Any:
    """Return a sub-config: a given config as it is, or one made of `defaults` and a given dict of fields."""
    # Compared by `model_type`: a checkpoint that carries its code has classes of its own.
    if getattr(given, "model_type", None) == kind.model_type:
        return given
    if given is not None and not isinstance(given, dict):
        raise ValueError(
            f"{kind.base_config_key} is a {type(given).__name__}: give a {kind.__name__} or a dict of its fields"
        )
    return kind(**defaults | (given or {}))


def _init_base(config: PretrainedConfig, where: str, fields: dict[str, Any]) -> None:
    """Initialise the fields that all configs share; raise a ValueError that names the config if that fails."""
    if not _is_shallow(fields):
        raise ValueError(f"{where} is nested too deeply")
    try:
        PretrainedConfig.__init__(config, **fields)
    except ValueError:
        raise
    except Exception as error:  # version 5 raises errors of its own
        problem = str(error).strip() or type(error).__name__
        raise ValueError(f"{where}: {' '.join(problem.split())}") from error


def _is_shallow(value: Any, levels: int = 32) -> bool:
    """Return whether dicts and lists are nested at most `levels` deep, so that the value can be copied and printed."""
    if not isinstance(value, (dict, list, tuple)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner)


def _check_fields(where: str, config: NanoVLMVisionConfig | NanoVLMTextConfig) -> None:
    """Raise a ValueError that names the first field with an invalid value."""
    fields = dict(config.__dict__)
    if fields["intermediate_size"] is None:
        del fields["intermediate_size"]
    for name, largest in LARGEST.items():
        if name in fields:
            _check_integer(f"{where}.{name}", fields[name], 1, largest)
    for name in ("hidden_dropout", "attention_dropout", "patch_dropout"):
        if name in fields and not (_is_number(fields[name]) and 0 <= fields[name] < 1):
            raise ValueError(f"{where}.{name}={_shown(fields[name])} is not a number in [0, 1)")
    if not (_is_number(config.layer_norm_eps) and 0 < config.layer_norm_eps <= 1):
        raise ValueError(f"{where}.layer_norm_eps={_shown(config.layer_norm_eps)} is not a number above 0, up to 1")
    std = config.initializer_range
    if std is not None and not (_is_number(std) and 0 <= std <= 100):
        raise ValueError(f"{where}.initializer_range={_shown(std)} is not None or a number from 0 to 100")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{where}.hidden_size={config.hidden_size} is not a multiple of "
            f"num_attention_heads={config.num_attention_heads}"
        )
    _check_activation(f"{where}.hidden_act", config.hidden_act)
    for name in ("use_cache", "tie_word_embeddings"):
        if name in fields:
            _check_flag(f"{where}.{name}", fields[name])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if name in fields:
            _check_token_ids(f"{where}.{name}", fields[name], config.vocab_size)


def _check_integer(name: str, value: Any, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{name}={_shown(value)} is not an integer from {lowest} to {highest}")


def _check_token_ids(name: str, value: Any, vocab_size: int) -> None:
    """Raise a ValueError unless the value is None, an id, or for the end of a text a list of ids."""
    if isinstance(value, list) and not (value and name.endswith("eos_token_id")):
        expected = "an id or a list of ids, and an empty list is neither" if not value else "an id, and this is a list"
        raise ValueError(f"{name}={_shown(value)}: it has to be {expected}")
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        _check_integer(name, one, 0, vocab_size - 1)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={_shown(value)} is not a boolean")


def _check_activation(name: str, value: Any) -> None:
    if not isinstance(value, str) or value not in ACT2FN:
        raise ValueError(f"{name}={_shown(value)} is not an activation that Transformers knows (gelu, relu, silu, ...)")


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Return a short text for a value in a message."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > 10**18:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_other_project(fields: dict[str, Any]) -> None:
    """Raise a ValueError for the config of huggingface/nanoVLM."""
    if "vit_hidden_dim" in fields or "lm_hidden_dim" in fields:
        raise ValueError(
            "this is a checkpoint of huggingface/nanoVLM, another project of nearly the same name: "
            "load it with that project's own code, or choose a checkpoint whose model_type is 'nanovlm_hf'"
        )


__all__ = ["PRESETS", "NanoVLMConfig", "NanoVLMTextConfig", "NanoVLMVisionConfig"]

import copy
import json
import pickle

import pytest
import torch

from nanovlm_hf import PRESETS, NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMTextConfig, NanoVLMVisionConfig

from helpers.models import tiny_config

# Table 2 of the paper; base's decoder is printed as 16, with which the column adds up to 102.
TABLE_2 = {"mini": (69, 14, 17), "base": (78, 8, 14), "large": (73, 6, 21)}
TOTALS = {"mini": 5_674_944, "base": 16_166_272, "large": 25_808_832}


@pytest.mark.parametrize("preset", PRESETS)
def test_closed_formula_counts_every_part_of_the_model(preset):
    config = NanoVLMConfig.from_preset(preset)
    model = NanoVLMForConditionalGeneration(config)
    parts = {
        "encoder": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "decoder": model.model.language_model,
        "total": model,
    }
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert config.parameter_counts() == counted


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_shares_agree_with_table_2(preset):
    counts = NanoVLMConfig.from_preset(preset).parameter_counts()
    assert counts["total"] == TOTALS[preset]
    for part, share in zip(("encoder", "projector", "decoder"), TABLE_2[preset], strict=True):
        assert 100 * counts[part] / counts["total"] == pytest.approx(share, abs=0.5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("strategy", ["cls", "patch", "full"])
def test_closed_formula_holds_beyond_the_presets(tied, strategy):
    config = tiny_config(strategy, tie_word_embeddings=tied)
    model = NanoVLMForConditionalGeneration(config)
    assert config.parameter_counts()["total"] == sum(p.numel() for p in model.parameters())


def test_from_paper_uses_the_names_of_table_1():
    config = NanoVLMConfig.from_paper(n_blks=5, n_layer=10, n_head=16, head_size=12, n_embd=192, img_embd_dim=512)
    assert config.to_dict() == NanoVLMConfig.from_preset("large").to_dict()
    assert (config.vision_config.num_hidden_layers, config.vision_config.hidden_size) == (5, 512)
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (10, 192)
    assert config.vision_config.num_attention_heads == config.text_config.num_attention_heads == 16
    assert config.vision_config.hidden_dropout == config.text_config.hidden_dropout == 0.1


def test_from_paper_checks_the_head_size():
    with pytest.raises(ValueError, match=r"8 \* 12 = 96, n_embd is 100"):
        NanoVLMConfig.from_paper(n_blks=1, n_layer=4, n_head=8, head_size=12, n_embd=100, img_embd_dim=400)


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match="mini, base, large"):
        NanoVLMConfig.from_preset("huge")


@pytest.mark.parametrize(
    ("strategy", "tokens", "positions"), [("cls", 1, 256), ("patch", 196, 451), ("full", 197, 452)]
)
def test_position_table_holds_255_text_tokens(strategy, tokens, positions):
    config = NanoVLMConfig.from_preset("mini", vision_feature_select_strategy=strategy)
    assert config.image_seq_length == tokens
    assert config.text_config.max_position_embeddings == positions


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="cls, patch, full"):
        NanoVLMConfig(vision_feature_select_strategy="default")


@pytest.mark.parametrize("where", ["vision_config", "text_config"])
def test_width_must_be_a_multiple_of_the_heads(where):
    with pytest.raises(ValueError, match=f"{where}.hidden_size=100"):
        NanoVLMConfig(**{where: {"hidden_size": 100, "num_attention_heads": 16}})


def test_image_must_be_a_multiple_of_the_patch():
    with pytest.raises(ValueError, match="image_size=225"):
        NanoVLMConfig(vision_config={"image_size": 225})


@pytest.mark.parametrize(
    ("share", "strategy", "problem"),
    [(1.0, "cls", r"is not a number in \[0, 1\)"), (0.5, "full", "drops patches, which the decoder reads")],
)
def test_invalid_patch_dropout(share, strategy, problem):
    with pytest.raises(ValueError, match=problem):
        NanoVLMConfig(vision_config={"patch_dropout": share}, vision_feature_select_strategy=strategy)


def test_round_trip_through_json(tmp_path):
    config = tiny_config("patch", tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    assert NanoVLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_both_configs_share_one_tie_word_embeddings():
    config = tiny_config()
    config.tie_word_embeddings = False
    assert config.text_config.tie_word_embeddings is False
    assert config.get_text_config().tie_word_embeddings is False
    config.text_config.tie_word_embeddings = True
    assert config.tie_word_embeddings is True


UNTIED = {
    "top": lambda: NanoVLMConfig(tie_word_embeddings=False),
    "text dict": lambda: NanoVLMConfig(text_config={"tie_word_embeddings": False}),
    "text config": lambda: NanoVLMConfig(text_config=NanoVLMTextConfig(tie_word_embeddings=False)),
    "top, and a text config": lambda: NanoVLMConfig(text_config=NanoVLMTextConfig(), tie_word_embeddings=False),
    "text dict, against the top": lambda: NanoVLMConfig(
        text_config={"tie_word_embeddings": False}, tie_word_embeddings=True
    ),
    "top, against the text dict": lambda: NanoVLMConfig(
        text_config={"tie_word_embeddings": True}, tie_word_embeddings=False
    ),
    "from_dict": lambda: NanoVLMConfig.from_dict({"text_config": {"tie_word_embeddings": False}}),
    "from_preset": lambda: NanoVLMConfig.from_preset("mini", text_config={"tie_word_embeddings": False}),
    "from_preset, top": lambda: NanoVLMConfig.from_preset("mini", tie_word_embeddings=False),
}


@pytest.mark.parametrize("make", UNTIED.values(), ids=UNTIED.keys())
def test_false_in_either_config_unties(tmp_path, make):
    config = make()
    config.save_pretrained(tmp_path)
    loaded = NanoVLMConfig.from_pretrained(tmp_path)
    for one in (config, loaded, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert one.tie_word_embeddings is False
        assert one.text_config.tie_word_embeddings is False
        assert one.to_dict()["tie_word_embeddings"] is one.to_dict()["text_config"]["tie_word_embeddings"] is False
    tied = NanoVLMConfig().parameter_counts()
    head = 5120 * 96
    assert config.parameter_counts() == tied | {"decoder": tied["decoder"] + head, "total": tied["total"] + head}


def test_vocab_size_and_use_cache_are_those_of_the_decoder(tmp_path):
    config = tiny_config()
    assert (config.vocab_size, config.use_cache) == (320, True)
    config.vocab_size, config.use_cache = 330, False
    assert (config.text_config.vocab_size, config.text_config.use_cache) == (330, False)
    config.save_pretrained(tmp_path)
    loaded = NanoVLMConfig.from_pretrained(tmp_path)
    for one in (loaded, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (one.vocab_size, one.use_cache) == (330, False)
    assert "vocab_size" not in json.loads((tmp_path / "config.json").read_text())
    assert NanoVLMConfig.from_pretrained(tmp_path, use_cache=True).use_cache is True
    for field, value in (("vocab_size", 3), ("vocab_size", "96"), ("use_cache", 1)):
        with pytest.raises(ValueError, match=field):
            setattr(config, field, value)
        with pytest.raises(ValueError, match=field):
            NanoVLMConfig(**{field: value})


def test_from_pretrained_can_untie_in_either_config(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    for change in ({"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}):
        config = NanoVLMConfig.from_pretrained(tmp_path, **change)
        assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is False
        assert config.text_config.vocab_size == 320


def test_an_untied_model_stays_untied(tmp_path):
    config = tiny_config()
    config.text_config.tie_word_embeddings = False
    model = NanoVLMForConditionalGeneration(config)

    def untied(one) -> bool:
        head, embedding = one.lm_head.weight, one.get_input_embeddings().weight
        counted = sum(p.numel() for p in one.parameters())
        return head is not embedding and not torch.equal(head, embedding) and _total(one) == counted

    def _total(one) -> int:
        return one.config.parameter_counts()["total"]

    assert untied(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert untied(loaded)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    loaded.resize_token_embeddings(330)
    assert untied(loaded)
    assert loaded.lm_head.weight.shape == loaded.get_input_embeddings().weight.shape == (330, 32)
    loaded.save_pretrained(tmp_path / "resized")
    again = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "resized")
    assert untied(again)
    assert torch.equal(again.lm_head.weight, loaded.lm_head.weight)


def test_a_tied_model_stays_tied_when_resized(tmp_path):
    model = NanoVLMForConditionalGeneration(tiny_config())
    model.resize_token_embeddings(330)
    model.save_pretrained(tmp_path)
    loaded = NanoVLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded.config.parameter_counts()["total"] == sum(p.numel() for p in loaded.parameters())


def test_preset_overrides_by_dict_and_by_config():
    changed = NanoVLMConfig.from_preset("base", vision_config={"hidden_dropout": 0.2}, text_config={"vocab_size": 100})
    assert (changed.vision_config.hidden_size, changed.vision_config.hidden_dropout) == (512, 0.2)
    assert (changed.text_config.hidden_size, changed.text_config.vocab_size) == (128, 100)
    vision, text = NanoVLMVisionConfig(hidden_size=64), NanoVLMTextConfig(vocab_size=100)
    replaced = NanoVLMConfig.from_preset("base", vision_config=vision, text_config=text)
    assert (replaced.vision_config, replaced.text_config) == (vision, text)
    assert (
        NanoVLMConfig.from_preset("mini", vision_config=None).to_dict() == NanoVLMConfig.from_preset("mini").to_dict()
    )


def test_special_token_ids_at_the_top_level():
    config = NanoVLMConfig(text_config={"eos_token_id": 7})
    assert (config.eos_token_id, config.pad_token_id) == (7, 0)


NUMBERS = ("hidden_dropout", "attention_dropout", "patch_dropout", "layer_norm_eps", "initializer_range")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
FIELDS = {
    "vision_config": (*SIZES, "image_size", "patch_size", "num_channels", *NUMBERS, "hidden_act"),
    "text_config": (
        *(*SIZES, "vocab_size", "max_position_embeddings", "hidden_act", "use_cache", "tie_word_embeddings"),
        *(name for name in NUMBERS if name != "patch_dropout"),
        *("pad_token_id", "bos_token_id", "eos_token_id"),
    ),
}
INVALID = (-1, "96", {}, [[1]], 10**9, 10**400, float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize(("part", "field"), [(part, field) for part, fields in FIELDS.items() for field in fields])
def test_invalid_values_are_refused_by_field(tmp_path, part, field):
    wrong = list(INVALID)
    if field in (*SIZES, "image_size", "patch_size", "num_channels", "vocab_size", "max_position_embeddings"):
        wrong += [0, 1.5, True]
    for value in wrong:
        with pytest.raises(ValueError, match=field):
            NanoVLMConfig(**{part: {field: value}})
        with pytest.raises(ValueError, match=field):
            NanoVLMConfig.from_dict({part: {field: value}})
        with pytest.raises(ValueError, match=field):
            {"vision_config": NanoVLMVisionConfig, "text_config": NanoVLMTextConfig}[part](**{field: value})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nanovlm_hf", part: {field: "96"}}))
    with pytest.raises(ValueError, match=field):
        NanoVLMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers=1000000"),
        ({"text_config": {"vocab_size": 10**9}}, "vocab_size=1000000000"),
        ({"vision_config": {"image_size": 100_000}}, "image_size=100000"),
        ({"vision_config": {"image_size": 16, "patch_size": 32}}, "image_size=16 is not a multiple of patch_size=32"),
        ({"text_config": []}, "text_config is a list"),
        ({"vision_config": "large"}, "vision_config is a str"),
        ({"text_config": NanoVLMVisionConfig()}, "text_config is a NanoVLMVisionConfig"),
        ({"image_token_id": 5120}, "image_token_id=5120"),
        ({"image_token_id": None}, "image_token_id=None"),
        ({"eos_token_id": [2, 9999]}, "eos_token_id=9999"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"projector_hidden_act": "gellu"}, "projector_hidden_act='gellu'"),
        ({"vision_feature_select_strategy": ["cls"]}, "vision_feature_select_strategy"),
        ({"text_config": {"max_position_embeddings": 1}}, "max_position_embeddings=1 leaves no room"),
        ({"dtype": "float31"}, "float31"),
        ({"num_patches": 5, "image_seq_length": 7}, "config"),
    ],
)
def test_invalid_configs_are_refused(fields, message):
    for make in (lambda: NanoVLMConfig(**fields), lambda: NanoVLMConfig.from_dict(dict(fields))):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("content", ["[]", "5", "null", '"text"', "[" * 100_000, '{"a":' * 500 + "1" + "}" * 500])
def test_a_config_file_that_is_not_an_object_is_a_value_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError):  # noqa: PT011
        NanoVLMConfig.from_pretrained(tmp_path)


def test_large_configs_are_accepted():
    config = NanoVLMConfig(
        vision_config={"hidden_size": 1024, "num_hidden_layers": 48, "num_attention_heads": 16, "image_size": 1024},
        text_config={"vocab_size": 262_144, "hidden_size": 4096, "num_hidden_layers": 80, "num_attention_heads": 32},
    )
    assert config.parameter_counts()["total"] > 10**10


def test_config_of_huggingface_nanovlm_is_refused():
    with pytest.raises(ValueError, match="huggingface/nanoVLM"):
        NanoVLMConfig.from_dict({"vit_hidden_dim": 768, "lm_hidden_dim": 960, "vit_model_type": "google/siglip"})

import pytest
from conftest import tiny_config

from nanovlm_hf import PRESETS, NanoVLMConfig, NanoVLMForConditionalGeneration

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
def test_shares_are_those_of_table_2(preset):
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


def test_the_papers_names_mean_what_table_1_says():
    config = NanoVLMConfig.from_paper(n_blks=5, n_layer=10, n_head=16, head_size=12, n_embd=192, img_embd_dim=512)
    assert config.to_dict() == NanoVLMConfig.from_preset("large").to_dict()
    assert (config.vision_config.num_hidden_layers, config.vision_config.hidden_size) == (5, 512)
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (10, 192)
    assert config.vision_config.num_attention_heads == config.text_config.num_attention_heads == 16
    assert config.vision_config.hidden_dropout == config.text_config.hidden_dropout == 0.1


def test_from_paper_refuses_heads_that_do_not_make_the_width():
    with pytest.raises(ValueError, match=r"8 \* 12 = 96, n_embd is 100"):
        NanoVLMConfig.from_paper(n_blks=1, n_layer=4, n_head=8, head_size=12, n_embd=100, img_embd_dim=400)


def test_unknown_preset_names_those_there_are():
    with pytest.raises(ValueError, match="mini, base, large"):
        NanoVLMConfig.from_preset("huge")


@pytest.mark.parametrize(
    ("strategy", "tokens", "positions"), [("cls", 1, 256), ("patch", 196, 451), ("full", 197, 452)]
)
def test_positions_always_leave_room_for_255_text_tokens(strategy, tokens, positions):
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
    [(1.0, "cls", "is not from 0 to below 1"), (0.5, "full", "would leave empty places")],
)
def test_impossible_patch_dropout(share, strategy, problem):
    with pytest.raises(ValueError, match=problem):
        NanoVLMConfig(vision_config={"patch_dropout": share}, vision_feature_select_strategy=strategy)


def test_round_trip_through_json(tmp_path):
    config = tiny_config("patch", tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    assert NanoVLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_tying_is_one_value_in_both_configs():
    config = tiny_config()
    config.tie_word_embeddings = False
    assert config.text_config.tie_word_embeddings is False
    assert config.get_text_config().tie_word_embeddings is False


def test_special_tokens_reach_the_top_where_generation_reads_them():
    config = NanoVLMConfig(text_config={"eos_token_id": 7})
    assert (config.eos_token_id, config.pad_token_id) == (7, 0)


def test_checkpoint_of_the_other_nanovlm_project_is_named():
    with pytest.raises(ValueError, match="huggingface/nanoVLM"):
        NanoVLMConfig.from_dict({"vit_hidden_dim": 768, "lm_hidden_dim": 960, "vit_model_type": "google/siglip"})

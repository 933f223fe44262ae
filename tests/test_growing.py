"""Runs that begin from checkpoints: whole, or grown."""

from pathlib import Path

import pytest
import setup_run
import torch
from arguments import read_arguments
from growing import grow, grow_eyes
from matplotlib import get_data_path
from PIL import Image

from nanovlm_hf import SHIPPED, InputError, NanoVLMConfig, NanoVLMForConditionalGeneration


def a_model(n_blks, n_embd=16, seed=0, **kwargs):
    torch.manual_seed(seed)
    config = NanoVLMConfig.from_paper(
        n_blks=n_blks,
        n_layer=1,
        n_head=2,
        n_embd=n_embd,
        head_size=n_embd // 2,
        img_embd_dim=32,
        vocab_size=50,
        **kwargs,
    )
    return NanoVLMForConditionalGeneration(config).eval()


def arguments(*options):
    return read_arguments(["--dataset", "data", "--output_dir", "run", *map(str, options)])


@pytest.mark.parametrize("blocks", [(1, 1), (1, 3), (2, 4)])
def test_more_blocks_see_at_first_what_fewer_saw(blocks):
    few, more = a_model(blocks[0], seed=0), a_model(blocks[1], n_embd=24, seed=1)
    pixel_values = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        wanted = few.model.vision_tower(pixel_values, cls_only=True).pooler_output
        assert not torch.allclose(more.model.vision_tower(pixel_values, cls_only=True).pooler_output, wanted)
        grow(more, few)
        torch.testing.assert_close(more.model.vision_tower(pixel_values, cls_only=True).pooler_output, wanted)
        torch.testing.assert_close(more.model.vision_tower(pixel_values).pooler_output, wanted)
    assert torch.equal(more.model.multi_modal_projector.fc1.weight, few.model.multi_modal_projector.fc1.weight)


def test_the_blocks_that_were_added_learn():
    few, more = a_model(1), a_model(2, seed=1)
    ids = torch.tensor([[1, 3, 7, 9]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 224, 224), "labels": ids}
    grow(more, few)
    torch.testing.assert_close(more(**inputs).logits, few(**inputs).logits)
    more.train()(**inputs).loss.backward()
    added = more.model.vision_tower.blocks[0]
    assert added.self_attn.out_proj.weight.grad.abs().sum() > 0
    assert added.mlp.fc2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("preset", "smaller"), [("base", "mini-short"), ("large", "base-short")])
def test_a_larger_model_sees_and_writes_at_first_nearly_what_a_smaller_did(preset, smaller):
    torch.manual_seed(0)
    larger, processor = setup_run.model_and_processor(arguments("--preset", preset, "--grow_from", smaller))
    begun = NanoVLMForConditionalGeneration.from_pretrained(SHIPPED[smaller], dtype=torch.float32)
    with Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg") as photo:
        inputs = processor(images=photo, text="A man in a black hat", return_tensors="pt")
    with torch.no_grad():
        seen, wanted = (one.eval().model.vision_tower(inputs["pixel_values"]).pooler_output for one in (larger, begun))
        written, meant = (one(**inputs).logits.log_softmax(-1) for one in (larger, begun))
    assert torch.cosine_similarity(seen[:, : wanted.shape[1]], wanted).item() > 0.99
    divergence = torch.nn.functional.kl_div(written, meant, log_target=True, reduction="none").sum(-1)
    assert divergence.mean() < 0.1


def test_a_decoder_that_would_not_fit_begins_anew():
    few, more = a_model(1, n_embd=24), a_model(1, n_embd=16, seed=1)
    before = more.lm_head.weight.clone()
    grow(more, few)
    assert torch.equal(more.lm_head.weight, before)
    assert torch.equal(more.model.multi_modal_projector.fc1.weight, few.model.multi_modal_projector.fc1.weight)


def test_an_encoder_that_is_larger_or_cuts_other_patches():
    with pytest.raises(InputError, match="its encoder's hidden_size is 512, this model's is 400"):
        setup_run.model_and_processor(arguments("--n_blks", 3, "--grow_from", "base-short"))
    sizes = ("--n_head", 12, "--img_embd_dim", 480, "--head_size", 8)
    with pytest.raises(InputError, match="its encoder has 8 heads, this model's 12 and a hidden_size of 480"):
        setup_run.model_and_processor(arguments("--grow_from", "mini-short", *sizes))
    with pytest.raises(InputError, match="its encoder has 2 blocks, this model's 1"):
        grow(a_model(1), a_model(2))
    with pytest.raises(InputError, match="its encoder's patch_size is 32, this model's is 16"):
        grow(a_model(1), a_model(1, vision_config={"patch_size": 32}))


def test_a_variant_that_sees_every_patch_takes_the_eyes_of_mini():
    options = ("--grow_from", "mini-short", "--vision_feature_select_strategy", "full")
    model, processor = setup_run.model_and_processor(arguments(*options))
    shipped = NanoVLMForConditionalGeneration.from_pretrained(SHIPPED["mini-short"], dtype=torch.float32)
    for name, value in shipped.model.vision_tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value), name
    assert torch.equal(model.lm_head.weight, shipped.lm_head.weight)
    assert model.config.image_seq_length == processor.image_seq_length == 197
    own, others = (one.model.language_model.position_embedding.weight for one in (model, shipped))
    assert torch.equal(own[0], others[0])  # [CLS]
    assert torch.equal(own[197:], others[1:])  # the words


def test_a_whole_checkpoint_takes_the_runs_dropout():
    model, _ = setup_run.model_and_processor(arguments("--init_from", "mini-short", "--dropout", 0.3))
    assert model.model.vision_tower.blocks[0].dropout.p == 0.3
    assert model.config.text_config.hidden_dropout == 0.3


@pytest.mark.parametrize(
    "options", [("--preset", "base"), ("--n_layer", 2), ("--vision_feature_select_strategy", "full")]
)
def test_a_whole_checkpoint_of_other_sizes(options):
    with pytest.raises(InputError, match="is of other sizes than this run's: give those, or see grow_from"):
        setup_run.model_and_processor(arguments("--init_from", "mini-short", *options))


def test_a_checkpoint_whose_tokenizer_has_more_words(tmp_path):
    _, processor = setup_run.model_and_processor(arguments())
    processor.save_pretrained(tmp_path)
    a_model(1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has a model of 50 entries and a tokenizer of 5120"):
        setup_run.model_and_processor(arguments("--grow_from", tmp_path))


def test_patches_are_hidden_where_the_decoder_sees_cls_alone():
    config = setup_run.model_config(arguments("--patch_dropout", 0.5), 50)
    assert config.vision_config.patch_dropout == 0.5
    with pytest.raises(InputError, match=r"patch_dropout: 0.5 but the decoder sees the patches of full: it goes"):
        arguments("--patch_dropout", 0.5, "--vision_feature_select_strategy", "full")


@pytest.mark.parametrize(("preset", "likeness"), [("base", 0.99), ("large", 0.96)])
def test_a_wider_encoder_sees_at_first_nearly_what_mini_saw(preset, likeness):
    """Of eight pictures, where each differs from their mean; large's heads are split besides."""
    mini = NanoVLMForConditionalGeneration.from_pretrained(SHIPPED["mini-short"], dtype=torch.float32).eval()
    torch.manual_seed(0)
    wider = NanoVLMForConditionalGeneration(NanoVLMConfig.from_preset(preset)).eval()
    grow_eyes(wider, mini)
    pixel_values = torch.nn.functional.interpolate(torch.randn(8, 3, 14, 14), 224, mode="bicubic")
    seen = []
    with torch.no_grad():
        for one in (mini, wider):
            named = one.model.multi_modal_projector.fc1(one.model.vision_tower(pixel_values).pooler_output)
            seen.append(named[:, : mini.model.multi_modal_projector.fc1.out_features])
    wanted, found = (one - one.mean(0) for one in seen)
    assert torch.cosine_similarity(found, wanted).min() > likeness


def test_the_decoder_of_one_and_the_eyes_of_another():
    options = ("--preset", "base", "--init_from", "base-short", "--grow_from", "mini-short")
    model, _ = setup_run.model_and_processor(arguments(*options))
    base, mini = (
        NanoVLMForConditionalGeneration.from_pretrained(SHIPPED[name], dtype=torch.float32)
        for name in ("base-short", "mini-short")
    )
    for name, value in base.model.language_model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], value), name
    own, eyes = (one.model.vision_tower.position_embedding for one in (model, mini))
    assert torch.equal(own[..., : eyes.shape[-1]], eyes)
    assert not model.model.vision_tower.blocks[0].mlp.fc2.weight.any()

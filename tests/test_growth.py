"""Initialisation from a checkpoint of the same sizes or from a smaller one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib import get_data_path
from PIL import Image

from nanovlm_hf import SHIPPED, InputError, NanoVLMConfig, NanoVLMForConditionalGeneration
from nanovlm_hf.training import initial_model
from nanovlm_hf.training.arguments import read_arguments
from nanovlm_hf.training.growth import grow, grow_vision_encoder


def make_model(n_blks, n_embd=16, seed=0, **kwargs):
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
def test_added_encoder_layers_preserve_the_output(blocks):
    smaller, larger = make_model(blocks[0], seed=0), make_model(blocks[1], n_embd=24, seed=1)
    pixel_values = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        wanted = smaller.model.vision_tower(pixel_values, cls_only=True).pooler_output
        assert not torch.allclose(larger.model.vision_tower(pixel_values, cls_only=True).pooler_output, wanted)
        grow(larger, smaller)
        torch.testing.assert_close(larger.model.vision_tower(pixel_values, cls_only=True).pooler_output, wanted)
        torch.testing.assert_close(larger.model.vision_tower(pixel_values).pooler_output, wanted)
    assert torch.equal(larger.model.multi_modal_projector.fc1.weight, smaller.model.multi_modal_projector.fc1.weight)


def test_added_layers_receive_gradients():
    smaller, larger = make_model(1), make_model(2, seed=1)
    ids = torch.tensor([[1, 3, 7, 9]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 224, 224), "labels": ids}
    grow(larger, smaller)
    torch.testing.assert_close(larger(**inputs).logits, smaller(**inputs).logits)
    larger.train()(**inputs).loss.backward()
    added = larger.model.vision_tower.layers[0]
    assert added.self_attn.out_proj.weight.grad.abs().sum() > 0
    assert added.mlp.fc2.weight.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "smaller"), [("base", "mini-short"), ("large", "base-short")])
def test_a_larger_model_starts_close_to_the_smaller_one(preset, smaller):
    torch.manual_seed(0)
    larger, processor = initial_model.model_and_processor(arguments("--preset", preset, "--grow_from", smaller))
    source = NanoVLMForConditionalGeneration.from_pretrained(SHIPPED[smaller], dtype=torch.float32)
    with Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg") as photo:
        inputs = processor(images=photo, text="A man in a black hat", return_tensors="pt")
    with torch.no_grad():
        seen, wanted = (one.eval().model.vision_tower(inputs["pixel_values"]).pooler_output for one in (larger, source))
        written, meant = (one(**inputs).logits.log_softmax(-1) for one in (larger, source))
    assert torch.cosine_similarity(seen[:, : wanted.shape[1]], wanted).item() > 0.99
    divergence = torch.nn.functional.kl_div(written, meant, log_target=True, reduction="none").sum(-1)
    assert divergence.mean() < 0.1


def test_a_smaller_decoder_keeps_its_random_weights():
    smaller, larger = make_model(1, n_embd=24), make_model(1, n_embd=16, seed=1)
    before = larger.lm_head.weight.clone()
    grow(larger, smaller)
    assert torch.equal(larger.lm_head.weight, before)
    assert torch.equal(larger.model.multi_modal_projector.fc1.weight, smaller.model.multi_modal_projector.fc1.weight)


def test_a_larger_or_incompatible_encoder_is_refused():
    with pytest.raises(InputError, match="its encoder's hidden_size is 512, this model's is 400"):
        initial_model.model_and_processor(arguments("--n_blks", 3, "--grow_from", "base-short"))
    sizes = ("--n_head", 12, "--img_embd_dim", 480, "--head_size", 8)
    with pytest.raises(InputError, match="its encoder has 8 heads, this model's 12 and a hidden_size of 480"):
        initial_model.model_and_processor(arguments("--grow_from", "mini-short", *sizes))
    with pytest.raises(InputError, match="its encoder has 2 layers, this model's 1"):
        grow(make_model(1), make_model(2))
    with pytest.raises(InputError, match="its encoder's patch_size is 32, this model's is 16"):
        grow(make_model(1), make_model(1, vision_config={"patch_size": 32}))


def test_grow_from_a_model_with_fewer_image_tokens():
    options = ("--grow_from", "mini-short", "--vision_feature_select_strategy", "full")
    model, processor = initial_model.model_and_processor(arguments(*options))
    shipped = NanoVLMForConditionalGeneration.from_pretrained(SHIPPED["mini-short"], dtype=torch.float32)
    for name, value in shipped.model.vision_tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value), name
    assert torch.equal(model.lm_head.weight, shipped.lm_head.weight)
    assert model.config.image_seq_length == processor.image_seq_length == 197
    own, others = (one.model.language_model.embed_positions.weight for one in (model, shipped))
    assert torch.equal(own[0], others[0])  # [CLS]
    assert torch.equal(own[197:], others[1:])  # text


def test_init_from_uses_the_dropout_of_the_run():
    model, _ = initial_model.model_and_processor(arguments("--init_from", "mini-short", "--dropout", 0.3))
    assert model.model.vision_tower.layers[0].dropout.p == 0.3
    assert model.config.text_config.hidden_dropout == 0.3


@pytest.mark.parametrize(
    "options", [("--preset", "base"), ("--n_layer", 2), ("--vision_feature_select_strategy", "full")]
)
def test_init_from_refuses_other_sizes(options):
    with pytest.raises(InputError, match="has different sizes from this run: set the same sizes, or use grow_from"):
        initial_model.model_and_processor(arguments("--init_from", "mini-short", *options))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    _, processor = initial_model.model_and_processor(arguments())
    processor.save_pretrained(tmp_path)
    make_model(1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has 50 tokens in its model and 5120 in its tokenizer"):
        initial_model.model_and_processor(arguments("--grow_from", tmp_path))


def test_patch_dropout_requires_the_cls_strategy():
    config = initial_model.model_config(arguments("--patch_dropout", 0.5), 50)
    assert config.vision_config.patch_dropout == 0.5
    with pytest.raises(InputError, match=r"patch_dropout: 0.5 needs vision_feature_select_strategy cls, not full"):
        arguments("--patch_dropout", 0.5, "--vision_feature_select_strategy", "full")


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "likeness"), [("base", 0.99), ("large", 0.96)])
def test_a_wider_encoder_starts_close_to_mini(preset, likeness):
    """Compare the deviations from the mean of eight images; the heads of large are split as well."""
    mini = NanoVLMForConditionalGeneration.from_pretrained(SHIPPED["mini-short"], dtype=torch.float32).eval()
    torch.manual_seed(0)
    wider = NanoVLMForConditionalGeneration(NanoVLMConfig.from_preset(preset)).eval()
    grow_vision_encoder(wider, mini)
    pixel_values = torch.nn.functional.interpolate(torch.randn(8, 3, 14, 14), 224, mode="bicubic")
    seen = []
    with torch.no_grad():
        for one in (mini, wider):
            named = one.model.multi_modal_projector.fc1(one.model.vision_tower(pixel_values).pooler_output)
            seen.append(named[:, : mini.model.multi_modal_projector.fc1.out_features])
    wanted, found = (one - one.mean(0) for one in seen)
    assert torch.cosine_similarity(found, wanted).min() > likeness


@pytest.mark.slow
def test_decoder_and_vision_encoder_from_different_checkpoints():
    options = ("--preset", "base", "--init_from", "base-short", "--grow_from", "mini-short")
    model, _ = initial_model.model_and_processor(arguments(*options))
    base, mini = (
        NanoVLMForConditionalGeneration.from_pretrained(SHIPPED[name], dtype=torch.float32)
        for name in ("base-short", "mini-short")
    )
    for name, value in base.model.language_model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], value), name
    own, smaller = (one.model.vision_tower.embeddings.position_embeddings for one in (model, mini))
    assert torch.equal(own[..., : smaller.shape[-1]], smaller)
    assert not model.model.vision_tower.layers[0].mlp.fc2.weight.any()


def changed(folder, name, value, part=None):
    """Save mini-short with another value of a field of its config."""
    shutil.copytree(SHIPPED["mini-short"], folder)
    fields = json.loads((folder / "config.json").read_text())
    (fields if part is None else fields[part])[name] = value
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "layer_norm_eps", 1e-6),
        ("text_config", "hidden_act", "relu"),
        ("text_config", "layer_norm_eps", 1e-6),
        ("text_config", "eos_token_id", 1),
        (None, "projector_hidden_act", "relu"),
        (None, "image_token_id", 4),
    ],
)
def test_a_checkpoint_with_other_settings_is_refused(tmp_path, part, name, value):
    folder = changed(tmp_path / "other", name, value, part)
    with pytest.raises(
        InputError,
        match=rf"init_from: .*( has a different .* its ({part}\.)?{name} is |<image> at 3, config.json at 4)",
    ):
        initial_model.model_and_processor(arguments("--init_from", folder))
    with pytest.raises(InputError, match=rf"grow_from: .*(its \w+'s {name} is |<image> at 3, config.json at 4)"):
        initial_model.model_and_processor(arguments("--preset", "base", "--grow_from", folder))


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout", "initializer_range"])
def test_settings_of_training_may_differ(tmp_path, name):
    folder = changed(tmp_path / "other", name, 0.25, "text_config")
    model, _ = initial_model.model_and_processor(arguments("--init_from", folder))
    shipped = NanoVLMForConditionalGeneration.from_pretrained(SHIPPED["mini-short"], dtype=torch.float32)
    for own, others in zip(model.parameters(), shipped.parameters(), strict=True):
        assert torch.equal(own, others)


@pytest.mark.slow
def test_an_untied_checkpoint_is_refused_by_a_tied_model(tmp_path):
    config = NanoVLMConfig.from_preset("mini", tie_word_embeddings=False)
    untied = NanoVLMForConditionalGeneration(config)
    assert not torch.equal(untied.lm_head.weight, untied.get_input_embeddings().weight)
    untied.save_pretrained(tmp_path)
    initial_model.model_and_processor(arguments())[1].save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"init_from: .*tie_word_embeddings is False, this run's is True"):
        initial_model.model_and_processor(arguments("--init_from", tmp_path))
    with pytest.raises(InputError, match="grow_from: its model's tie_word_embeddings is False, this model's is True"):
        initial_model.model_and_processor(arguments("--preset", "base", "--grow_from", tmp_path))
    # Its vision encoder can still be combined with another decoder.
    options = ("--init_from", "mini-short", "--grow_from", tmp_path)
    model, _ = initial_model.model_and_processor(arguments(*options))
    assert torch.equal(model.model.vision_tower.embeddings.cls_token, untied.model.vision_tower.embeddings.cls_token)


def test_other_image_preprocessing_is_refused(tmp_path):
    def settings(folder, **fields):
        shutil.copytree(SHIPPED["mini-short"], folder)
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    small = settings(tmp_path / "small", size={"height": 192, "width": 192})
    with pytest.raises(InputError, match=r"init_from: .*size is 192 x 192, the model takes 224 x 224"):
        initial_model.model_and_processor(arguments("--init_from", small))
    raw = settings(tmp_path / "raw", do_normalize=False)
    with pytest.raises(InputError, match=r"grow_from: .* does not resize, rescale and normalise its images"):
        initial_model.model_and_processor(arguments("--preset", "base", "--grow_from", raw))
    dark = settings(tmp_path / "dark", image_mean=[0.1, 0.1, 0.1])
    with pytest.raises(InputError, match=r"grow_from: .*dark prepares images differently from .*mini-short"):
        initial_model.model_and_processor(arguments("--init_from", "mini-short", "--grow_from", dark))
    _, processor = initial_model.model_and_processor(arguments("--init_from", dark))
    assert processor.image_processor.image_mean == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("field", ["init_from", "grow_from"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, field):
    for name, damage in {
        "model.safetensors": b"\0" * 100,
        "config.json": b"{",
        "tokenizer.json": b"[]",
        "preprocessor_config.json": b"[",
    }.items():
        folder = tmp_path / name
        shutil.copytree(SHIPPED["mini-short"], folder)
        (folder / name).write_bytes(damage)
        with pytest.raises(InputError) as caught:
            initial_model.model_and_processor(arguments(f"--{field}", folder))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [("--n_layer", 10**6), ("--img_embd_dim", 2**20), ("--head_size", 10**7)])
def test_impossible_sizes_are_refused_immediately(options):
    with pytest.raises(InputError, match="is not an integer from 1 to"):
        initial_model.model_and_processor(arguments(*options))

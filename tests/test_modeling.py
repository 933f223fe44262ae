import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovlm_hf import NanoVLMForConditionalGeneration, NanoVLMModel, modeling_nanovlm

from helpers.models import old_names, random_image, tiny_config, tiny_model


def forward(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**{**inputs, **kwargs})


def test_shapes(model, inputs):
    outputs = forward(model, inputs, output_hidden_states=True, output_attentions=True)
    batch, length = inputs["input_ids"].shape
    image_tokens = model.config.image_seq_length
    assert outputs.logits.shape == (batch, length, 320)
    assert outputs.image_hidden_states.shape == (batch, image_tokens, 32)
    assert len(outputs.hidden_states) == 3
    assert all(state.shape == (batch, length, 32) for state in outputs.hidden_states)
    assert [weights.shape for weights in outputs.attentions] == [(batch, 4, length, length)] * 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attentions_do_not_depend_on_the_implementation(model, inputs, implementation):
    reference = tiny_model(model.config.vision_feature_select_strategy)
    reference.set_attn_implementation("eager")
    model.set_attn_implementation(implementation)
    plain = forward(model, inputs).logits
    outputs, want = (forward(one, inputs, output_attentions=True) for one in (model, reference))
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[seen], plain[seen], atol=1e-5, rtol=1e-5)
    for weights, expected in zip(outputs.attentions, want.attentions, strict=True):
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    pixels = inputs["pixel_values"]
    for one in (model.get_image_features, model.model.vision_tower):
        vision = one(pixels, output_attentions=True)
        assert [weights.shape for weights in vision.attentions] == [(len(pixels), 4, 5, 5)] * 2
    # The arguments of one call do not change the next.
    assert model.config._attn_implementation == implementation
    assert forward(model, inputs).attentions is None
    assert torch.equal(forward(model, inputs).logits, plain)


def test_attentions_without_eager_attention_warn_once(inputs, strategy, caplog):
    from nanovlm_hf import modeling_nanovlm

    modeling_nanovlm.logger.warning_once.cache_clear()
    model = tiny_model(strategy)
    for _ in range(2):
        forward(model, inputs, output_attentions=True)
        model.get_image_features(inputs["pixel_values"], output_attentions=True)
    warnings = [record for record in caplog.records if "output_attentions" in record.message]
    assert len(warnings) == 1
    assert "attn_implementation='eager'" in warnings[0].message


@pytest.mark.parametrize("padding", [False, True])
def test_attentions_follow_a_boolean_mask_of_the_caller(padding):
    model = tiny_model()
    embeds = torch.randn(1, 6, 32)
    mask = torch.ones(6, 6).tril().bool()
    mask[:, 0] &= not padding
    mask[0, 0] = True
    outputs = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask[None, None],
        position_ids=torch.arange(6)[None],
        output_attentions=True,
    )
    assert all(not weights[0, :, ~mask].any() for weights in outputs.attentions)


def test_hidden_states_of_the_encoder_have_one_shape(model, inputs):
    pixels = inputs["pixel_values"]
    vision = model.get_image_features(pixels, output_hidden_states=True)
    assert [state.shape for state in vision.hidden_states] == [(len(pixels), 5, 32)] * 3
    plain = model.get_image_features(pixels)
    torch.testing.assert_close(vision.pooler_output, plain.pooler_output, atol=1e-5, rtol=1e-5)
    assert vision.last_hidden_state.shape == plain.last_hidden_state.shape


def test_a_later_token_does_not_change_earlier_logits(model, inputs):
    before = forward(model, inputs).logits
    ids = inputs["input_ids"].clone()
    ids[:, -1] = (ids[:, -1] + 1 - 4) % 316 + 4
    after = forward(model, inputs, input_ids=ids).logits
    torch.testing.assert_close(after[:, :-1], before[:, :-1], rtol=0, atol=0)
    assert not torch.equal(after[:, -1], before[:, -1])


def test_every_text_token_attends_to_the_image(model, inputs):
    before = forward(model, inputs).logits
    after = forward(model, inputs, pixel_values=inputs["pixel_values"].flip(-1)).logits
    assert ((after - before).abs().amax(-1) > 1e-6)[inputs["attention_mask"].bool()].float().mean() > 0.9


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cls_sees_the_last_patch(implementation):
    model = tiny_model()
    model.set_attn_implementation(implementation)
    pixels = torch.randn(1, 3, 32, 32)
    changed = pixels.clone()
    changed[:, :, 16:, 16:] += 1  # the last of four patches
    with torch.no_grad():
        one, other = (model.model.vision_tower(x).pooler_output for x in (pixels, changed))
    assert (one - other).abs().max() > 1e-4


def test_positions_are_checked_without_synchronisation(model, inputs, monkeypatch):
    """On a GPU, reading a position waits for all preceding work."""

    def refuse(*arguments, **options):
        raise AssertionError("positions were read")

    monkeypatch.setattr(torch.Tensor, "max", refuse)
    language = model.model.language_model
    entries = model.config.text_config.max_position_embeddings
    forward(model, inputs)
    forward(model, {"input_ids": torch.full((1, entries), 5)})
    cache = language(input_ids=torch.full((1, entries - 1), 5), use_cache=True).past_key_values
    language(input_ids=torch.full((1, 1), 5), past_key_values=cache)
    monkeypatch.undo()
    for tokens, past in (([5] * (entries + 1), None), ([5], cache)):
        with pytest.raises(ValueError, match=f"reaches position {entries + 1}, this model has {entries}"):
            language(input_ids=torch.tensor([tokens]), past_key_values=past)
    with pytest.raises(ValueError, match="reaches position 1000"):
        language(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[999]]))
    # Padding does not count.
    padded = torch.tensor([[0] * 9 + [1] * entries])
    language(input_ids=torch.full_like(padded, 5), attention_mask=padded)


def test_initialisation_does_not_depend_on_the_config_class():
    """A checkpoint that carries its code has config classes of its own."""
    from transformers import PretrainedConfig

    class Copy(PretrainedConfig):
        def __init__(self, vision_config=None, text_config=None, **kwargs):
            super().__init__(**kwargs)
            self.vision_config, self.text_config = vision_config, text_config

    config = tiny_config(tie_word_embeddings=False)
    config.vision_config.initializer_range = 0.5
    model = NanoVLMForConditionalGeneration(config)
    for part in (model, model.model):
        part.config = Copy(config.vision_config, config.text_config)
    for part, layer, std in (
        (model.model, model.model.multi_modal_projector.fc1, 0.5),
        (model.model, torch.nn.Embedding(320, 32), 0.3),
        (model, model.lm_head, 0.3),
    ):
        layer.weight.data.zero_()
        part._init_weights(layer)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("strategy", ["cls", "full"])
def test_interpolated_position_embeddings(strategy):
    model = tiny_model(strategy)
    vision, pixels = model.model.vision_tower, torch.randn(2, 3, 32, 32)
    plain = vision(pixels).last_hidden_state
    assert torch.equal(vision(pixels, interpolate_pos_encoding=True).last_hidden_state, plain)
    larger = torch.randn(2, 3, 64, 48)  # 4 x 3 patches
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        vision(larger)
    with pytest.raises(ValueError, match="at least 16 x 16 pixels"):
        vision(torch.randn(2, 3, 8, 64), interpolate_pos_encoding=True)
    assert vision(larger, interpolate_pos_encoding=True).last_hidden_state.shape == (2, 13, 32)
    positions = vision.embeddings.interpolate_pos_encoding(64, 64)
    assert torch.equal(positions[:, 0], vision.embeddings.position_embeddings[:, 0])
    features = model.get_image_features(larger, interpolate_pos_encoding=True).pooler_output
    ids = torch.full((2, features.shape[1] + 3), 5)
    ids[:, : features.shape[1]] = model.config.image_token_id
    outputs = forward(model, {"input_ids": ids, "pixel_values": larger}, interpolate_pos_encoding=True)
    torch.testing.assert_close(outputs.image_hidden_states, features)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    tokens = model.generate(input_ids=ids, pixel_values=larger, interpolate_pos_encoding=True, **settings)
    assert tokens.shape[1] == ids.shape[1] + 3
    assert torch.equal(tokens[:, ids.shape[1]], outputs.logits[:, -1].argmax(-1))


def test_attention_arguments_reach_every_implementation(model, inputs, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    received = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, *args, marker=None, **kwargs):
        received.append((module.is_causal, marker))
        return sdpa(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attention)
    model.get_image_features(inputs["pixel_values"], marker=1)
    forward(model, inputs, marker=2, pixel_values=None)
    assert received == [(False, 1)] * 2 + [(True, 2)] * 2


def test_the_decoder_may_be_on_another_device_than_the_ids(model):
    ids = torch.tensor([[model.config.image_token_id, 5]])
    embeddings = torch.empty(1, 2, 8, device="meta")
    mask = model.model.get_placeholder_mask(ids, embeddings, torch.empty(1, 1, 8))
    assert (mask.device, tuple(mask.shape)) == (embeddings.device, (1, 2, 1))


def test_a_device_map_does_not_split_embeddings_and_layers(model):
    names = set(model._no_split_modules)
    kept_whole = [path for path, module in model.named_modules() if type(module).__name__ in names]
    assert {type(module).__name__ for module in model.modules()} >= names
    for name, _ in model.named_parameters():
        if ".embeddings." in name or ".layers." in name:
            assert any(name.startswith(f"{path}.") for path in kept_whole), name


def test_cls_only_equals_the_full_output():
    vision = tiny_model().model.vision_tower
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    alone, full = vision(pixels, cls_only=True), vision(pixels)
    assert alone.last_hidden_state.shape == (2, 1, 32)
    assert full.last_hidden_state.shape == (2, 5, 32)
    torch.testing.assert_close(alone.pooler_output, full.pooler_output, atol=1e-6, rtol=1e-5)
    gradients = [
        torch.autograd.grad(output.pooler_output.sin().sum(), [pixels, *vision.layers[-1].parameters()])
        for output in (alone, full)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_sdpa_and_eager_agree(model, inputs):
    sdpa = forward(model, inputs).logits
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "eager"
    eager = forward(model, inputs).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(eager[seen], sdpa[seen], atol=1e-5, rtol=1e-5)


def test_padding_on_either_side_does_not_change_logits(model, processor, inputs):
    alone = processor(images=random_image(1), text="A", return_tensors="pt")
    want = forward(model, alone).logits[0, -1]
    left = forward(model, inputs).logits[1, -1]
    right_padded = processor(
        images=[random_image(seed) for seed in range(2)],
        text=["There is a big", "A"],
        padding_side="right",
        return_tensors="pt",
    )
    last = right_padded["attention_mask"][1].sum() - 1
    right = forward(model, right_padded).logits[1, last]
    torch.testing.assert_close(left, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right, want, atol=1e-5, rtol=1e-5)


def test_image_tokens_have_no_loss(model, processor):
    """Collators of language models set the labels of padding alone to -100."""
    batch = processor(images=random_image(0), text="There is a big", return_labels=True, return_tensors="pt")
    loss = model(**batch).loss
    batch["labels"] = batch["input_ids"].clone()
    torch.testing.assert_close(model(**batch).loss, loss)


def test_loss_is_the_mean_over_the_labels(model, processor):
    batch = processor(
        images=[random_image(0), random_image(1)], text=["There is a big", "A"], return_labels=True, return_tensors="pt"
    )
    outputs = forward(model, batch)
    targets = batch["labels"][:, 1:]
    want = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), targets, ignore_index=-100)
    torch.testing.assert_close(outputs.loss, want)
    total = forward(model, batch, num_items_in_batch=torch.tensor(2)).loss
    torch.testing.assert_close(total, want * (targets != -100).sum() / 2)


def test_logits_to_keep(model, inputs):
    logits = forward(model, inputs).logits
    torch.testing.assert_close(forward(model, inputs, logits_to_keep=2).logits, logits[:, -2:])
    kept = torch.tensor([0, 3])
    torch.testing.assert_close(forward(model, inputs, logits_to_keep=kept).logits, logits[:, kept])


def test_tuple_and_dict_outputs_are_the_same(model, inputs):
    outputs = forward(model, inputs, output_hidden_states=True)
    as_tuple = forward(model, inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], outputs.logits)


def test_inputs_embeds_equal_input_ids(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    want = forward(model, inputs).logits
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    torch.testing.assert_close(forward(model, rest, inputs_embeds=embeds).logits, want)
    with pytest.raises(ValueError, match="exactly one"):
        model(**inputs, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one"):
        model(pixel_values=inputs["pixel_values"])


def test_text_only(model, inputs):
    ids = inputs["input_ids"][:, -3:]
    assert forward(model, {"input_ids": ids}).logits.shape == (3, 3, 320)


@pytest.mark.parametrize("change", ["missing image", "additional token"])
def test_images_and_placeholders_must_match(model, inputs, change):
    ids, pixels = inputs["input_ids"].clone(), inputs["pixel_values"]
    if change == "missing image":
        pixels = pixels[:-1]
    else:
        ids[0, -1] = model.config.image_token_id
    with pytest.raises(ValueError, match="<image> tokens and the images give"):
        model(input_ids=ids, pixel_values=pixels, attention_mask=inputs["attention_mask"])


def test_images_of_another_size_are_refused(model, inputs):
    with pytest.raises(ValueError, match=r"\(batch, 3, 32, 32\)"):
        model(**{**inputs, "pixel_values": torch.zeros(3, 3, 48, 48)})


def test_get_image_features(model, inputs):
    for owner in (model, model.model):
        features = owner.get_image_features(inputs["pixel_values"])
        assert features.pooler_output.shape == (3, model.config.image_seq_length, 32)
    torch.testing.assert_close(features.pooler_output, forward(model, inputs).image_hidden_states)
    assert isinstance(model.get_image_features(inputs["pixel_values"], return_dict=False), tuple)


def test_a_position_past_the_table_is_refused(model):
    entries = model.config.text_config.max_position_embeddings
    full = torch.full((1, entries), 5)
    assert forward(model, {"input_ids": full}).logits.shape[1] == entries
    with pytest.raises(ValueError, match=f"reaches position {entries + 1}, this model has {entries}"):
        model(input_ids=torch.full((1, entries + 1), 5))


def test_padding_on_the_left_takes_no_positions(model):
    entries = model.config.text_config.max_position_embeddings
    ids = torch.full((1, entries + 5), 5)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    assert forward(model, {"input_ids": ids, "attention_mask": mask}).logits.shape[1] == entries + 5


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_with_safetensors(tmp_path, inputs, strategy, tied):
    model = tiny_model(strategy, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded, report = NanoVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    torch.testing.assert_close(forward(loaded, inputs).logits, forward(model, inputs).logits, atol=0, rtol=0)


@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
@pytest.mark.parametrize("part", ["whole", "base", "vision", "text"])
def test_old_weight_names_load_and_new_ones_are_saved(tmp_path, part, shard_size):
    whole = tiny_model()
    towers = {"vision": whole.model.vision_tower, "text": whole.model.language_model}
    model = {"whole": whole, "base": whole.model, **towers}[part]
    state = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    old = old_names(state)
    assert len(old) == len(state)
    assert sum("blocks" in name for name in old) == sum("layers" in name for name in state) > 0
    model.config.save_pretrained(tmp_path / "old")
    for number, (name, weight) in enumerate(old.items()):
        save_file({name: weight}, tmp_path / "old" / f"{number}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: f"{number}.safetensors" for number, name in enumerate(old)}}
    (tmp_path / "old" / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded, report = type(model).from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.save_pretrained(tmp_path / "new", max_shard_size=shard_size)
    saved = {}
    for file in (tmp_path / "new").glob("*.safetensors"):
        saved |= load_file(file)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)


def test_a_key_mapping_of_the_caller_replaces_the_renaming(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    state = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    weights = {name.replace("language_model", "decoder"): weight for name, weight in state.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = NanoVLMForConditionalGeneration.from_pretrained(
        tmp_path, key_mapping={"decoder": "language_model"}, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in state.items())


def test_base_model_loads_from_a_checkpoint_with_head(tmp_path, model, inputs):
    model.save_pretrained(tmp_path)
    base = NanoVLMModel.from_pretrained(tmp_path)
    want = forward(model, inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(forward(base, inputs).last_hidden_state, want)


def test_resize_token_embeddings(model, inputs):
    before = forward(model, inputs).logits
    model.resize_token_embeddings(330, mean_resizing=False)
    assert model.config.text_config.vocab_size == 330
    assert model.lm_head.weight is model.get_input_embeddings().weight
    after = forward(model, inputs).logits
    assert after.shape[-1] == 330
    torch.testing.assert_close(after[..., :320], before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, inputs, use_reentrant):
    model.train()
    labels = inputs["input_ids"]
    model(**inputs, labels=labels).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(**inputs, labels=labels).loss.backward()
    assert model.is_gradient_checkpointing
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], msg=name)


def test_every_parameter_receives_a_gradient(model, inputs):
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert idle == []


def test_dropout_in_every_part(strategy):
    config = tiny_config(strategy)
    config.vision_config.hidden_dropout = config.text_config.hidden_dropout = 0.1
    model = NanoVLMForConditionalGeneration(config).train()
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert set(rates.values()) == {0.1}
    assert {name.split(".")[1] for name in rates} == {"vision_tower", "multi_modal_projector", "language_model"}


def test_patch_dropout_applies_in_training_only():
    vision = tiny_model().model.vision_tower
    pixels = torch.randn(16, 3, 32, 32)
    whole = vision(pixels, output_hidden_states=True).hidden_states[0]
    vision.config.patch_dropout = 0.5
    assert torch.equal(vision(pixels, output_hidden_states=True).hidden_states[0], whole)
    vision.train()
    seen = vision(pixels, output_hidden_states=True).hidden_states[0]
    assert seen.shape == (16, 3, 32)
    assert torch.equal(seen[:, 0], whole[:, 0])
    same = torch.isclose(seen[:, 1:, None], whole[:, None, 1:], atol=1e-5).all(-1)  # images, patches kept, patches
    assert (same.sum(-1) == 1).all()
    kept = same.any(1)
    assert (kept.sum(-1) == 2).all()
    assert len({tuple(row) for row in kept.tolist()}) > 1
    vision.config.patch_dropout = 0.99
    assert vision(pixels).last_hidden_state.shape == (16, 2, 32)


def test_patch_dropout_with_every_patch_changes_no_gradient(monkeypatch):
    """The convolution of kept patches is another computation: it agrees with the usual one, for every weight."""
    vision = tiny_model().model.vision_tower.train()
    pixels, weights = torch.randn(2, 3, 32, 32), torch.randn(2, 5, 32)
    gradients = []
    for share in (0.0, 0.5):
        vision.config.patch_dropout = share
        monkeypatch.setattr(modeling_nanovlm, "_kept_patches", lambda batch, *_: torch.arange(4).expand(batch, 4))
        vision.zero_grad()
        (vision(pixels).last_hidden_state * weights).sum().backward()
        gradients.append([parameter.grad for parameter in vision.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_patch_dropout_does_not_bypass_an_adapter():
    peft = pytest.importorskip("peft")
    vision = tiny_model().model.vision_tower
    vision.config.patch_dropout = 0.5
    adapted = peft.get_peft_model(vision, peft.LoraConfig(r=2, target_modules=["conv2", "q_proj"])).train()
    assert adapted(torch.randn(2, 3, 32, 32)).last_hidden_state.shape == (2, 3, 32)
    adapted(torch.randn(2, 3, 32, 32)).last_hidden_state[:, 0, 0].sum().backward()
    trained = {name for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert any("conv2.lora_B" in name for name in trained)


def test_saving_takes_positional_arguments(tmp_path):
    tiny_model().save_pretrained(tmp_path, True)  # `is_main_process`
    assert (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("*.py"))


def test_bfloat16_stays_near_float32(tmp_path, model, inputs):
    model.save_pretrained(tmp_path)
    half = NanoVLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    logits = forward(half, inputs).logits
    assert logits.dtype == torch.bfloat16
    seen = inputs["attention_mask"].bool()
    want = forward(model, inputs).logits[seen]
    assert (logits[seen].float() - want).norm() / want.norm() < 0.05


def test_autocast(model, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_initial_weights():
    config = tiny_config()
    config.vision_config.hidden_size = 256
    config.vision_config.intermediate_size = 1024
    model = NanoVLMForConditionalGeneration(config)
    embedding = model.model.vision_tower.embeddings.patch_embeddings
    assert embedding.conv1.weight.std().item() == pytest.approx(768**-0.5, rel=0.1)
    assert embedding.conv2.weight.std().item() == pytest.approx((9 * 256) ** -0.5, rel=0.1)
    assert model.model.multi_modal_projector.fc1.weight.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.3, rel=0.1)
    config.vision_config.initializer_range = 0.02
    plain = NanoVLMForConditionalGeneration(config)
    assert plain.model.vision_tower.embeddings.patch_embeddings.conv2.weight.std().item() == pytest.approx(
        0.02, rel=0.1
    )
    assert plain.model.multi_modal_projector.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert plain.get_input_embeddings().weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.slow
def test_compiled_forward_is_one_graph(model, inputs):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(compiled, inputs).logits, forward(model, inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_with_inductor(inputs, strategy):
    if strategy != "cls":
        pytest.skip("one strategy is enough: the graph test covers the others")
    model = tiny_model(strategy)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(forward(compiled, inputs).logits, forward(model, inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_export(model, inputs):
    exported = torch.export.export(model, (), {**inputs, "use_cache": False, "return_dict": False}, strict=False)
    logits = exported.module()(**inputs, use_cache=False, return_dict=False)[0]
    torch.testing.assert_close(logits, forward(model, inputs).logits, atol=1e-5, rtol=1e-5)

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer

from nanovlm_hf.completion import complete, stream
from nanovlm_hf.errors import completion_line
from nanovlm_hf.generation_nanovlm import greedy_settings

from helpers.models import random_image

NEW = 10
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def test_a_batch_gives_the_same_tokens_as_single_inputs(model, processor, inputs):
    together = model.generate(**inputs, **GREEDY)
    texts = ["There is a big", "A", "There is a big red ball. It"]
    for row, text in enumerate(texts):
        alone = model.generate(**processor(images=random_image(row), text=text, return_tensors="pt"), **GREEDY)
        assert alone[0, -NEW:].tolist() == together[row, -NEW:].tolist()
    assert len({tuple(row) for row in together[:, -NEW:].tolist()}) > 1, "all completions of the fixture are equal"


@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_every_cache_gives_the_same_tokens(model, inputs, cache):
    assert torch.equal(model.generate(**inputs, **GREEDY, **cache), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_caches_made_by_the_caller(model, inputs, kind):
    text_config = model.config.get_text_config()
    cache = DynamicCache(config=text_config) if kind is DynamicCache else StaticCache(text_config, max_cache_len=64)
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), model.generate(**inputs, **GREEDY))


def test_step_by_step_with_cache_equals_one_forward(model, inputs):
    tokens = model.generate(**inputs, **GREEDY)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], dim=1)
    with torch.no_grad():
        whole = model(input_ids=tokens, pixel_values=inputs["pixel_values"], attention_mask=mask).logits
        start = inputs["input_ids"].shape[1]
        cache = model(**inputs, use_cache=True).past_key_values
        for position in range(start, tokens.shape[1]):
            step = model(
                input_ids=tokens[:, position : position + 1],
                attention_mask=mask[:, : position + 1],
                past_key_values=cache,
            )
            torch.testing.assert_close(step.logits[:, 0], whole[:, position], atol=1e-4, rtol=1e-4)


def test_generation_continues_from_a_cache(model, inputs):
    want = model.generate(**inputs, **GREEDY)
    half = {"max_new_tokens": NEW // 2, "min_new_tokens": NEW // 2, "do_sample": False}
    first = model.generate(**inputs, **half, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW // 2, dtype=torch.long)], dim=1)
    second = model.generate(
        input_ids=first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **half
    )
    assert torch.equal(second, want)


def test_sampling_depends_on_the_seed_alone(model, inputs):
    settings = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.5, "num_return_sequences": 4}
    torch.manual_seed(3)
    one = model.generate(**inputs, **settings)
    torch.manual_seed(3)
    same = model.generate(**inputs, **settings)
    assert one.shape[0] == 12
    assert torch.equal(one, same)
    assert len({tuple(row) for row in one[:4].tolist()}) > 1


def test_beams(model, processor, inputs):
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    outputs = model.generate(**inputs, **settings, output_scores=True, return_dict_in_generate=True)
    assert outputs.sequences.shape[0] == 6
    best = outputs.sequences_scores.view(3, 2)
    assert (best[:, 0] >= best[:, 1]).all()
    alone = model.generate(**processor(images=random_image(1), text="A", return_tensors="pt"), **settings)
    assert alone[0, -NEW:].tolist() == outputs.sequences[2, -NEW:].tolist()
    # The score of a beam is the likelihood of its tokens under the model.
    scores = model.compute_transition_scores(
        outputs.sequences, outputs.scores, outputs.beam_indices, normalize_logits=False
    )
    torch.testing.assert_close(scores.sum(1) / NEW, outputs.sequences_scores, atol=1e-4, rtol=1e-4)


def test_streamer(model, processor, tokenizer):
    inputs = processor(images=random_image(), text="There is a big", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    tokens = model.generate(**inputs, **GREEDY, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(tokens[0, -NEW:])


def test_inputs_embeds(model, inputs):
    want = model.generate(**inputs, **GREEDY)[:, -NEW:]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(model.generate(inputs_embeds=embeds, **rest, **GREEDY), want)
    # With image features in the embeddings, no pixels are needed.
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    mask = model.model.get_placeholder_mask(inputs["input_ids"], embeds, features)
    mixed = embeds.masked_scatter(mask, features)
    assert torch.equal(model.generate(inputs_embeds=mixed, attention_mask=inputs["attention_mask"], **GREEDY), want)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_output_attentions_does_not_change_tokens(model, inputs, settings):
    outputs = model.generate(
        **inputs, **GREEDY, **settings, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True
    )
    assert torch.equal(outputs.sequences, model.generate(**inputs, **GREEDY, **settings))
    for step in outputs.attentions:
        assert all(torch.allclose(weights.sum(-1), torch.ones(())) for weights in step)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attentions_and_hidden_states_of_every_step(model, inputs, implementation):
    model.set_attn_implementation(implementation)
    outputs = model.generate(
        **inputs, **GREEDY, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True
    )
    length = inputs["input_ids"].shape[1]
    assert len(outputs.hidden_states) == len(outputs.attentions) == NEW
    assert outputs.hidden_states[0][-1].shape == (3, length, 32)
    assert outputs.hidden_states[1][-1].shape == (3, 1, 32)
    assert outputs.attentions[1][0].shape == (3, 4, 1, length + 1)


def test_prompt_lookup_gives_the_greedy_tokens(model, processor):
    inputs = processor(images=random_image(), text="There is a big red ball. There is a big", return_tensors="pt")
    want = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3), want)


def test_the_image_is_encoded_once(model, inputs, monkeypatch):
    calls = []
    encode = model.model.vision_tower.forward
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *a, **k: calls.append(1) or encode(*a, **k))
    model.generate(**inputs, **GREEDY)
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_a_sequence_past_the_position_table_stops_with_an_error(model, inputs, settings):
    entries = model.config.text_config.max_position_embeddings
    room = entries - int(inputs["attention_mask"].sum(1).max())
    settings = settings | {"do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    fits = {"max_new_tokens": room, "min_new_tokens": room}
    assert model.generate(**inputs, **fits, **settings).shape[1] == inputs["input_ids"].shape[1] + room
    # The token at position `entries` is made but never read; one more would have to read it.
    too_long = {"max_new_tokens": room + 2, "min_new_tokens": room + 2}
    with pytest.raises(ValueError, match=f"this model has {entries}"):
        model.generate(**inputs, **too_long, **settings)


def test_generation_without_a_prefix(model, processor):
    inputs = processor(images=random_image(), return_tensors="pt")
    assert inputs["input_ids"].shape == (1, model.config.image_seq_length)
    assert model.generate(**inputs, **GREEDY).shape == (1, model.config.image_seq_length + NEW)


def test_generation_without_an_image(model, tokenizer):
    inputs = tokenizer(["There is a big", "A"], padding=True, return_tensors="pt")
    assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + NEW


def test_a_stream_of_a_checkpoint_with_beams_is_greedy_and_penalised(model, processor, tmp_path):
    model.generation_config.update(num_beams=3, no_repeat_ngram_size=2, length_penalty=0.9, early_stopping=True)
    greedy = greedy_settings(model.generation_config)
    assert (greedy["num_beams"], greedy["no_repeat_ngram_size"], greedy["repetition_penalty"]) == (1, 0, 1.2)
    image = random_image(1)
    inputs = processor(images=image, text="There is", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=20, **greedy)
    expected = completion_line(processor.batch_decode(tokens, skip_special_tokens=True)[0])
    image.save(tmp_path / "image.png")
    settings = {"prefix": "There is", "max_new_tokens": 20}
    (one,) = complete(model, processor, [tmp_path / "image.png"], num_beams=1, **settings)
    assert one.texts == [expected]
    *_, streamed = stream(model, processor, image, "There is")
    assert streamed[:20] == expected[:20]
    decoding = copy.deepcopy(model.generation_config)
    decoding.update(**greedy)
    decoding.save_pretrained(tmp_path)  # which refuses settings of beams without beams
    (beams,) = complete(model, processor, [tmp_path / "image.png"], **settings)
    tokens = model.generate(**inputs, max_new_tokens=20)
    assert beams.texts == [completion_line(processor.batch_decode(tokens, skip_special_tokens=True)[0])]


def test_a_streamer_replaces_beams_that_are_the_checkpoints_default(model, processor):
    model.generation_config.update(num_beams=3, no_repeat_ngram_size=2)
    inputs = processor(images=random_image(1), text="There is", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=NEW, **greedy_settings(model.generation_config))
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, streamer=streamer), expected)
    asked = GenerationConfig(num_beams=3, max_new_tokens=NEW)
    assert torch.equal(model.generate(**inputs, generation_config=asked, streamer=streamer), expected)
    asked = GenerationConfig(num_beams=1, repetition_penalty=5.0, max_new_tokens=NEW)
    own = model.generate(**inputs, generation_config=asked, num_beams=1)
    assert torch.equal(model.generate(None, asked, **inputs, streamer=streamer), own)
    with pytest.raises(ValueError, match="streamer"):
        model.generate(**inputs, max_new_tokens=NEW, streamer=streamer, num_beams=3)


def test_a_checkpoint_without_beams_keeps_its_decoding(model):
    assert greedy_settings(model.generation_config) == {}
    model.generation_config.update(num_beams=1, repetition_penalty=1.3)
    assert greedy_settings(model.generation_config) == {}

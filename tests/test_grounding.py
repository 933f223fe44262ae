"""Likelihood and its measures: mismatched images, retrieval, foils; and the objects that texts mention."""

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm_hf import NanoVLMForConditionalGeneration, NanoVLMProcessor
from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.evaluation import grounding
from nanovlm_hf.evaluation.foils import foils_of
from nanovlm_hf.evaluation.grounding import gap, hits, measure_grounding, retrieval
from nanovlm_hf.evaluation.likelihood import Likelihood
from nanovlm_hf.evaluation.object_hallucination import classes_of, object_precision_recall, objects_in

from helpers.models import random_image, tiny_model, tiny_processor

TEXTS = ["There is a big red ball. It looks so happy!", "Two brown birds sit together.", "There is a big blue kite."]


def test_likelihood_is_the_models_own_loss(tokenizer, strategy):
    model, processor = tiny_model(strategy), tiny_processor(tokenizer, strategy)
    likelihood = Likelihood(model, processor)
    images = [random_image(seed) for seed in range(3)]
    losses = likelihood.losses(likelihood.encode(images), likelihood.tokenize(TEXTS))
    for image, text, loss in zip(images, TEXTS, losses, strict=True):
        inputs = processor(images=image, text=text, return_labels=True, return_tensors="pt")
        with torch.no_grad():
            mean = model(**inputs).loss.item()
        assert loss == pytest.approx(mean * (inputs["labels"] != -100).sum().item(), rel=1e-5)


def test_batches_and_order_change_nothing(tokenizer):
    likelihood = Likelihood(tiny_model(), tiny_processor(tokenizer))
    features = likelihood.encode(random_image(seed) for seed in range(70))
    assert features.shape[:2] == (70, 1)
    ids = likelihood.tokenize([TEXTS[place % 3] for place in range(70)])
    together = likelihood.losses(features, ids)
    for place in (0, 31, 69):
        alone = likelihood.losses(features, [ids[place]], np.array([place]))
        assert together[place] == pytest.approx(alone[0], rel=1e-5)


def test_texts_are_cut_where_the_positions_end(tokenizer):
    likelihood = Likelihood(tiny_model(), tiny_processor(tokenizer))
    (ids,) = likelihood.tokenize(["There is a big red ball. " * 20])
    assert len(ids) == likelihood.longest == 47
    assert np.isfinite(likelihood.losses(likelihood.encode([random_image()]), [ids])).all()


def test_the_gap_and_its_error():
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, 30, 5000)
    right = 2.0 * tokens + rng.normal(0, 3, 5000)
    measured = gap(right, right + 0.1 * tokens + rng.normal(0, 2, 5000), tokens)
    assert measured["eval_loss"] == pytest.approx(2.0, abs=0.01)
    assert measured["grounding_gap"] == pytest.approx(0.1, abs=3 * measured["grounding_gap_stderr"])
    assert measured["grounding_gap_stderr"] == pytest.approx(2 / tokens.mean() / 5000**0.5, rel=0.05)


def test_the_gaps_error_is_that_of_a_ratio_over_photos():
    measured = gap(np.array([10.0, 20.0, 5.0]), np.array([12.0, 20.0, 6.0]), np.array([10, 10, 5]))
    assert measured["eval_loss"] == pytest.approx(35 / 25)
    assert measured["grounding_gap"] == pytest.approx(3 / 25)
    residuals = np.array([2 - 1.2, 0 - 1.2, 1 - 0.6])
    assert measured["grounding_gap_stderr"] == pytest.approx(np.sqrt((residuals**2).sum()) / 25)


def test_hits_among_the_best():
    scores = np.array([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [5.0, 4.0, 3.0]])
    assert hits(scores, 1).tolist() == [1, 0, 0]
    assert hits(scores, 2).tolist() == [1, 1, 0]
    assert hits(np.zeros((4, 4)), 1).tolist() == [0.25] * 4, "ties are right as often as chance"


@pytest.fixture(scope="module")
def shipped() -> Likelihood:
    folder = SHIPPED["mini-short"]
    model = NanoVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return Likelihood(model, NanoVLMProcessor.from_pretrained(folder))


@pytest.fixture
def scenes() -> tuple[list, list[str]]:
    """Images whose colour determines the text: grass, sea, snow and a sunset."""
    scenes = {
        (70, 140, 50): "A brown dog runs on the green grass. It has fun in the park.",
        (40, 110, 170): "A man is on a blue wave in the sea. The water is big and cold.",
        (235, 240, 245): "A man slides down a hill of white snow. It is very cold.",
        (150, 60, 20): "A girl sits by an orange fire at night. It is warm here.",
    }
    images, texts = [], []
    for place in range(16):
        colour = list(scenes)[place % 4]
        noise = np.random.default_rng(place).integers(-15, 16, (224, 224, 3))
        images.append(Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)))
        texts.append(scenes[colour])
    return images, texts


@pytest.mark.slow
def test_a_released_model_uses_the_image_and_one_without_features_does_not(shipped, scenes, monkeypatch):
    monkeypatch.setattr(grounding, "GROUPS", {8: 2})
    images, texts = scenes
    features = shipped.encode(images)
    seeing = measure_grounding(shipped, features, texts, [[] for _ in texts])
    tokens = sum(map(len, shipped.tokenize(texts)))
    words = sum(len(text.split()) for text in texts)
    assert seeing["nats_per_word"] == pytest.approx(seeing["eval_loss"] * tokens / words)
    assert seeing["photos"] == 16
    assert seeing["grounding_gap_low"] > 0.01
    assert seeing["retrieval"].keys() == {8}
    blind = measure_grounding(shipped, torch.zeros_like(features), texts, [[] for _ in texts])
    assert abs(blind["grounding_gap"]) < 1e-6
    assert blind["grounding_gap_low"] <= 0 <= blind["grounding_gap_high"] + 1e-9
    for kind in blind["foils"].values():
        if kind["accuracy"]["items"]:
            assert kind["accuracy"] == kind["wrong_photo"]
            assert kind["photo_helps"]["mean"] == 0.5


def test_a_zeroed_projector_ranks_by_chance(shipped):
    texts = [f"There is a big square, number {number}." for number in range(16)]
    features = torch.zeros(16, 1, shipped.model.config.text_config.hidden_size)
    found = retrieval(shipped, features, shipped.tokenize(texts), 16)
    assert found["r_at_1"]["mean"] == pytest.approx(1 / 16) == found["chance"]
    assert found["r_at_5"]["mean"] == pytest.approx(5 / 16)
    assert found["plain_r_at_1"]["mean"] == pytest.approx(1 / 16), "one text is the most likely for every image"


def test_foils_swap_one_word_that_is_not_true():
    texts = [
        "A red ball lies on an orange mat.",
        "Two dogs run on the grass.",
        "An elephant drinks water.",
        "It is fun.",
        "A ball is on the grass.",
    ]
    captions = [["a red ball and a blue mat"], ["two dogs"], ["an elephant"], [], []]
    foils = foils_of(texts, captions)
    assert foils == foils_of(texts, captions), "the same every time"
    assert set(foils["colour"]) == {0}
    colour = foils["colour"][0]
    assert not set(colour.lower().replace(".", "").split()) & {"red", "blue"}
    assert colour.endswith(" ball lies on an orange mat.")
    assert set(foils["count"]) == {1}
    assert foils["count"][1].split()[0] in ("Three", "Four", "Five", "three", "four", "five")
    assert 3 not in foils["object"]
    for place, foil in foils["object"].items():
        before, after = texts[place].rstrip(".").split(), foil.rstrip(".").split()
        changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
        assert 1 <= len(changed) <= 2
        assert all(word in ("A", "An", "a", "an") for pair in changed[:-1] for word in pair)
    assert foils_of(["There is a big ball."] * 2, [[], ["an elephant"]])["object"] == {}, "nothing else is common"


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("A big white boat is in the water.", ["boat", "water"]),
        ("The children run and play a game.", ["child"]),
        ("Two brown dogs ride with a frisbee.", ["dog", "frisbee"]),
        ("A birthday cake stands on the kitchen table.", ["cake", "table"]),
        ("It is fun to run in the morning!", []),
        ("I want to walk and swim with my friends.", ["friend"]),
        ("The red and white picture has a man in it.", ["man"]),
        ("", []),
    ],
)
def test_things_that_a_text_names(text, things):
    found = objects_in(text)
    assert [name for name, _ in found] == things
    for name, (start, end) in found:
        assert text[start:end].lower()[:2] == name[:2]


def test_things_that_people_saw():
    captions = [["a puppy on the grass", "a dog in a field", "a small dog"], [], ["a man", "a man", "a cat"]]
    measured = object_precision_recall(
        ["dog sits by a car.", "cat.", "boy walks."], ["There is a", "A", "A man and a"], captions
    )
    first, second, third = measured["rows"]
    assert first == {"named": ["car", "dog"], "unseen": ["car"], "missed": ["field", "grass"]}
    assert second == {"named": [], "unseen": [], "missed": []}
    assert third == {"named": ["boy"], "unseen": [], "missed": []}, "a boy is a person; the prefix named the man"
    assert measured["precision"]["mean"] == pytest.approx(0.75)
    assert measured["precision"]["items"] == 2
    assert measured["recall"]["items"] == 1
    assert "person" in classes_of("woman")

"""ROUGE-1, the nearest training text, copied words, coherence, and confidence intervals."""

import evaluate
import numpy as np
import pytest
from rouge_score import rouge_scorer

from nanovlm_hf.evaluation.coherence import coherence, ends, repeats
from nanovlm_hf.evaluation.intervals import bootstrap
from nanovlm_hf.evaluation.originality import TrainingTexts, distinct, originality, rouge1, rouge_tokens
from nanovlm_hf.evaluation.originality_metric import Originality

WORDS = "A a The the dog Dog dog's isn't 2 two, big. red! runs-and (jumps) Ünder grass \u2019s it's".split()


def random_texts(number: int, seed: int = 0, longest: int = 30) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, longest))) for _ in range(number)]


def test_rouge_equals_the_rouge_score_package():
    scorer = rouge_scorer.RougeScorer(["rouge1"])
    for prediction, reference in zip(random_texts(1000), random_texts(1000, seed=1), strict=True):
        assert rouge1(prediction, reference) == pytest.approx(scorer.score(reference, prediction)["rouge1"].fmeasure)


def test_the_nearest_text_has_the_highest_score():
    texts = random_texts(200)
    index = TrainingTexts(texts)
    for prediction in random_texts(100, seed=1):
        scores = [rouge1(prediction, text) for text in texts]
        nearest = index.nearest(prediction)
        assert nearest.score == pytest.approx(max(scores))
        assert scores[nearest.row] == pytest.approx(max(scores))


def length_of_longest_copy(text, texts):
    words = rouge_tokens(text)
    every = [rouge_tokens(one) for one in texts]
    for size in range(len(words), 0, -1):
        runs = {tuple(one[start : start + size]) for one in every for start in range(len(one) - size + 1)}
        for start in range(len(words) - size + 1):
            if tuple(words[start : start + size]) in runs:
                return size
    return 0


def test_the_longest_copy_comes_from_one_text():
    texts = random_texts(40)
    index = TrainingTexts(texts)
    for text in random_texts(60, seed=2):
        copied = index.longest_copy(text)
        assert len(copied) == length_of_longest_copy(text, texts)
        assert " ".join(copied) in " ".join(rouge_tokens(text))
    joined = TrainingTexts(["the red dog", "runs home now"])
    assert joined.longest_copy("a red dog runs home") == ["red", "dog"], "a run does not continue in the next text"
    assert TrainingTexts(["x"]).longest_copy("") == []


def test_distinct():
    assert distinct(["a b a", "b a"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "b a"], 2) == pytest.approx(2 / 3)
    assert distinct([""], 2) == 0.0


def test_originality_of_new_and_copied_words():
    training = ["There is a red kite in the sky.", "Two dogs sleep on a bed."]
    wholes = ["Two dogs sleep on a bed.", "Two green frogs swim."]
    measured = originality(["sleep on a bed.", "swim."], wholes, [training[1], None], TrainingTexts(training))
    copied, own = measured["rows"]
    assert copied["longest_copy"] == "sleep on a bed"
    assert copied["rouge1_nearest_whole"] == 1.0
    assert copied["nearest"] == 1
    assert own["rouge1_reference"] is None
    assert own["rouge1_nearest"] == 0.0
    assert measured["rouge1_reference"] == pytest.approx(copied["rouge1_reference"])
    assert measured["rouge1_nearest_share_below_half"] == 0.5


def test_the_metric_of_the_evaluate_library():
    metric = Originality()
    metric.add_batch(predictions=["sleep on a bed."], references=["Two dogs sleep on a bed."])
    measured = metric.compute(training_texts=["Two dogs sleep on a bed.", "A cat."])
    assert measured["rouge1_nearest"] == measured["rouge1_reference"] == pytest.approx(0.8)
    assert measured["longest_copy_words"] == 4
    assert isinstance(metric, evaluate.Metric)


def test_training_texts_are_required():
    with pytest.raises(ValueError, match="no training text"):
        TrainingTexts([])


def test_coherence():
    assert repeats("A black hat and a black hat.")
    assert not repeats("a black hat and a black coat")
    assert ends('He says "hello!" ')
    assert not ends("and then the")
    measured = coherence(["the dog runs.", "zzz", ""], vocabulary={"the", "dog", "runs"})
    assert measured == {
        "repetition_rate": 0.0,
        "end_rate": pytest.approx(1 / 3),
        "empty_rate": pytest.approx(1 / 3),
        "words": pytest.approx(4 / 3),
        "known_words": pytest.approx(3 / 4),
    }


def test_bootstrap_intervals():
    values = np.random.default_rng(0).normal(5, 2, 400)
    interval = bootstrap(values)
    assert interval["mean"] == pytest.approx(values.mean())
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert bootstrap([]) == {"mean": None, "low": None, "high": None, "items": 0}
    assert bootstrap([3.0]) == {"mean": 3.0, "low": 3.0, "high": 3.0, "items": 1}
    assert bootstrap([0.0, 1.0, 1.0, 0.0, 1.0]) == {"mean": 0.6, "low": 0.2, "high": 1.0, "items": 5}
    assert bootstrap(values) == bootstrap(values), "the seed is fixed"

"""Tasks for lmms-eval: their prompts and references, and that every file names functions that exist."""

import sys
from importlib.metadata import entry_points

import pytest
import yaml

from nanovlm_hf.lmms_eval import TASKS
from nanovlm_hf.lmms_eval.tasks import captions

from helpers.models import random_image

CAPTIONS = ["A dog runs on the beach.", "A brown dog at the sea.", "The dog is running."]


def row(field="answer", texts=CAPTIONS):
    return {"image": random_image(size=(8, 8)).convert("L"), field: texts}


def test_a_completion_is_scored_against_the_other_captions():
    assert captions.doc_to_text(row()) == "A dog runs"
    found = captions.process_results(row(), [" along the water. It is happy."])
    assert set(found) == {"CIDEr", "BLEU_4", "ROUGE_L"}
    assert found["CIDEr"] == {"prediction": "A dog runs along the water.", "references": CAPTIONS[1:]}


def test_a_caption_without_a_beginning_is_scored_against_all():
    assert captions.doc_to_no_text(row()) == ""
    found = captions.process_captioning_results(row(), ["There is a dog! It runs."])
    assert found["ROUGE_L"] == {"prediction": "There is a dog!", "references": CAPTIONS}


def test_words_that_are_given_do_not_end_the_sentence():
    texts = ["A St. Bernard sleeps on a mat.", "A big dog lies down."]
    found = captions.process_results(row(texts=texts), ["sits in the snow. It is cold."])
    assert found["CIDEr"]["prediction"] == "A St. Bernard sits in the snow."


def test_rows_of_each_dataset_are_read():
    for field in captions.CAPTION_FIELDS:
        assert captions.captions(row(field)) == CAPTIONS
        assert captions.doc_to_visual(row(field))[0].mode == "RGB"
    for texts in ([], CAPTIONS[:1], "a text"):
        with pytest.raises(ValueError, match="two or more captions"):
            captions.captions(row(texts=texts))


class Loader(yaml.SafeLoader):
    """Reads `!function module.name` as lmms-eval does."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def functions(value):
    if isinstance(value, dict):
        return [name for one in value.values() for name in functions(one)]
    if isinstance(value, list):
        return [name for one in value for name in functions(one)]
    return [value] if isinstance(value, str) and value.startswith("captions.") else []


def test_every_task_names_functions_that_exist():
    files = sorted(TASKS.glob("*.yaml"))
    assert len(files) == 6
    for path in [TASKS / "_completion_yaml", *files]:
        content = yaml.load(path.read_text(), Loader)
        for name in functions(content):
            assert callable(getattr(captions, name.removeprefix("captions."))), name
        if path.suffix:
            assert content["task"] == path.stem
            assert content["include"] == "_completion_yaml"
            begins = path.stem.endswith("_completion")
            assert ("process_results" in content) != begins


def test_the_model_is_registered_by_an_entry_point():
    (entry,) = (one for one in entry_points(group="lmms_eval.models") if one.name == "nanovlm_hf")
    assert entry.value == "nanovlm_hf.lmms_eval:manifest"
    assert "lmms_eval" not in sys.modules


def test_scores_are_those_of_pycocoevalcap():
    pytest.importorskip("pycocoevalcap")
    same = {"prediction": CAPTIONS[0], "references": CAPTIONS}
    other = {"prediction": "Two red cars.", "references": ["A train in a station.", "The long train stops."]}
    assert captions.bleu_4([same]) == pytest.approx(1, abs=1e-6)
    assert captions.rouge_l([same, other]) == pytest.approx(0.5, abs=1e-6)
    assert captions.cider([same, other]) > captions.cider([other, other]) == 0

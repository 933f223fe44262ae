"""Beam search in NumPy, and with an exported model, returns what `generate` of Transformers returns."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from nanovlm_hf import completion
from nanovlm_hf.export.beam_search import BeamSearch
from nanovlm_hf.export.runtime import OnnxModel, complete_files
from nanovlm_hf.loading import load_model

from helpers.models import random_image, tiny_model

PROMPT = [7, 8, 9]
PREFIXES = ("", "There is a big red")


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 2.0, -1.0])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_the_sequence_is_that_of_generate(num_beams, length_penalty, early_stopping):
    model = tiny_model().requires_grad_(False)
    ends = list(range(10, 20))  # so many that some sequences end
    search = BeamSearch(num_beams, length_penalty, early_stopping)
    for first in (20, 21, 22):
        prompt = [*PROMPT, first]
        beams = [prompt]

        def advance(origins, last):
            nonlocal beams
            beams = [[*beams[origin], token] for origin, token in zip(origins, last, strict=True)]
            return model(torch.tensor(beams)).logits[:, -1].numpy()

        logits = model(torch.tensor([prompt])).logits[:, -1].numpy()
        found = search.search(logits, advance, lambda scores, _: scores, ends, limit=12)
        expected = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=12,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            eos_token_id=ends,
        )
        assert found == expected[0, len(prompt) :].tolist()


def photos(folder):
    """Write images of shapes and of noise, and return their paths."""
    images = [random_image(1, (300, 200))]
    for sky, ground, thing in (("skyblue", "green", "brown"), ("white", "gray", "red"), ("black", "navy", "yellow")):
        image = Image.new("RGB", (320, 240), sky)
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 150, 320, 240), fill=ground)
        draw.ellipse((100, 80, 200, 180), fill=thing)
        images.append(image)
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini-short", "mini-long"])
def test_an_exported_checkpoint_writes_the_texts_of_pytorch(name, tmp_path):
    pytest.importorskip("onnx")
    from nanovlm_hf.export.onnx import write_onnx

    write_onnx(name, tmp_path / "onnx", "fp16")
    exported, (model, processor) = OnnxModel(tmp_path / "onnx"), load_model(name)
    paths = photos(tmp_path)
    for num_beams in (None, 1, 2):
        chosen = {} if num_beams is None else {"num_beams": num_beams}
        for prefix in PREFIXES:
            expected = completion.complete(model, processor, paths, prefix, **chosen)
            found = complete_files(exported, paths, prefix, num_beams=num_beams)
            assert [one.texts for one in found] == [one.texts for one in expected], (num_beams, prefix)


def test_a_score_that_is_not_finite_does_not_win():
    def exclude(scores, tokens):
        scores[3] = -np.inf
        return scores

    logits = np.zeros((1, 4), np.float32)
    logits[0, 3] = 5
    found = BeamSearch(2).search(logits, lambda origins, last: logits.repeat(len(last), axis=0), exclude, {0}, limit=2)
    assert 3 not in found

"""The parts of training: configs, texts, batches, augmentation, losses, the folder of a run."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from nanovlm_hf import InputError, NanoVLMConfig, NanoVLMForConditionalGeneration, NanoVLMImageProcessor, devices
from nanovlm_hf.data import image_store
from nanovlm_hf.evaluation.grounding import measure_grounding
from nanovlm_hf.evaluation.likelihood import Likelihood
from nanovlm_hf.training import augmentation, data, initial_model, loop, metrics, provenance, samples, step
from nanovlm_hf.training.arguments import read_arguments
from nanovlm_hf.training.batches import TrainingBatches
from nanovlm_hf.training.export import export
from nanovlm_hf.training.gpu_specs import gpu_of
from nanovlm_hf.training.loss import CompletionObjective
from nanovlm_hf.training.run_directory import RunDirectory
from nanovlm_hf.training.texts import TokenizedTexts

from helpers.image_files import png_header
from helpers.models import random_image, tiny_model, tiny_processor
from helpers.runs import CONFIG, ROOT, tiny_options
from helpers.toy_data import COLOURS, jpeg_of, square

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize(
    ("device", "watts"),
    [
        ("NVIDIA L4", 72),
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA GeForce RTX 4090", 450),
        ("NVIDIA L40S", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(device, watts):
    assert getattr(gpu_of(device), "watts", None) == watts


def test_code_outside_a_clone_has_no_commit(tmp_path, monkeypatch):
    """An environment may lie in the folder of another repository, or on a machine without git."""
    environment = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a",
    }
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another project"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, env=os.environ | environment)
    file = tmp_path / "provenance.py"
    file.touch()
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert provenance._git_commit() is None
    subprocess.run(["git", "-C", tmp_path, "add", "provenance.py"], check=True)
    assert re.fullmatch(r"[0-9a-f]{12}\+", provenance._git_commit())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance._git_commit() is None


def test_a_run_without_a_best_model_is_not_exported(tmp_path):
    with pytest.raises(InputError, match="there is no best/ in this run"):
        export(tmp_path, tmp_path / "out", "mini-short")


def test_the_page_of_samples_escapes_texts(tmp_path):
    run = RunDirectory(tmp_path / "a <b>")
    sample = {"image_id": 7, "prefix": "A <i>", "text": "A <i> & {{ 1 }}", "reference": "<script>"}
    run.add_samples([{"step": number} | sample | {"image_id": image_id} for number in (1, 2) for image_id in (7, 8)])
    split = data.Split(np.zeros((1, 32, 32, 3), dtype=np.uint8), None, [7])
    samples.write_page(run, split)
    page = (run.path / "samples.html").read_text()
    assert (page.count("<img "), page.count("step ")) == (1, 2), "image 8 is not in the split"
    assert "<b>A &lt;i&gt;</b> &amp; {{ 1 }}" in page
    assert "<title>a &lt;b&gt;: completions" in page
    assert "<script" not in page


def test_a_warm_up_that_outlasts_the_run_is_reported(train, tmp_path, toy):
    options = (*tiny_options(toy, tmp_path / "run"), "--optimizer", "adamw", "--max_steps", 2)
    code, errors = train(*options, "--warmup_steps", 2)
    assert code == 0
    assert "warmup_steps: the warm-up of 2 steps does not end within the 2 steps of the run" in errors
    code, errors = train(*options, "--warmup_steps", 1, "--overwrite", "true")
    assert code == 0
    assert "warmup_steps" not in errors


def test_a_kill_between_two_renames_loses_no_model(tmp_path):
    for name in ("last.previous", "best.previous", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "whose").write_text(name)
    RunDirectory(tmp_path, exist_ok=True)
    assert (tmp_path / "last" / "whose").read_text() == "last.previous"
    assert (tmp_path / "best" / "whose").read_text() == "best"


def test_lines_cut_short_and_lines_after_the_state_are_dropped(tmp_path):
    folder = RunDirectory(tmp_path)
    for number in (1, 2, 3):
        folder.log({"step": number})
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 4, "train')
    assert [row["step"] for row in folder.rows()] == [1, 2, 3]
    folder.truncate_metrics(2)
    assert folder.metrics_path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_command_line_wins_over_the_file():
    arguments = read_arguments(["--config", str(CONFIG), "--learning_rate", "0.5", "--texts", "short", "captions"])
    assert arguments.learning_rate == 0.5
    assert arguments.texts == ["short", "captions"]
    assert arguments.text_weights == [1.0, 1.0]
    assert (arguments.preset, arguments.dropout) == ("mini", 0.1)


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid(path):
    assert read_arguments(["--config", str(path)]).output_dir == f"runs/{path.stem}"


def test_the_plain_config_has_nothing_beyond_the_paper():
    arguments, config = config_of("mini_short_plain")
    assert (arguments.learning_rate, arguments.dropout, arguments.optimizer) == (1e-3, 0.1, "adamw")  # section 2.3
    assert (arguments.augment, arguments.visual_words_weight, arguments.ema_decay) == (False, 0, 0)
    assert config.parameter_counts() == NanoVLMConfig.from_preset("mini").parameter_counts()


def config_of(name: str) -> tuple:
    arguments = read_arguments(["--config", str(ROOT / "training" / "configs" / f"{name}.yaml")])
    return arguments, initial_model.model_config(arguments, vocab_size=5120)


@pytest.mark.parametrize("preset", ["mini", "base", "large"])
@pytest.mark.parametrize("variant", ["short", "long"])
def test_the_papers_six_runs(preset, variant):
    arguments, config = config_of(f"{preset}_{variant}")
    assert (arguments.preset, arguments.variant) == (preset, variant)
    assert config.parameter_counts() == NanoVLMConfig.from_preset(preset).parameter_counts()
    assert config.image_seq_length == 1


@pytest.fixture
def texts(tokenizer):
    rows = [
        {
            "description": f"There is a big {colour} ball.",
            "captions": [f"a {colour} happy", "happy to the left of a soft"],
        }
        for colour in COLOURS
    ]
    rows[1]["captions"] = ["a soft"]
    captions = [row["captions"] for row in rows]
    sources = {"short": [[row["description"]] for row in rows], "captions": captions}
    return TokenizedTexts(sources, captions, tiny_processor(tokenizer))


def learned_of(batch, tokenizer) -> list[str]:
    text_of_label = batch["positions"] // batch["input_ids"].shape[1]
    return [tokenizer.decode(batch["targets"][text_of_label == text]) for text in range(len(batch["input_ids"]))]


def test_a_batch_of_texts(texts, tokenizer):
    batch = texts.pad("short", [2, 0])
    assert batch["image_of_text"].tolist() == [0, 1]
    assert (batch["input_ids"][:, 0] == 3).all()
    width = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"].flatten()[batch["positions"] + 1], batch["targets"]), (
        "each label is the next token"
    )
    learned = learned_of(batch, tokenizer)
    assert learned[0] == "There is a big blue ball.<eos>"
    assert batch["positions"][0] == 0, "the picture predicts the first word"
    assert (batch["positions"] // width).unique().tolist() == [0, 1]
    captions = texts.pad("captions", [2, 1, 0], choices=[1, -1, 2])
    assert learned_of(captions, tokenizer) == ["happy to the left of a soft<eos>", "a red happy<eos>"]
    assert captions["image_of_text"].tolist() == [0, 2], "a choice of -1 leaves a photo out"
    assert texts.lengths().tolist() == [len(photo[0]) for photo in texts.ids["short"]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        (None, "is empty"),
        (7, "is not a string"),
        ("A dog<eos>", "holds the special token <eos>"),
        ("<image> A dog", "holds the special token <image>"),
        ("A <pad> dog", "holds the special token <pad>"),
        ("<bos>A dog", "holds the special token <bos>"),
    ],
)
@pytest.mark.parametrize("source", ["short", "long"])
def test_a_text_that_cannot_be_learned_is_refused_with_its_photo(tokenizer, text, problem, source):
    texts = {"short": [["A dog."], ["A cat."]], "long": [["A big dog."], ["A big cat."]]}
    texts[source][1] = [text]
    with pytest.raises(InputError, match=rf"the text of image_id 8 \({source}\) {problem}: correct it or leave it out"):
        TokenizedTexts(texts, [["a dog"], ["a cat"]], tiny_processor(tokenizer), [7, 8])


def test_empty_captions_are_passed_over(tokenizer):
    captions = [None, [], ["", None, "a happy", "  "]]
    descriptions = [["A ball."], ["A kite."], ["A dog."]]
    texts = TokenizedTexts({"short": descriptions, "captions": captions}, captions, tiny_processor(tokenizer))
    assert [len(photo) for photo in texts.ids["captions"]] == [0, 0, 1]
    named = [[tokenizer.decode([token]) for token in words.tolist()] for words, _ in texts.words]
    assert named[2] == [" happy"]
    with pytest.raises(InputError, match="captions does not hold lists of texts"):
        TokenizedTexts({"short": [["A ball."]]}, ["a ball"], tiny_processor(tokenizer))


def test_a_text_that_is_too_long_is_cut_as_evaluate_cuts_it(tokenizer, capsys):
    long = " ".join(["dog"] * 400)
    processor = tiny_processor(tokenizer)
    texts = TokenizedTexts({"short": [["A dog."], [long]]}, [["a dog"], ["a cat"]], processor, [7, 8])
    model = NanoVLMForConditionalGeneration(NanoVLMConfig(text_config={"vocab_size": 320}))
    (evaluated,) = Likelihood(model, processor).tokenize([long])
    assert texts.ids["short"][1][0].tolist() == evaluated
    assert len(evaluated) == 255
    texts.report_truncated()
    assert (
        "texts longer than 255 tokens are truncated; number of images: short: 1 (image_id 8)" in capsys.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["cls", "full"])
def test_a_run_with_long_texts_trains_to_its_end(train, tmp_path, toy, strategy):
    from datasets import DatasetDict, load_dataset

    def lengthen(row):
        return {"description": " ".join(["a red square"] * 150)} if row["image_id"] % 40 == 0 else {}

    data = load_dataset(str(toy / "data"), "short")
    few = DatasetDict({name: data[name].select(range(10)).map(lengthen) for name in ("train", "validation")})
    for name, split in few.items():
        split.to_parquet(tmp_path / "data" / "short" / f"{name}.parquet")
    (tmp_path / "data" / "README.md").write_text("---\nconfigs:\n- config_name: short\n  data_dir: short\n---\n")
    options = (*tiny_options(toy, tmp_path / "run"), "--max_steps", 2, "--vision_feature_select_strategy", strategy)
    code, errors = train(*options, "--dataset", tmp_path / "data")
    assert code == 0, errors


def test_visual_words_are_the_captions_content_words(texts, tokenizer):
    targets = texts.word_targets([0, 1], 320)
    named = {tokenizer.decode([token]): targets[0, token].item() for token in targets[0].nonzero()[:, 0]}
    assert named == pytest.approx({" red": 0.25, " happy": 0.5, " soft": 0.25})
    assert targets.sum(1).tolist() == pytest.approx([1, 1])
    assert texts.mentions_side.tolist() == [True, False, True, True]


def training_batches(texts, **kwargs) -> TrainingBatches:
    photos = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    settings = {"batch_size": 2, "steps": 8, "augment": True, "seed": 5, "vocab_size": 320, **kwargs}
    return TrainingBatches(photos, texts, list(range(4)), **settings)


def ready(batch, image_size=32):
    """A batch as the objective takes it."""
    image_processor = NanoVLMImageProcessor(size={"height": image_size, "width": image_size})
    return step.to_device(batch, image_processor, torch.device("cpu"))


def inputs_of(batch):
    return {name: batch[name] for name in ("pixel_values", "texts", "word_targets", "teacher_features")}


def test_an_image_whose_drawn_sources_have_no_text_has_one_of_the_first(tokenizer):
    sources = {"short": [["A dog."]] * 4, "captions": [["a dog"], [], [], ["a cat"]]}
    texts = TokenizedTexts(sources, [["a dog"]] * 4, tiny_processor(tokenizer))
    batches = training_batches(texts, weights=[0.0, 1.0])
    for number in range(8):
        batch = batches[number]
        images = [image for text in batch["texts"] for image in text["image_of_text"].tolist()]
        assert sorted(images) == [0, 1], "each image has a text"
    assert not training_batches(texts, weights=[0.0, 0.0])[0]["texts"]


def test_a_batch_depends_on_its_number_alone(texts):
    one, again = training_batches(texts), training_batches(texts)
    for _ in range(3):
        one[0]
    first, second, other = ready(one[3]), ready(again[3]), ready(one[5])
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_how_a_step_is_split_changes_nothing_of_it(texts):
    """One process with four pieces, two with two, four with one: the same photos, texts and views."""
    seen = []
    for processes, pieces in ((1, 4), (2, 2), (4, 1)):
        parts = [
            training_batches(texts, batch_size=1, micro_batches=pieces, process_index=index, num_processes=processes)
            for index in range(processes)
        ]
        step = [part[pieces * 3 + piece] for part in parts for piece in range(pieces)]
        views = {batch["image_ids"][0]: ready(batch) for batch in step}
        assert set(views) == {0, 1, 2, 3}
        seen.append(views)
    for other in seen[1:]:
        for row, view in seen[0].items():
            torch.testing.assert_close(view, other[row], atol=0, rtol=0)


def test_every_epoch_takes_every_photo_once_over_all_processes(texts):
    for epoch in range(2):
        taken = []
        for process in range(2):
            part = training_batches(texts, batch_size=1, process_index=process, num_processes=2)
            taken += [row for number in (2 * epoch, 2 * epoch + 1) for row in part.rows(number)]
        assert sorted(taken) == [0, 1, 2, 3]


def test_texts_of_like_length_come_together(tokenizer):
    rng = np.random.default_rng(0)
    descriptions = [[" ".join(["dog"] * size)] for size in rng.integers(5, 40, 640)]
    texts = TokenizedTexts({"short": descriptions}, descriptions, tiny_processor(tokenizer))
    photos = np.zeros((640, 32, 32, 3), dtype=np.uint8)
    grouped = TrainingBatches(photos, texts, list(range(640)), vocab_size=320, batch_size=16, steps=40)
    lengths = texts.lengths()
    padded = sum(lengths[grouped.rows(number)].max() * 16 for number in range(40))
    assert padded < 1.06 * lengths.sum()
    assert sorted(row for number in range(40) for row in grouped.rows(number)) == list(range(640))
    means = [lengths[grouped.rows(number)].mean() for number in range(40)]
    assert np.corrcoef(means, range(40))[0, 1] ** 2 < 0.2, "not from short to long"


def test_sources_come_by_their_weight(texts):
    always = training_batches(texts, weights=[1.0, 1.0])
    assert all(len(always[number]["texts"]) == 2 for number in range(4))
    seldom = training_batches(texts, weights=[1.0, 0.25], steps=200)
    captions = sum(len(text["input_ids"]) for number in range(200) for text in seldom[number]["texts"][1:])
    assert captions == pytest.approx(0.25 * 2 * 200, rel=0.35)
    never = training_batches(texts, weights=[0.0, 0.0])
    assert all(len(never[number]["texts"]) == 0 for number in range(4)), "weights of 0 leave the encoder alone"
    rarely = training_batches(texts, weights=[0.0, 1e-9])
    assert all(len(rarely[number]["texts"]) == 1 for number in range(4)), "an image never comes without a text"


def test_pixels_are_those_of_the_image_processor(texts):
    plain = training_batches(texts, augment=False)
    rows = plain.rows(0)
    image_processor = NanoVLMImageProcessor(size={"height": 32, "width": 32})
    want = image_processor([Image.fromarray(plain.images[row]) for row in rows], return_tensors="pt")
    torch.testing.assert_close(ready(plain[0])["pixel_values"], want["pixel_values"], atol=1e-5, rtol=0)


def looks(has_side, count=40):
    own = [np.random.default_rng(number) for number in range(count)]
    return augmentation.AugmentationParameters.sample(np.random.default_rng(1), own, np.full(count, has_side), 224)


def test_augmented_photos_mirror_only_where_they_may():
    photos = np.zeros((40, 224, 224, 3), dtype=np.uint8)
    photos[:, :, 112:] = 200
    for has_side in (True, False):
        look = looks(has_side)
        crops = augmentation.crop(photos, list(range(40)), look)
        assert crops.shape == (40, 3, *look.size)
        assert 0.55 < look.size[0] * look.size[1] / 224**2 <= 1.0
        brighter_left = crops[..., :5].float().mean((1, 2, 3)) > crops[..., -5:].float().mean((1, 2, 3))
        assert brighter_left.any() == (not has_side)
        assert not brighter_left.all()


def test_augmented_colours_stay_near_their_own():
    look = looks(has_side=False)
    assert np.abs(look.gain - 1).max() < 0.45
    grey = look.gain * 0.5 + look.bias  # a middle grey stays one, lighter or darker
    assert np.abs(grey - 0.5).max() < 0.15
    assert len(np.unique(look.gain.round(4))) > 100, "each photo has its own light"
    assert np.ptp(look.gain, axis=1).max() > 0.02, "and its own tint"


def test_the_objective_is_the_models_own_loss(tokenizer):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    batch = processor(
        images=[random_image(0), random_image(1)],
        text=["There is a big dog.", "A kite"],
        return_labels=True,
        return_tensors="pt",
    )
    targets = torch.zeros(2, 320)
    targets[0, 40] = 1
    labels = batch["labels"]
    whole = {"input_ids": batch["input_ids"], "image_of_text": torch.arange(2)}
    whole |= {"targets": labels[labels != -100], "positions": (labels != -100).flatten().nonzero()[:, 0] - 1}
    width, first = labels.shape[1], int((labels[0] != -100).sum())
    apart = [
        {
            "input_ids": whole["input_ids"][place : place + 1],
            "image_of_text": torch.tensor([place]),
            "targets": whole["targets"][part],
            "positions": whole["positions"][part] - place * width,
        }
        for place, part in enumerate((slice(None, first), slice(first, None)))
    ]
    count = (labels != -100).sum()
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    image_token = torch.nn.functional.layer_norm(features[:1, 0], (32,))
    logits = image_token @ model.get_input_embeddings().weight.T
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([40]))
    for split in ([whole], apart):
        text_loss, words_loss, _ = CompletionObjective(model)(batch["pixel_values"], split, targets)
        torch.testing.assert_close(text_loss / count, model(**batch).loss)
        torch.testing.assert_close(words_loss, wanted)


def test_accumulation_weighs_tokens_not_pieces(texts):
    """Pieces of unequal length give the gradients of one large batch."""
    accelerator = Accelerator(cpu=True)
    whole = [ready(training_batches(texts, batch_size=4)[0])]
    in_pieces = training_batches(texts, batch_size=1, micro_batches=4)
    pieces = [ready(in_pieces[number]) for number in range(4)]
    results = []
    for split in (whole, pieces):
        objective = CompletionObjective(tiny_model())
        result = step.accumulate_gradients(accelerator, objective, split, step.LossWeights(words=0.5))
        results.append((result.loss, result.tokens, [parameter.grad for parameter in objective.parameters()]))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, other in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_gap_is_zero_for_a_model_that_ignores_the_image(texts, tokenizer):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    split = data.Split(images, texts, list(range(4)))
    processor = tiny_processor(tokenizer)
    blind = tiny_model()
    torch.nn.init.zeros_(blind.model.multi_modal_projector.fc2.weight)
    assert metrics.validation_losses(blind, processor, split)["grounding_gap"] == pytest.approx(0, abs=1e-6)
    model = tiny_model()
    measured = metrics.validation_losses(model, processor, split)
    assert abs(measured["grounding_gap"]) > 1e-3
    pixel_values = augmentation.normalise(torch.from_numpy(images), processor.image_processor)
    with torch.no_grad():
        loss, _, _ = CompletionObjective(model)(pixel_values, [texts.pad("short", [0, 1, 2, 3])], torch.zeros(4, 320))
    assert measured["eval_loss"] == pytest.approx(loss.item() / texts.lengths().sum(), rel=1e-5)
    likelihood = Likelihood(model, processor)
    features = likelihood.encode(Image.fromarray(image) for image in images)
    described = [texts.tokenizer.decode(ids[0][:-1]) for ids in texts.ids["short"]]
    evaluated = measure_grounding(likelihood, features, described, [[] for _ in described])
    for name, value in measured.items():
        assert value == pytest.approx(evaluated[name], rel=1e-4, abs=1e-6), "training and `nanovlm evaluate` agree"


def test_train_samples_are_the_lowest_hashes(tmp_path, toy):
    from datasets import load_dataset

    rows = load_dataset(str(toy / "data"), "short", split="train")
    few, more = (set(data._lowest_hashes(rows, count)["image_id"]) for count in (10, 30))
    assert len(few) == 10
    assert few < more
    with pytest.raises(InputError, match="train_samples: 1000 images"):
        data._lowest_hashes(rows, 1000)


def test_photos_that_do_not_decode(tmp_path, toy, monkeypatch):
    from datasets import Dataset, Features, Value
    from datasets import Image as HubImage

    def rows(bad):
        # One is no picture, one claims more pixels than are ever decoded.
        damaged = {7: b"nothing", 9: png_header(60_000, 60_000)}
        contents = [damaged[number] if number in bad else jpeg_of(number) for number in range(150)]
        features = Features({"image": HubImage(), "image_id": Value("int64")})
        return Dataset.from_dict(
            {"image": [{"bytes": one, "path": None} for one in contents], "image_id": list(range(150))},
            features=features,
        )

    image_processor = NanoVLMImageProcessor()
    photos, kept = image_store.decode_once(rows({7}), image_processor)
    assert len(photos) == len(kept) == 149
    assert kept["image_id"][:9] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert np.abs(photos[7].astype(int) - np.asarray(square(8)[0])).mean() < 3, "rows and photos stay together"
    with pytest.raises(InputError, match=r"2 of 150 images cannot be decoded \(image_id 7, 9\)"):
        image_store.decode_once(rows({7, 9}), image_processor)


@pytest.mark.slow
def test_freed_memory_is_kept():
    """Steps take new pages from the system only where nobody asked to keep the old ones; each in its own process."""
    script = """
import resource, sys
import torch
from nanovlm_hf.training.cpu import keep_freed_memory
assert sys.argv[1] == "before" or keep_freed_memory()
layer = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
inputs = torch.randn(4096, 512)
for step in range(8):
    if step == 3:
        warm = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layer(inputs).square().mean().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - warm)
"""

    def new_pages(when):
        command = [sys.executable, "-c", script, when]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert new_pages("after") < new_pages("before") / 2


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", ["bf16", "no", "auto"])
def test_attention_is_written_out_in_bf16_on_a_cpu(tmp_path, toy, monkeypatch, mixed_precision):
    fused = torch.nn.functional.scaled_dot_product_attention
    calls = []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    options = (*tiny_options(toy, tmp_path / "run"), "--mixed_precision", mixed_precision, "--max_steps", 1)
    loop.train(read_arguments(list(map(str, options))))
    in_bf16 = mixed_precision == "bf16" or (mixed_precision == "auto" and devices.cpu_has_bf16())
    assert bool(calls) != in_bf16
    config = NanoVLMConfig.from_pretrained(tmp_path / "run" / "last")
    assert "attn_implementation" not in config.to_json_string(), (
        "a saved model chooses its attention where it is loaded"
    )

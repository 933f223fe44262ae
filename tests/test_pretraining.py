"""Pretraining of both halves: distillation, texts without images, and the linear probe."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ResNetConfig, ResNetModel, set_seed

from nanovlm_hf import SHIPPED, InputError, NanoVLMForConditionalGeneration, cli
from nanovlm_hf.data.image_store import decode_once
from nanovlm_hf.data.rows import load
from nanovlm_hf.evaluation.probe import linear_probe, probe_data
from nanovlm_hf.image_processing_nanovlm import NanoVLMImageProcessor
from nanovlm_hf.training import distillation, loop
from nanovlm_hf.training.arguments import read_arguments
from nanovlm_hf.training.batches import TrainingBatches
from nanovlm_hf.training.initial_model import model_and_processor, tokenizer_in
from nanovlm_hf.training.loss import CompletionObjective
from nanovlm_hf.training.text_files import TextFile
from nanovlm_hf.training.texts import TokenizedTexts
from nanovlm_hf.vision_encoders import load_vision_encoder

from helpers.models import tiny_model, tiny_processor
from helpers.runs import ROOT, metrics, tiny_options


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A convolutional network with random weights, whose features tell colours apart."""
    folder = tmp_path_factory.mktemp("teacher") / "resnet"
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    size = {"shortest_edge": 64}
    CLIPImageProcessor(size=size, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def stories(tmp_path) -> str:
    path = tmp_path / "stories.jsonl"
    lines = [{"text": "There is a big red ball."}, {"captions": ["a red ball", "a blue ball"], "source": "x"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(path)


def run(toy, out, *options):
    """Train a tiny model in this process, evaluated once at the end; return its fields and folder."""
    steps = ("--max_steps", 4, "--warmup_steps", 1, "--logging_steps", 1)
    arguments = read_arguments(list(map(str, (*tiny_options(toy, out), *steps, *options))))
    return arguments, loop.train(arguments).path


def trained_parts(arguments, folder) -> set[str]:
    """Return the parts of the model that a run has changed from their initial weights."""
    set_seed(arguments.seed)
    first, _ = model_and_processor(arguments)
    last = NanoVLMForConditionalGeneration.from_pretrained(folder / "last")
    pairs = zip(first.named_parameters(), last.named_parameters(), strict=True)
    return {name.split(".")[1] for (name, one), (_, other) in pairs if not torch.equal(one, other)}


@pytest.mark.slow
def test_a_teacher_trains_the_encoder_alone_and_the_run_resumes(toy, tmp_path, teacher):
    options = ("--teacher", teacher, "--text_weights", 0, "--learning_rate", 1e-2, "--augment", "true")
    options += ("--max_steps", 30, "--save_steps", 15, "--save_total_limit", 9)
    arguments, folder = run(toy, tmp_path / "run", *options)
    rows = [row for row in metrics(folder) if "train_loss" in row]
    assert rows[0]["distillation_loss"] == rows[0]["train_loss"]
    assert rows[-1]["distillation_loss"] < 0.8 * rows[0]["distillation_loss"]
    assert rows[-1]["tokens_per_second"] == 0
    assert trained_parts(arguments, folder) == {"vision_tower"}
    shutil.copytree(folder / "states" / "step-00000015", tmp_path / "states" / "step-00000015")
    _, resumed = run(toy, tmp_path / "resumed", *options, "--resume", tmp_path / "states" / "step-00000015")
    after = [row["distillation_loss"] for row in metrics(resumed) if "train_loss" in row]
    assert after == [row["distillation_loss"] for row in rows[15:]], "the head is part of the state"


@pytest.mark.parametrize("damage", ["cut", "empty", "zeroed", "flipped", "few rows", "no note", "damaged note", "fifo"])
def test_damaged_teacher_features_are_computed_again(tmp_path, monkeypatch, damage):
    images = np.lib.format.open_memmap(tmp_path / "images.npy", mode="w+", dtype=np.uint8, shape=(6, 4, 4, 3))
    expected = np.arange(24, dtype=np.float16).reshape(6, 4)
    monkeypatch.setattr(
        distillation, "load_vision_encoder", lambda _: SimpleNamespace(module=torch.nn.Linear(1, 1), settings={})
    )
    monkeypatch.setattr(distillation, "weights_hash", lambda _: "0")
    monkeypatch.setattr(distillation, "_encode", lambda *_: iter([expected]))
    distillation.teacher_features(["teacher"], images, "cpu")
    (path,) = tmp_path.glob("features-*.npy")
    content, note = path.read_bytes(), path.with_suffix(".json")
    if damage == "few rows":
        np.save(path, expected[:3])
    elif damage == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif damage == "no note":
        note.unlink()
    elif damage == "damaged note":
        note.write_text("{")
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"cut": content[:-5], "empty": b"", "zeroed": bytes(200), "flipped": flipped}[damage])
    distillation.teacher_features(["teacher"], images, "cpu")
    assert path.read_bytes() == content
    monkeypatch.setattr(distillation, "_encode", lambda *_: 1 / 0)
    distillation.teacher_features(["teacher"], images, "cpu")
    assert not list(tmp_path.glob("*.partial"))


def test_teacher_features_are_computed_once(toy, teacher, monkeypatch, tmp_path):
    rows = load(str(toy / "data"), "short")["train"].select(range(5))
    images, _ = decode_once(rows, NanoVLMImageProcessor())
    features = distillation.teacher_features([teacher, teacher], images, "cpu")
    assert (features.shape, features.dtype) == ((5, 2 * 16), np.float16)
    assert np.array_equal(features[:, :16], features[:, 16:])
    assert np.allclose(features.astype(np.float32).mean(0), 0, atol=1e-2)
    monkeypatch.setattr(distillation, "_encode", lambda *_: 1 / 0)
    assert np.array_equal(distillation.teacher_features([teacher], images, "cpu"), features[:, :16])


def test_encoders_by_name(tmp_path, teacher):
    images = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    for name, width in (("mini-short", 400), (teacher, 16)):
        features, logits = load_vision_encoder(name).encode(images)
        assert (features.shape, features.dtype, logits) == ((3, width), torch.float32, None)
        single = torch.cat([load_vision_encoder(name).encode(images[row : row + 1])[0] for row in range(3)])
        torch.testing.assert_close(single, features, atol=1e-3, rtol=1e-3)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 32, "patch_size": 16}))
    clip.save_pretrained(tmp_path / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path / "clip")
    assert load_vision_encoder(str(tmp_path / "clip")).encode(images)[0].shape == (3, 32)


@pytest.mark.parametrize("name", ["efficientnet-lite1", "no/such-model", "/no/such/folder"])
def test_a_teacher_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setattr("nanovlm_hf.vision_encoders.find_spec", lambda _: None)
    with pytest.raises(InputError, match=name) as error:
        load_vision_encoder(name)
    assert "\n" not in str(error.value)
    assert name != "efficientnet-lite1" or "pip install" in str(error.value)


@pytest.mark.slow
def test_the_decoder_learns_texts_without_images(toy, tmp_path, stories):
    arguments, folder = run(toy, tmp_path / "run", "--texts", "short", stories, "--image_dropout", 1)
    assert [row["grounding_gap"] for row in metrics(folder) if "grounding_gap" in row] == [0.0]
    assert trained_parts(arguments, folder) == {"language_model"}
    record = yaml.safe_load((folder / "training_args.yaml").read_text())
    (file,) = record["data"]["train"]["files"]
    assert file["name"] == "stories.jsonl"
    assert re.fullmatch("[0-9a-f]{16}", file["sha256"])


def test_image_dropout_hides_some_images(toy):
    rows = load(str(toy / "data"), "short")["train"].select(range(40))
    images = np.zeros((40, 32, 32, 3), dtype=np.uint8)
    tokenizer = tokenizer_in(toy / "tokenizer")
    texts = TokenizedTexts({"short": [[text] for text in rows["description"]]}, [[]] * 40, tiny_processor(tokenizer))
    settings = {"vocab_size": 320, "batch_size": 20, "steps": 20}
    plain, hidden = (
        TrainingBatches(images, texts, list(range(40)), image_dropout=rate, **settings) for rate in (0.0, 0.25)
    )
    shares = [
        np.mean([(batches[step]["texts"][0]["image_of_text"] == -1).numpy() for step in range(20)])
        for batches in (plain, hidden)
    ]
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.25, abs=0.07)
    assert torch.equal(plain[3]["texts"][0]["targets"], hidden[3]["texts"][0]["targets"])


def test_a_text_without_an_image_follows_the_embedding_of_the_image_token(tokenizer):
    """The objective and `generate()` agree: without `pixel_values` the model reads the embedding of `<image>`."""
    model = tiny_model().eval()
    ids = torch.tensor([[3, 40, 41, 42, 2]])
    labels = torch.tensor([[-100, 40, 41, 42, 2]])
    text = {"input_ids": ids, "targets": ids[0, 1:], "positions": torch.arange(4), "image_of_text": torch.tensor([-1])}
    wanted = model(input_ids=ids, labels=labels).loss
    for pixel_values in (None, torch.randn(2, 3, 32, 32)):
        loss, _, _ = CompletionObjective(model)(pixel_values, [text], torch.zeros(2, 320))
        torch.testing.assert_close(loss / 4, wanted)


def test_a_micro_batch_without_images_and_texts_has_a_gradient():
    model = tiny_model()
    losses = CompletionObjective(model)(None, [])
    assert [loss.item() for loss in losses] == [0, 0, 0]
    sum(losses).backward()
    assert not model.get_input_embeddings().weight.grad.any()


def test_truncated_texts_of_a_file_are_reported(tokenizer, tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("A dog.\n" + " ".join(["dog"] * 400) + "\n")
    file = TextFile(path, tokenizer, [3])
    assert [len(line[0]) for line in file.ids][1] == 255
    file.report_truncated()
    assert capsys.readouterr().out == f"{path}: texts longer than 255 tokens are truncated: 1 lines\n"


def test_a_pass_over_a_text_file_reads_every_line_once(tokenizer, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"There is a {'big ' * number}ball." for number in range(24)) + "\n\n")
    processor = tiny_processor(tokenizer)
    file = TextFile(path, processor.tokenizer, [processor.image_token_id])
    parts = [file.batch(step, part, 2, 6, seed=0) for step in range(4) for part in range(2)]
    lengths = sorted(count for batch in parts for count in (batch["input_ids"] != 0).sum(1).tolist())
    assert lengths == sorted(len(line[0]) + 1 for line in file.ids)
    again = file.batch(2, 1, 2, 6, seed=0)
    assert all(torch.equal(again[name], parts[5][name]) for name in again)
    assert set(again["image_of_text"].tolist()) == {-1}
    assert file.batch(0, 0, 1, 80, seed=0)["input_ids"].shape[0] == 80, "a short file repeats within a step"


def test_the_texts_of_a_step_do_not_depend_on_its_parts(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"captions": [f"A {n} ball.", f"The {n} dog."]}) for n in range(24)))
    processor = tiny_processor(tokenizer)
    file = TextFile(path, processor.tokenizer, [processor.image_token_id])

    def texts(parts, count):
        batches = [file.batch(3, part, parts, count, seed=0)["input_ids"] for part in range(parts)]
        return [tokenizer.decode(ids, skip_special_tokens=True) for batch in batches for ids in batch]

    assert texts(1, 5) == texts(2, 5) == texts(5, 5) == texts(8, 5)
    settings = {"vocab_size": 320, "batch_size": 2, "steps": 4, "files": [file]}
    rows = TokenizedTexts({"short": [["A dog."]] * 4}, [["A dog."]] * 4, processor, list(range(4)))
    images = np.zeros((4, 32, 32, 3), np.uint8)
    batches = TrainingBatches(images, rows, list(range(4)), weights=[1.0, 0.5], **settings)
    assert [len(one["input_ids"]) for one in batches[0]["texts"]] == [2, 1]
    with pytest.raises(
        InputError, match=r"a weight of 0\.1 gives less than one text of .*texts\.jsonl per step of 2 images"
    ):
        TrainingBatches(images, rows, list(range(4)), weights=[1.0, 0.1], **settings)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"text": "a"}\n{"caption": "b"}\n', "line 2: has neither text nor captions"),
        ("a.jsonl", '{"text": 3}\n', "line 1: text"),
        ("a.jsonl", '{"text": " "}\n', "line 1: a text is empty"),
        ("a.jsonl", "{\n", "not JSON"),
        ("a.txt", "There is <image> a\n", "line 1: a text holds the special token <image>"),
        ("a.txt", "\n", "has no text"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_unusable_text_files_are_named(tokenizer, tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=problem) as error:
        TextFile(path, tokenizer, [3])
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--text_weights", "0"], "text_weights: .* leaves nothing to learn"),
        (["--image_dropout", "1.5"], "image_dropout: 1.5 is more than 1"),
        (["--texts", "short", "stories.csv"], "texts: 'stories.csv' is not one of"),
        (["--teacher", "mini-short", "--streaming", "true", "--max_steps", "2"], "teacher: cannot be combined"),
    ],
)
def test_invalid_fields(options, problem):
    with pytest.raises(InputError, match=problem):
        read_arguments(["--dataset", "data", "--output_dir", "run", *options])


def test_weights_belong_to_their_sources_in_any_order():
    given = ["--texts", "short", "a.jsonl", "captions", "b.txt", "--text_weights", "1", "0.5", "0.25", "0.1"]
    arguments = read_arguments(["--dataset", "data", "--output_dir", "run", *given])
    assert (arguments.weights_of_images, arguments.weights_of_files) == ([1.0, 0.25], [0.5, 0.1])


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_reads_the_fields_that_hide_images(toy, tmp_path, streaming):
    options = ("--streaming", streaming, "--max_steps", 2, "--image_dropout", 1)
    arguments, folder = run(toy, tmp_path / "run", *options)
    assert [row["grounding_gap"] for row in metrics(folder) if "grounding_gap" in row] == [0.0]
    assert trained_parts(arguments, folder) == {"language_model"}


def test_probe_of_features_that_know_the_answer(toy):
    data = probe_data(str(toy / "data"))
    assert data.labels[0].shape == (len(data.images[0]), len(data.words))
    assert not {"there", "the"} & set(data.words)
    answers = tuple(labels.astype(np.float32) for labels in data.labels)
    known = linear_probe(answers, data)
    rng = np.random.default_rng(0)
    unknown = linear_probe(tuple(rng.normal(size=(len(labels), 8)).astype(np.float32) for labels in data.labels), data)
    assert known["mean_average_precision"] > 0.95
    assert unknown["mean_average_precision"] < known["mean_average_precision"] - 0.2
    assert 0 < known["chance"] < 1


@pytest.mark.parametrize("captions", [[None, "A dog."], None, "A dog."])
def test_a_probe_refuses_captions_of_another_kind(monkeypatch, captions):
    rows = Dataset.from_dict({"image": [None] * 2, "image_id": [1, 2], "captions": [captions, captions]})
    monkeypatch.setattr("nanovlm_hf.evaluation.probe.load", lambda *_, **__: {"train": rows, "validation": rows})
    with pytest.raises(InputError, match=r"dataset: data \(short, train\): its column 'captions'|has no captions"):
        probe_data("data")


@pytest.mark.slow
def test_a_checkpoint_in_a_folder_is_an_encoder_of_the_command(tmp_path):
    """The command does not register the classes with the Auto classes."""
    folder = shutil.copytree(SHIPPED["mini-short"], tmp_path / "best")
    code = "import nanovlm_command, sys; from nanovlm_hf.vision_encoders import load_vision_encoder as load; "
    code += "print(type(load(sys.argv[1])).__name__)"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "_NanoVLM\n", done.stderr


@pytest.mark.slow
def test_probe_command(toy, teacher, capsys):
    assert cli.app(
        ["evaluate", "probe", "mini-short", teacher, "--dataset", str(toy / "data")], standalone_mode=False
    ) in (None, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["mini-short", teacher]
    assert all("mean average precision 0." in line or "mean average precision 1." in line for line in lines)

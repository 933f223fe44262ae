"""The training script's parts, and the script itself, launched as a user would."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import batches
import evaluation
import loop
import numpy as np
import pytest
import torch
import train as train_script
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from arguments import read_arguments
from conftest import picture, tiny_model, tiny_processor
from decoding import repeats
from export import export
from objective import CompletionObjective
from PIL import Image
from run_folder import RunFolder, parameter_groups
from toy_data import COLOURS, square, write_sources

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration, NanoVLMImageProcessor, NanoVLMProcessor
from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.data.tokenizer import train_tokenizer_on

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "training" / "configs" / "mini_short.yaml"
CPU = ROOT / "training" / "accelerate" / "cpu.yaml"


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A folder with `data`, a dataset of coloured squares, and `tokenizer`."""
    folder = tmp_path_factory.mktemp("toy")
    sources = write_sources(folder / "sources", photos=160)
    build_dataset(sources / "captions.json", sources / "descriptions.jsonl", sources / "images", folder / "data")
    train_tokenizer_on(str(folder / "data"), vocab_size=312).save_pretrained(folder / "tokenizer")
    return folder


def command(toy: Path, out: Path, **fields) -> list[str]:
    fields = {
        "dataset": toy / "data",
        "tokenizer": toy / "tokenizer",
        "output_dir": out,
        "per_device_train_batch_size": 8,
        "warmup_steps": 5,
        "logging_steps": 1,
        **fields,
    }
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    return [*launch, "--dynamo_backend", "no", str(ROOT / "training" / "train.py"), "--config", str(CONFIG), *options]


def launch(*args, **fields) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*args, **fields), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_script_trains_a_model_that_looks(tmp_path, toy):
    out = tmp_path / "run"
    launch(toy, out, num_train_epochs=8, eval_steps=60)
    rows = metrics(out)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    assert losses[-1] < 0.3 * losses[0]
    assert {"epoch", "learning_rate", "grad_norm", "images_per_second", "tokens_per_second"} <= set(rows[0])
    best = min(evals, key=lambda row: row["eval_loss"])
    assert best["grounding_gap"] > 0.05
    assert best["grounding_gap"] > 5 * best["grounding_gap_stderr"]
    assert Image.open(out / "loss.png").size[0] > 500

    model = NanoVLMForConditionalGeneration.from_pretrained(out / "best").eval()
    processor = NanoVLMProcessor.from_pretrained(out / "best")
    unseen = [square(number) for number in range(1000, 1016)]
    inputs = processor(
        images=[image for image, _ in unseen], text=["There is a big"] * len(unseen), return_tensors="pt"
    )
    texts = processor.batch_decode(
        model.generate(**inputs, max_new_tokens=8, do_sample=False), skip_special_tokens=True
    )
    right = sum(colour in text for text, (_, colour) in zip(texts, unseen, strict=True))
    assert right >= 14, texts

    export(out, tmp_path / "shipped", "mini-short")
    shipped, report = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "shipped", output_loading_info=True)
    assert not report["missing_keys"]
    assert shipped.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(shipped.eval()(**inputs).logits, model(**inputs).logits, atol=0.05, rtol=0)
    assert json.loads((tmp_path / "shipped" / "metrics.json").read_text())["eval_loss"] == best["eval_loss"]
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert f"| {best['eval_loss']:.3f} |" in card
    assert "--per_device_train_batch_size 8" in card
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(tmp_path, toy):
    fields = {"num_train_epochs": 0.75, "save_steps": 2, "eval_steps": 5, "mixed_precision": "no"}
    launch(toy, tmp_path / "whole", **fields)

    killed = subprocess.Popen(
        command(toy, tmp_path / "killed", **fields), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    progress = tmp_path / "killed" / "state" / "progress.json"
    deadline = time.monotonic() + 300
    while not progress.exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.01)
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "killed")], check=True)
    killed.wait()
    assert killed.returncode != 0
    assert not (tmp_path / "killed" / "last").exists()
    launch(toy, tmp_path / "killed", **fields, resume="true")

    def measured(folder: Path) -> list[tuple]:
        names = ("step", "train_loss", "eval_loss", "grounding_gap", "grad_norm", "learning_rate")
        return [tuple(row.get(name) for name in names) for row in metrics(folder)]

    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    digests = [
        hashlib.sha256((tmp_path / name / "last" / "model.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "killed")
    ]
    assert digests[0] == digests[1]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps one state a process, which other tests set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs train.py in this process: exit code and the errors."""

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            code = train_script.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("yaml", "options", "message"),
    [
        ("learning_rat: 0.1", (), "there is no field 'learning_rat': did you mean 'learning_rate'?"),
        ("- a\n- b", (), "no list of 'field: value' lines"),
        ("a: [", (), "cannot be read as YAML"),
        ("learning_rate: fast", (), "invalid float value: 'fast'"),
        ("preset: huge", (), "invalid choice: 'huge'"),
        ("texts: [poem]", (), "texts: ['poem'] is neither 'description' nor 'captions'"),
        ("learning_rate: 0", (), "learning_rate: 0.0 is not above 0"),
        ("", ("--eval_steps", "0"), "no list of"),
        ("seed: 1", ("--eval_steps", "0"), "eval_steps: 0 is less than 1"),
        ("seed: 1", ("--sed", "1"), "there is no field 'sed': did you mean 'seed'?"),
    ],
)
def test_wrong_fields(run, tmp_path, yaml, options, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    code, errors = run("--config", path, "--dataset", "d", "--output_dir", tmp_path / "o", *options)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_missing_config(run, tmp_path):
    code, errors = run("--config", tmp_path / "none.yaml")
    assert (code, errors) == (2, f"train.py: {tmp_path / 'none.yaml'}: there is no such file\n")


def test_a_run_without_a_best_model_is_not_exported(tmp_path):
    with pytest.raises(InputError, match="there is no best/ in this run"):
        export(tmp_path, tmp_path / "out", "mini-short")


def test_repeats_are_three_words_in_a_row():
    assert repeats("a black hat and a black hat")
    assert not repeats("a black hat and a black coat")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "nowhere"}, "dataset: nowhere (short) cannot be loaded"),
        ({"tokenizer": "nowhere"}, "tokenizer: there is no tokenizer.json in nowhere"),
        ({"init_from": "nowhere"}, "init_from: there is no folder nowhere"),
        ({"per_device_train_batch_size": 5000}, "a step takes 5000 photos, the train split has"),
    ],
)
def test_what_a_run_cannot_use(run, tmp_path, toy, fields, message):
    fields = {"dataset": toy / "data", "tokenizer": toy / "tokenizer", "output_dir": tmp_path / "run", **fields}
    code, errors = run("--config", CONFIG, *(text for name, value in fields.items() for text in (f"--{name}", value)))
    assert code == 1
    assert f"train.py: {message}" in errors
    assert "Traceback" not in errors


def test_another_runs_folder_is_not_overwritten(run, tmp_path, toy):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 3.0}\n')
    options = ("--dataset", toy / "data", "--tokenizer", toy / "tokenizer", "--output_dir", tmp_path)
    code, errors = run("--config", CONFIG, *options)
    assert code == 1
    assert "holds a run: add --resume true" in errors
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train_loss": 3.0}\n'


def test_a_kill_between_two_renames_loses_no_state(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "train_loss": 3.0}\n')
    for name in ("state.previous", "best.previous", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "whose").write_text(name)
    RunFolder(tmp_path, resume=True)
    assert (tmp_path / "state" / "whose").read_text() == "state.previous"
    assert (tmp_path / "best" / "whose").read_text() == "best"


def test_the_command_line_wins_over_the_file():
    arguments = read_arguments(
        ["--config", str(CONFIG), "--learning_rate", "0.5", "--texts", "captions", "description"]
    )
    assert arguments.learning_rate == 0.5
    assert arguments.texts == ["captions", "description"]
    assert (arguments.preset, arguments.dropout) == ("mini", 0.1)


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid(path):
    arguments = read_arguments(["--config", str(path)])
    assert (arguments.learning_rate, arguments.dropout) == (1e-3, 0.1)  # fixed by the paper, section 2.3
    assert arguments.output_dir == f"runs/{path.stem}"


@pytest.fixture
def texts(tokenizer):
    from datasets import Dataset

    rows = [
        {
            "description": f"There is a big {colour} ball.",
            "captions": [f"a {colour} happy", "happy to the left of a soft"],
        }
        for colour in COLOURS
    ]
    rows[1]["captions"] = ["a soft"]
    return batches.TokenizedTexts(Dataset.from_list(rows), ["description", "captions"], tiny_processor(tokenizer))


def test_a_batch_of_texts(texts, tokenizer):
    batch = texts.pad([2, 0])
    assert batch["photo_of_text"].tolist() == [0, 0, 1, 1]
    assert (batch["input_ids"][:, 0] == 3).all()
    assert (batch["labels"][:, 0] == -100).all()
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"].bool() & (batch["input_ids"] != 3))
    learned = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned[0] == "There is a big blue ball.<eos>"
    assert learned[1] == "a blue happy<eos>"
    drawn = {tuple(texts.pad([0], np.random.default_rng(seed))["input_ids"][1].tolist()) for seed in range(20)}
    assert len(drawn) == 2, "of several captions one is drawn"


def test_visual_words_are_the_captions_content_words(texts, tokenizer):
    targets = texts.word_targets([0, 1], 320)
    named = {tokenizer.decode([token]): targets[0, token].item() for token in targets[0].nonzero()[:, 0]}
    assert named == pytest.approx({" red": 0.25, " happy": 0.5, " soft": 0.25})
    assert targets.sum(1).tolist() == pytest.approx([1, 1])
    assert texts.has_side == [True, False, True, True]


def training_batches(texts, **kwargs) -> batches.TrainingBatches:
    photos = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    settings = {"batch_size": 2, "number_of_batches": 8, "augment": True, "seed": 5, "vocab_size": 320, **kwargs}
    image_processor = NanoVLMImageProcessor(size={"height": 32, "width": 32})
    return batches.TrainingBatches(photos, texts, image_processor, **settings)


def test_a_batch_depends_on_its_number_alone(texts):
    one, again = training_batches(texts), training_batches(texts)
    for _ in range(3):
        one[0]
    for name, value in again[3].items():
        assert torch.equal(one[3][name], value)
    assert not torch.equal(one[3]["pixel_values"], one[5]["pixel_values"])


def test_every_epoch_takes_every_photo_once_over_all_processes(texts):
    for epoch in range(2):
        taken = []
        for process in range(2):
            part = training_batches(texts, batch_size=1, process_index=process, num_processes=2)
            taken += [row for number in (2 * epoch, 2 * epoch + 1) for row in part.rows(number)]
        assert sorted(taken) == [0, 1, 2, 3]


def test_pixels_are_those_of_the_image_processor(texts):
    plain = training_batches(texts, augment=False)
    rows = plain.rows(0)
    want = plain.image_processor([Image.fromarray(plain.photos[row]) for row in rows], return_tensors="pt")
    torch.testing.assert_close(plain[0]["pixel_values"], want["pixel_values"], atol=1e-5, rtol=0)


def test_augmented_photos_keep_their_shape_and_mirror_only_where_they_may():
    photo = torch.zeros(224, 224, 3, dtype=torch.uint8)
    photo[:, 112:] = 200
    rng = np.random.default_rng(0)
    kept = [batches.augment(photo, rng, may_mirror=False) for _ in range(20)]
    assert all(one.shape == photo.shape and one.dtype == torch.uint8 for one in kept)
    assert all(one[:, -5:].float().mean() >= one[:, :5].float().mean() for one in kept)
    mirrored = [batches.augment(photo, rng, may_mirror=True) for _ in range(20)]
    assert any(one[:, -5:].float().mean() < one[:, :5].float().mean() for one in mirrored)


def test_the_objective_is_the_models_own_loss(tokenizer):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    batch = processor(
        images=[picture(0), picture(1)], text=["There is a big dog.", "A kite"], return_labels=True, return_tensors="pt"
    )
    targets = torch.zeros(2, 320)
    targets[0, 40] = 1
    text_loss, words_loss = CompletionObjective(model)(**batch, photo_of_text=torch.arange(2), word_targets=targets)
    count = (batch["labels"] != -100).sum()
    torch.testing.assert_close(text_loss / count, model(**batch).loss)
    visual = torch.nn.functional.layer_norm(model.get_image_features(batch["pixel_values"]).pooler_output[:1, 0], (32,))
    logits = visual @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(words_loss, torch.nn.functional.cross_entropy(logits, torch.tensor([40])))


def test_accumulation_weighs_tokens_not_pieces(texts):
    """Pieces of unequal length give the gradients of one large batch."""
    accelerator = Accelerator(cpu=True)
    whole = training_batches(texts, batch_size=4, augment=False)[0]
    pieces = []
    for photo in range(4):
        mine = whole["photo_of_text"] == photo
        piece = {name: whole[name][mine] for name in ("input_ids", "attention_mask", "labels")}
        piece |= {name: whole[name][photo : photo + 1] for name in ("pixel_values", "word_targets")}
        pieces.append(piece | {"photo_of_text": torch.zeros(int(mine.sum()), dtype=torch.long)})
    results = []
    for split in ([whole], pieces):
        objective = CompletionObjective(tiny_model())
        loss, tokens = loop._step(accelerator, objective, split, 0.5)
        results.append((loss, tokens, [parameter.grad for parameter in objective.parameters()]))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[0][0], results[1][0])
    for one, other in zip(results[0][2], results[1][2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_gap_is_zero_for_a_model_that_cannot_look(texts):
    photos = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    image_processor = NanoVLMImageProcessor(size={"height": 32, "width": 32})
    blind = tiny_model()
    torch.nn.init.zeros_(blind.model.multi_modal_projector.fc2.weight)
    measured = evaluation.evaluate(CompletionObjective(blind), photos, texts, image_processor, torch.device("cpu"))
    assert measured["grounding_gap"] == pytest.approx(0, abs=1e-6)
    seeing = CompletionObjective(tiny_model())
    measured = evaluation.evaluate(seeing, photos, texts, image_processor, torch.device("cpu"))
    assert abs(measured["grounding_gap"]) > 1e-3
    batch = texts.pad([0, 1, 2, 3])
    del batch["photo_of_text"]
    features = seeing.encode(batches.normalise(torch.from_numpy(photos), image_processor))
    losses, _ = seeing.token_losses(features.repeat_interleave(2, 0), **batch)
    assert measured["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_gaps_error_is_that_of_a_ratio_over_photos():
    sums = np.array([[10.0, 12.0, 10], [20.0, 20.0, 10], [5.0, 6.0, 5]])
    measured = evaluation.summarise(sums)
    assert measured["eval_loss"] == pytest.approx(35 / 25)
    assert measured["grounding_gap"] == pytest.approx(3 / 25)
    residuals = np.array([2 - 1.2, 0 - 1.2, 1 - 0.6])
    assert measured["grounding_gap_stderr"] == pytest.approx(np.sqrt((residuals**2).sum()) / 25)


def test_weight_decay_is_on_matrices_alone():
    model = tiny_model()
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert {"model.vision_tower.cls_token", "model.vision_tower.position_embedding"} <= {
        names[id(p)] for p in others["params"]
    }


def test_a_loss_that_is_no_number_stops_the_run(run, tmp_path, toy, monkeypatch):
    step = loop._step

    def poisoned(*arguments):
        loss, tokens = step(*arguments)
        return loss * float("nan"), tokens

    monkeypatch.setattr(loop, "_step", poisoned)
    options = ("--dataset", toy / "data", "--tokenizer", toy / "tokenizer", "--output_dir", tmp_path / "run")
    code, errors = run("--config", CONFIG, *options, "--per_device_train_batch_size", 8, "--logging_steps", 1)
    assert code == 1
    assert "step 1: the loss is nan" in errors

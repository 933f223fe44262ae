"""The training script's parts, and the script itself, launched as a user would."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluation
import loop
import numpy as np
import photo_store
import pixels
import pytest
import setup_run
import torch
import train as train_script
import with_trainer
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from arguments import read_arguments
from batches import TrainingBatches
from conftest import picture, tiny_model, tiny_processor
from decoding import repeats
from export import export
from huggingface_hub import ModelCard
from objective import CompletionObjective
from PIL import Image
from run_folder import RunFolder, parameter_groups
from safetensors.torch import load_file
from test_photos import png_header
from texts import TokenizedTexts
from toy_data import COLOURS, square, write_sources

from nanovlm_hf import (
    InputError,
    NanoVLMConfig,
    NanoVLMForConditionalGeneration,
    NanoVLMImageProcessor,
    NanoVLMProcessor,
)
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


MEASURED = ("step", "train_loss", "eval_loss", "grounding_gap", "grad_norm", "learning_rate")


def measured(folder: Path) -> list[tuple]:
    return [tuple(row.get(name) for name in MEASURED) for row in metrics(folder)]


def weights(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest() for name in ("last", "best")]


@pytest.mark.slow
def test_five_kills_change_nothing(tmp_path, toy):
    """Augmentation, dropout, the weights' average, accumulation and bf16 included; `--resume auto` from the start."""
    fields = {"num_train_epochs": 2.5, "save_steps": 3, "eval_steps": 10, "logging_steps": 2, "ema_decay": 0.9}
    fields |= {"texts": "short", "gradient_accumulation_steps": 2, "resume": "auto", "save_total_limit": 2}
    fields |= {"per_device_train_batch_size": 4, "augment": "true"}
    launch(toy, tmp_path / "whole", **fields)
    last = metrics(tmp_path / "whole")[-1]["step"]

    moments = random.Random(0)
    killed = tmp_path / "killed"
    for number in range(5):
        process = subprocess.Popen(command(toy, killed, **fields), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = moments.uniform(0.15, 0.95) * last * (number + 1) / 5
        deadline = time.monotonic() + 300
        while not any(row["step"] >= target for row in RunFolder(killed, keep=True).rows()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        subprocess.run(["pkill", "-KILL", "-f", str(killed)], check=True)
        process.wait()
    assert not (killed / "last").exists()
    launch(toy, killed, **fields)
    assert measured(killed) == measured(tmp_path / "whole")
    assert weights(killed) == weights(tmp_path / "whole")
    assert len(list((killed / "states").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_it_ends(tmp_path, toy, number):
    fields = {"num_train_epochs": 1, "save_steps": 10_000, "eval_steps": 10_000, "resume": "auto"}
    script = command(toy, tmp_path / "run", **fields)
    script = [sys.executable, *script[script.index(str(ROOT / "training" / "train.py")) :]]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    while len(RunFolder(tmp_path / "run", keep=True).rows()) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "train.py: stopped, the state is saved: --resume auto goes on" in errors
    assert "Traceback" not in errors
    (state,) = RunFolder(tmp_path / "run", keep=True).states()
    assert int(state.name.removeprefix("step-")) >= 4
    launch(toy, tmp_path / "run", **fields)
    launch(toy, tmp_path / "whole", **fields)
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")


@pytest.mark.slow
def test_the_losses_do_not_depend_on_the_number_of_processes(tmp_path, toy):
    """One process with four pieces a step, two with two, four with one; gloo between them, ten steps."""
    runs = []
    for processes, pieces in ((1, 4), (2, 2), (4, 1)):
        fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": pieces, "num_train_epochs": 0.5}
        fields |= {"mixed_precision": "no", "dropout": 0.0, "augment": "false", "texts": "short"}
        whole = command(toy, tmp_path / str(processes), **fields)
        options = whole[whole.index(str(ROOT / "training" / "train.py")) :]
        config = ROOT / "training" / "accelerate" / ("ddp.yaml" if processes > 1 else "cpu.yaml")
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
        launcher += ["--main_process_port", "0"] if processes > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, *options],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert RunFolder(tmp_path / str(processes), keep=True).description()["processes"] == processes
        runs.append([row for row in metrics(tmp_path / str(processes)) if "train_loss" in row])
    assert len(runs[0]) == 9
    for other in runs[1:]:
        for one, same in zip(runs[0], other, strict=True):
            assert same["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
            assert same["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_eight_photos_are_learned_by_heart(run, tmp_path):
    """To a loss under 0.05, and `generate()` says each text exactly."""
    sources = write_sources(tmp_path / "sources", photos=40)
    names = "dog cat cow pig hen fox owl bee ant rat bat elk ape eel cod emu gnu jay yak asp".split()
    lines = []
    for place, line in enumerate((sources / "descriptions.jsonl").read_text().splitlines()):
        image_id = json.loads(line)["image_id"]
        first, second = names[place % 20], names[(7 * place + place // 20) % 20]
        lines.append(json.dumps({"image_id": image_id, "short": f"The {first} sees number {place} and a {second}."}))
    (sources / "descriptions.jsonl").write_text("\n".join(lines))
    build_dataset(sources / "captions.json", sources / "descriptions.jsonl", sources / "images", tmp_path / "data")
    train_tokenizer_on(str(tmp_path / "data"), vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    options = ("--train_samples", 8, "--dropout", 0.0, "--augment", "false", "--num_train_epochs", 250)
    options += ("--learning_rate", 2e-3, "--warmup_steps", 20, "--eval_steps", 1000, "--weight_decay", 0.0)
    code, _ = run("--config", CONFIG, *toy_options(tmp_path, tmp_path / "run"), *options)
    assert code == 0
    assert metrics(tmp_path / "run")[-2]["train_loss"] < 0.05
    model = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "last").eval()
    processor = NanoVLMProcessor.from_pretrained(tmp_path / "run" / "last")
    from datasets import load_dataset

    rows = setup_run._lowest_hashes(load_dataset(str(tmp_path / "data"), "short", split="train"), 8)
    inputs = processor(images=rows["image"][:], text=[""] * 8, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    assert processor.batch_decode(tokens, skip_special_tokens=True) == rows["description"][:]


def test_fsdp_without_a_gpu_is_refused(run, tmp_path, toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, errors = run("--config", CONFIG, *toy_options(toy, tmp_path / "run"))
    assert code == 1
    assert "there is no GPU, and on CPUs Accelerate runs DDP for FSDP" in errors


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_state_whole(run, toy, small_disk):
    disk = small_disk("180m")  # room for best/ and one state of mini, not for two
    options = ("--save_steps", 2, "--num_train_epochs", 1, "--eval_steps", 1000, "--save_total_limit", 3)
    code, errors = run("--config", CONFIG, *toy_options(toy, disk / "run"), *options)
    assert code == 1
    assert "cannot be written" in errors
    assert "the last state is whole, --resume auto goes on" in errors
    states = RunFolder(disk / "run", keep=True).states()
    assert states
    assert all((state / "progress.json").exists() for state in states)
    subprocess.run(["mount", "-o", "remount,size=900m", disk], check=True)
    assert run("--config", CONFIG, *toy_options(toy, disk / "run"), *options, "--resume", "auto")[0] == 0


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
        ("texts: [poem]", (), "texts: 'poem' is neither short, long nor captions"),
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
        ({"init_from": "nowhere"}, "init_from: there is no checkpoint in nowhere"),
        ({"init_from": "mini-short"}, "tokenizer: "),
        (
            {"per_device_train_batch_size": 5000},
            "per_device_train_batch_size: a step takes 5000 photos, the train split",
        ),
        ({"resume": "nowhere"}, "resume: there is no state in nowhere"),
        ({"train_samples": 5000}, "train_samples: 5000 photos, but the train split has"),
        ({"n_head": 7}, "n_head, head_size, img_embd_dim: "),
        ({"trackers": "wandbb"}, "trackers, mixed_precision: "),
    ],
)
def test_what_a_run_cannot_use(run, tmp_path, toy, fields, message):
    fields = {"dataset": toy / "data", "tokenizer": toy / "tokenizer", "output_dir": tmp_path / "run", **fields}
    code, errors = run("--config", CONFIG, *(text for name, value in fields.items() for text in (f"--{name}", value)))
    assert code == 1
    assert f"train.py: {message}" in errors
    assert "Traceback" not in errors


def test_another_runs_folder_is_not_overwritten_unless_that_is_wanted(run, tmp_path, toy):
    (tmp_path / "run.yaml").write_text("arguments: {}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 3.0}\n')
    options = ("--config", CONFIG, *toy_options(toy, tmp_path), "--num_train_epochs", 0.1)
    code, errors = run(*options)
    assert code == 1
    assert "holds a run: add --resume auto to go on, --overwrite true to remove it" in errors
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train_loss": 3.0}\n'
    assert run(*options, "--overwrite", "true")[0] == 0
    assert metrics(tmp_path)[0]["train_loss"] != 3.0


def test_a_resumed_run_is_the_same_run(run, tmp_path, toy):
    options = ("--config", CONFIG, *toy_options(toy, tmp_path / "run"), "--num_train_epochs", 0.25, "--save_steps", 2)
    assert run(*options, "--resume", "auto", "--save_total_limit", 2)[0] == 0, "auto begins where there is no state"
    states = [state.name for state in RunFolder(tmp_path / "run", keep=True).states()]
    assert states == ["step-00000004", "step-00000005"]
    code, errors = run(*options, "--resume", "auto", "--learning_rate", "0.5")
    assert code == 1
    assert "resume: learning_rate was 0.001 and is 0.5 now" in errors
    before = metrics(tmp_path / "run")
    assert run(*options, "--resume", tmp_path / "run" / "states" / "step-00000004")[0] == 0
    after = metrics(tmp_path / "run")
    assert [row.get("train_loss") for row in after] == [row.get("train_loss") for row in before]


def test_a_kill_between_two_renames_loses_no_model(tmp_path):
    for name in ("last.previous", "best.previous", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "whose").write_text(name)
    RunFolder(tmp_path, keep=True)
    assert (tmp_path / "last" / "whose").read_text() == "last.previous"
    assert (tmp_path / "best" / "whose").read_text() == "best"


def test_lines_cut_short_and_lines_after_the_state_are_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log({"step": step})
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 4, "train')
    assert [row["step"] for row in folder.rows()] == [1, 2, 3]
    folder.cut_metrics(2)
    assert folder.metrics_path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_command_line_wins_over_the_file():
    arguments = read_arguments(["--config", str(CONFIG), "--learning_rate", "0.5", "--texts", "short", "captions"])
    assert arguments.learning_rate == 0.5
    assert arguments.texts == ["short", "captions"]
    assert arguments.text_weights == [1.0, 1.0]
    assert (arguments.preset, arguments.dropout) == ("mini", 0.1)


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid(path):
    arguments = read_arguments(["--config", str(path)])
    assert (arguments.learning_rate, arguments.dropout) == (1e-3, 0.1)  # fixed by the paper, section 2.3
    assert arguments.output_dir == f"runs/{path.stem}"


def config_of(name: str) -> tuple:
    arguments = read_arguments(["--config", str(ROOT / "training" / "configs" / f"{name}.yaml")])
    return arguments, setup_run.model_config(arguments, vocab_size=5120)


@pytest.mark.parametrize("preset", ["mini", "base", "large"])
@pytest.mark.parametrize("variant", ["short", "long"])
def test_the_papers_six_runs(preset, variant):
    arguments, config = config_of(f"{preset}_{variant}")
    assert (arguments.preset, arguments.variant) == (preset, variant)
    assert config.parameter_counts() == NanoVLMConfig.from_preset(preset).parameter_counts()
    assert config.image_seq_length == 1


@pytest.mark.parametrize("share", [50, 60, 70, 80])
def test_the_encoders_share_at_equal_parameters(share):
    counts = config_of(f"ablation_encoder_{share}")[1].parameter_counts()
    mini = NanoVLMConfig.from_preset("mini").parameter_counts()
    assert counts["total"] == pytest.approx(mini["total"], rel=0.01)
    assert counts["encoder"] / (counts["encoder"] + counts["decoder"]) == pytest.approx(share / 100, abs=0.015)


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
    text_of_label = batch["places"] // batch["input_ids"].shape[1]
    return [tokenizer.decode(batch["targets"][text_of_label == text]) for text in range(len(batch["input_ids"]))]


def test_a_batch_of_texts(texts, tokenizer):
    batch = texts.pad("short", [2, 0])
    assert batch["photo_of_text"].tolist() == [0, 1]
    assert (batch["input_ids"][:, 0] == 3).all()
    width = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"].flatten()[batch["places"] + 1], batch["targets"]), (
        "each label is the next token"
    )
    learned = learned_of(batch, tokenizer)
    assert learned[0] == "There is a big blue ball.<eos>"
    assert batch["places"][0] == 0, "the picture predicts the first word"
    assert (batch["places"] // width).unique().tolist() == [0, 1]
    captions = texts.pad("captions", [2, 1, 0], choices=[1, -1, 2])
    assert learned_of(captions, tokenizer) == ["happy to the left of a soft<eos>", "a red happy<eos>"]
    assert captions["photo_of_text"].tolist() == [0, 2], "a choice of -1 leaves a photo out"
    assert texts.lengths().tolist() == [len(photo[0]) for photo in texts.ids["short"]]


def test_visual_words_are_the_captions_content_words(texts, tokenizer):
    targets = texts.word_targets([0, 1], 320)
    named = {tokenizer.decode([token]): targets[0, token].item() for token in targets[0].nonzero()[:, 0]}
    assert named == pytest.approx({" red": 0.25, " happy": 0.5, " soft": 0.25})
    assert targets.sum(1).tolist() == pytest.approx([1, 1])
    assert texts.has_side.tolist() == [True, False, True, True]


def training_batches(texts, **kwargs) -> TrainingBatches:
    photos = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    settings = {"batch_size": 2, "steps": 8, "augment": True, "seed": 5, "vocab_size": 320, **kwargs}
    return TrainingBatches(photos, texts, **settings)


def ready(batch, image_size=32):
    """A batch as the objective takes it."""
    image_processor = NanoVLMImageProcessor(size={"height": image_size, "width": image_size})
    return loop.to_device(batch, image_processor, torch.device("cpu"))


def inputs_of(batch):
    return {name: batch[name] for name in ("pixel_values", "texts", "word_targets")}


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
            training_batches(texts, batch_size=1, pieces=pieces, process_index=index, num_processes=processes)
            for index in range(processes)
        ]
        step = [part[pieces * 3 + piece] for part in parts for piece in range(pieces)]
        views = {batch["rows"][0]: ready(batch) for batch in step}
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
    grouped = TrainingBatches(photos, texts, vocab_size=320, batch_size=16, steps=40)
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
    assert all(len(never[number]["texts"]) == 1 for number in range(4)), "a photo never comes without a text"


def test_pixels_are_those_of_the_image_processor(texts):
    plain = training_batches(texts, augment=False)
    rows = plain.rows(0)
    image_processor = NanoVLMImageProcessor(size={"height": 32, "width": 32})
    want = image_processor([Image.fromarray(plain.photos[row]) for row in rows], return_tensors="pt")
    torch.testing.assert_close(ready(plain[0])["pixel_values"], want["pixel_values"], atol=1e-5, rtol=0)


def looks(has_side, count=40):
    own = [np.random.default_rng(number) for number in range(count)]
    return pixels.random_look(np.random.default_rng(1), own, np.full(count, has_side), 224)


def test_augmented_photos_mirror_only_where_they_may():
    photos = np.zeros((40, 224, 224, 3), dtype=np.uint8)
    photos[:, :, 112:] = 200
    for has_side in (True, False):
        look = looks(has_side)
        crops = pixels.cut(photos, list(range(40)), look)
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
        images=[picture(0), picture(1)], text=["There is a big dog.", "A kite"], return_labels=True, return_tensors="pt"
    )
    targets = torch.zeros(2, 320)
    targets[0, 40] = 1
    labels = batch["labels"]
    whole = {"input_ids": batch["input_ids"], "photo_of_text": torch.arange(2)}
    whole |= {"targets": labels[labels != -100], "places": (labels != -100).flatten().nonzero()[:, 0] - 1}
    width, first = labels.shape[1], int((labels[0] != -100).sum())
    apart = [
        {
            "input_ids": whole["input_ids"][place : place + 1],
            "photo_of_text": torch.tensor([place]),
            "targets": whole["targets"][part],
            "places": whole["places"][part] - place * width,
        }
        for place, part in enumerate((slice(None, first), slice(first, None)))
    ]
    for split in ([whole], apart):
        text_loss, words_loss = CompletionObjective(model)(batch["pixel_values"], split, targets)
    count = (batch["labels"] != -100).sum()
    torch.testing.assert_close(text_loss / count, model(**batch).loss)
    visual = torch.nn.functional.layer_norm(model.get_image_features(batch["pixel_values"]).pooler_output[:1, 0], (32,))
    logits = visual @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(words_loss, torch.nn.functional.cross_entropy(logits, torch.tensor([40])))


def test_accumulation_weighs_tokens_not_pieces(texts):
    """Pieces of unequal length give the gradients of one large batch."""
    accelerator = Accelerator(cpu=True)
    whole = [ready(training_batches(texts, batch_size=4)[0])]
    in_pieces = training_batches(texts, batch_size=1, pieces=4)
    pieces = [ready(in_pieces[number]) for number in range(4)]
    results = []
    for split in (whole, pieces):
        objective = CompletionObjective(tiny_model())
        loss, tokens, _ = loop.gradients(accelerator, objective, split, 0.5)
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
    batch = texts.pad("short", [0, 1, 2, 3])
    del batch["photo_of_text"]
    features = seeing.encode(pixels.normalise(torch.from_numpy(photos), image_processor))
    losses = seeing.token_losses(features, **batch)
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


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_photos(run, tmp_path, toy, monkeypatch):
    """One photo of the sixth step turns to NaN; the state of the fourth is kept."""
    make = pixels.to_pixel_values
    calls = []

    def poisoned(crops, *rest):
        calls.append(len(crops))
        values = make(crops, *rest)
        if len(calls) == 6:
            values[3] = float("nan")
        return values

    monkeypatch.setattr(loop, "to_pixel_values", poisoned)
    code, errors = run("--config", CONFIG, *toy_options(toy, tmp_path / "run"), "--save_steps", 2, "--logging_steps", 5)
    assert code == 1
    assert "step 6: the loss is no number; photos of the batch (image_id): 1" in errors
    assert len(re.findall(r"\b1\d\d\d\b", errors)) == 8
    assert [state.name for state in RunFolder(tmp_path / "run", keep=True).states()] == ["step-00000004"]
    assert max(row["step"] for row in metrics(tmp_path / "run")) == 5


def toy_options(toy, out):
    dataset = ("--dataset", toy / "data", "--tokenizer", toy / "tokenizer", "--output_dir", out)
    return (*dataset, "--per_device_train_batch_size", 8, "--mixed_precision", "no")


def test_early_stopping_and_the_average_of_the_weights(run, tmp_path, toy):
    options = ("--eval_steps", 2, "--early_stopping_patience", 2, "--learning_rate", 1e-12, "--warmup_steps", 0)
    code, _ = run("--config", CONFIG, *toy_options(toy, tmp_path / "run"), *options, "--ema_decay", 0.5)
    assert code == 0
    evals = [row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row]
    assert 3 <= len(evals) <= 6, "nothing is learned at this rate, so the run ends early"
    average = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in average.values())


def test_the_evidence_of_a_run(run, tmp_path, toy):
    code, _ = run(
        "--config", CONFIG, *toy_options(toy, tmp_path / "run"), "--num_train_epochs", 0.25, "--logging_steps", 2
    )
    assert code == 0
    folder = RunFolder(tmp_path / "run", keep=True)
    record = folder.description()
    assert record["arguments"]["learning_rate"] == 1e-3
    assert record["data"]["train"]["photos"] > 130
    assert len(record["data"]["train"]["sha256"]) == 16
    assert record["packages"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{12}\+?", record["git_commit"] or "0" * 12)
    row = folder.rows()[0]
    names = {"step", "epoch", "learning_rate", "grad_norm", "train_loss", "images_per_second", "tokens_per_second"}
    assert set(row) == names | {"teraflops", "mfu", "memory_mib"}
    # Mini's forward and backward of a photo with some ten tokens: about 3 x 2 x 0.8 GFLOP.
    assert 2e9 < 1e12 * row["teraflops"] / row["images_per_second"] < 8e9
    samples = [json.loads(line) for line in (folder.path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert all(line["text"].startswith(line["prefix"]) for line in samples)
    assert all(line["reference"].startswith(line["prefix"]) for line in samples)
    text = (folder.path / "best" / "README.md").read_text()
    best = min(one["eval_loss"] for one in folder.rows() if "eval_loss" in one)
    assert f"| {best:.3f} |" in text
    assert "--num_train_epochs 0.25 --per_device_train_batch_size 8" in text
    assert str(tmp_path) not in text
    assert ModelCard(text).data.pipeline_tag == "image-text-to-text"
    page = (folder.path / "samples.html").read_text()
    assert page.count("<img ") == 8
    assert page.count("step ") == 8


def test_train_samples_are_the_lowest_hashes(tmp_path, toy):
    from datasets import load_dataset

    rows = load_dataset(str(toy / "data"), "short", split="train")
    few, more = (set(setup_run._lowest_hashes(rows, count)["image_id"]) for count in (10, 30))
    assert len(few) == 10
    assert few < more
    with pytest.raises(InputError, match="train_samples: 1000 photos"):
        setup_run._lowest_hashes(rows, 1000)


def test_photos_that_do_not_decode(tmp_path, toy, monkeypatch):
    import io as bytes_io

    from datasets import Dataset, Features, Value
    from datasets import Image as HubImage

    def photo(number):
        buffer = bytes_io.BytesIO()
        square(number)[0].save(buffer, "JPEG")
        return buffer.getvalue()

    def rows(bad):
        # One is no picture, one claims more pixels than are ever decoded.
        damaged = {7: b"nothing", 9: png_header(60_000, 60_000)}
        contents = [damaged[number] if number in bad else photo(number) for number in range(150)]
        features = Features({"image": HubImage(), "image_id": Value("int64")})
        return Dataset.from_dict(
            {"image": [{"bytes": one, "path": None} for one in contents], "image_id": list(range(150))},
            features=features,
        )

    image_processor = NanoVLMImageProcessor()
    photos, kept = photo_store.decode_once(rows({7}), image_processor)
    assert len(photos) == len(kept) == 149
    assert kept["image_id"][:9] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert np.abs(photos[7].astype(int) - np.asarray(square(8)[0])).mean() < 3, "rows and photos stay together"
    with pytest.raises(InputError, match=r"2 of 150 photos cannot be decoded \(image_id 7, 9\)"):
        photo_store.decode_once(rows({7, 9}), image_processor)


def test_through_transformers_own_trainer(tmp_path, toy, monkeypatch):
    options = (
        f"--dataset {toy / 'data'} --output_dir {tmp_path / 'run'} --max_steps 25 --learning_rate 1e-3 --use_cpu true"
    )
    options += " --per_device_train_batch_size 8 --logging_steps 1 --report_to none --eval_strategy no --seed 0"
    monkeypatch.setattr(sys, "argv", ["with_trainer.py", *options.split()])
    trainer = with_trainer.main()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    model = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "run")
    processor = NanoVLMProcessor.from_pretrained(tmp_path / "run")
    inputs = processor(images=square(3)[0], text="There is", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


def test_recomputing_activations_changes_nothing(run, tmp_path, toy):
    losses = []
    for name, value in (("kept", "false"), ("recomputed", "true")):
        options = ("--num_train_epochs", 0.25, "--logging_steps", 1, "--activation_checkpointing", value)
        assert run("--config", CONFIG, *toy_options(toy, tmp_path / name), *options)[0] == 0
        losses.append([row["train_loss"] for row in metrics(tmp_path / name) if "train_loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
def test_compiled_training_learns_the_same(run, tmp_path, toy):
    losses = []
    for name, value in (("eager", "false"), ("compiled", "true")):
        options = ("--num_train_epochs", 0.5, "--logging_steps", 1, "--compile", value, "--dropout", 0.0)
        assert run("--config", CONFIG, *toy_options(toy, tmp_path / name), *options)[0] == 0
        losses.append([row["train_loss"] for row in metrics(tmp_path / name) if "train_loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "compiled" / "last")

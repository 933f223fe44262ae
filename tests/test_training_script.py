"""The training script as a user runs it: launched, killed, resumed, called wrongly."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import loop
import pixels
import pytest
import setup_run
import torch
import with_trainer
import yaml
from export import export
from huggingface_hub import ModelCard
from PIL import Image
from run_folder import RunFolder
from runs import CONFIG, ROOT, SCRIPT, command, launch, measured, metrics, toy_options, weights
from safetensors.torch import load_file
from toy_data import square, write_sources

from nanovlm_hf import (
    NanoVLMForConditionalGeneration,
    NanoVLMProcessor,
)
from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.data.tokenizer import train_tokenizer_on
from nanovlm_hf.publish import stage_checkpoint

FSDP_ON_CPUS = ROOT / "tests" / "fsdp_on_cpus.py"


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

    export(out, tmp_path / "shipped", "Squares of one colour.")
    shipped, report = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "shipped", output_loading_info=True)
    assert not report["missing_keys"]
    assert shipped.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(shipped.eval()(**inputs).logits, model(**inputs).logits, atol=0.05, rtol=0)
    assert json.loads((tmp_path / "shipped" / "metrics.json").read_text())["eval_loss"] == best["eval_loss"]
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert f"| {best['eval_loss']:.3f} |" in card
    assert "--per_device_train_batch_size 8" in card
    assert "Squares of one colour." in card
    for path in (tmp_path / "shipped" / "README.md", tmp_path / "shipped" / "training_args.yaml"):
        assert str(tmp_path) not in path.read_text()

    stage_checkpoint(str(out / "best"), "org/squares", tmp_path / "stage")
    pushed = ModelCard.load(tmp_path / "stage" / "README.md", ignore_metadata_errors=False)
    assert pushed.data.model_name == "squares"
    assert pushed.data.datasets == ["org/ShortDesc"]
    assert 'folder = "org/squares"' in pushed.text
    assert (tmp_path / "stage" / "loss.png").exists()


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
    script = [sys.executable, *script[script.index(str(SCRIPT)) :]]
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
        fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": pieces, "max_steps": 10}
        fields |= {"mixed_precision": "no", "dropout": 0.0, "augment": "false", "texts": "short"}
        fields |= {"muon_learning_rate": 0}  # which works in bf16, where the last bit of a gradient counts
        launch(toy, tmp_path / str(processes), processes, **fields)
        assert RunFolder(tmp_path / str(processes), keep=True).description()["processes"] == processes
        runs.append([row for row in metrics(tmp_path / str(processes)) if "train_loss" in row])
    assert len(runs[0]) == 10
    for other in runs[1:]:
        for one, same in zip(runs[0], other, strict=True):
            assert same["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
            assert same["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_eight_photos_are_learned_by_heart(train, tmp_path):
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
    code, _ = train("--config", CONFIG, *toy_options(tmp_path, tmp_path / "run"), *options)
    assert code == 0
    assert metrics(tmp_path / "run")[-2]["train_loss"] < 0.05
    model = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "last").eval()
    processor = NanoVLMProcessor.from_pretrained(tmp_path / "run" / "last")
    from datasets import load_dataset

    rows = setup_run._lowest_hashes(load_dataset(str(tmp_path / "data"), "short", split="train"), 8)
    inputs = processor(images=rows["image"][:], text=[""] * 8, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    assert processor.batch_decode(tokens, skip_special_tokens=True) == rows["description"][:]


@pytest.mark.slow
def test_sharded_weights_learn_the_same(tmp_path, toy):
    """FSDP2's sharding over two processes: the losses of one process, a state to go on from, a model to load."""
    fields = {"mixed_precision": "no", "dropout": 0.0, "augment": "false", "texts": "short", "max_steps": 10}
    fields |= {"save_steps": 6, "save_total_limit": 9, "eval_steps": 5, "per_device_train_batch_size": 4}
    fields |= {"muon_learning_rate": 0}
    fsdp = {"processes": 2, "config": "fsdp.yaml", "script": FSDP_ON_CPUS}
    launch(toy, tmp_path / "one", **fields, gradient_accumulation_steps=2)
    launch(toy, tmp_path / "sharded", **fsdp, **fields)
    launch(toy, tmp_path / "resumed", **fsdp, **fields, resume=tmp_path / "sharded" / "states" / "step-00000006")
    assert RunFolder(tmp_path / "sharded", keep=True).description()["distributed_type"] == "FSDP"
    one, sharded, resumed = (metrics(tmp_path / name) for name in ("one", "sharded", "resumed"))
    for row, same in zip(one, sharded, strict=True):
        for name in ("train_loss", "eval_loss"):
            assert same.get(name) == pytest.approx(row.get(name), abs=1e-5)
    assert [row.get("train_loss") for row in resumed] == [row.get("train_loss") for row in sharded[7:]]
    assert weights(tmp_path / "resumed")[0] == weights(tmp_path / "sharded")[0]
    loaded, report = NanoVLMForConditionalGeneration.from_pretrained(
        tmp_path / "sharded" / "best", output_loading_info=True
    )
    assert not report["missing_keys"]
    whole = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "one" / "best")
    for mine, other in zip(loaded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fsdp_on_gpus(tmp_path, toy):
    processes = torch.cuda.device_count()
    steps = {"max_steps": 10, "eval_steps": 5, "save_steps": 5, "muon_learning_rate": 0}
    launch(toy, tmp_path / "run", processes, config="fsdp.yaml", **steps)
    assert metrics(tmp_path / "run")[-2]["train_loss"] < metrics(tmp_path / "run")[0]["train_loss"]
    NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "best")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"ema_decay": 0.9}, "ema_decay: sharded weights have no average here"),
        ({"muon_learning_rate": 3e-3}, "muon_learning_rate: Muon needs whole matrices: use ddp.yaml"),
    ],
)
def test_what_sharded_weights_cannot_have_is_refused(tmp_path, toy, fields, problem):
    fields = {"processes": 2, "config": "fsdp.yaml", "script": FSDP_ON_CPUS} | fields
    done = subprocess.run(command(toy, tmp_path / "run", **fields), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"train.py: {problem}" in done.stderr


def test_fsdp_without_a_gpu_is_refused(train, tmp_path, toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, errors = train("--config", CONFIG, *toy_options(toy, tmp_path / "run"))
    assert code == 1
    assert "there is no GPU, and on CPUs Accelerate runs DDP for FSDP" in errors


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_state_whole(train, toy, small_disk):
    disk = small_disk("180m")  # room for best/ and one state of mini, not for two
    options = ("--save_steps", 2, "--num_train_epochs", 1, "--eval_steps", 1000, "--save_total_limit", 3)
    options += ("--muon_learning_rate", 0)  # AdamW's states are the larger ones
    code, errors = train("--config", CONFIG, *toy_options(toy, disk / "run"), *options)
    assert code == 1
    assert "cannot be written" in errors
    assert "the last state is whole, --resume auto goes on" in errors
    states = RunFolder(disk / "run", keep=True).states()
    assert states
    assert all((state / "progress.json").exists() for state in states)
    subprocess.run(["mount", "-o", "remount,size=900m", disk], check=True)
    assert train("--config", CONFIG, *toy_options(toy, disk / "run"), *options, "--resume", "auto")[0] == 0


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
def test_wrong_fields(train, tmp_path, yaml, options, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    code, errors = train("--config", path, "--dataset", "d", "--output_dir", tmp_path / "o", *options)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_missing_config(train, tmp_path):
    code, errors = train("--config", tmp_path / "none.yaml")
    assert (code, errors) == (2, f"train.py: {tmp_path / 'none.yaml'}: there is no such file\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "nowhere"}, "dataset: nowhere (short) cannot be loaded"),
        ({"tokenizer": "nowhere"}, "tokenizer: there is no tokenizer.json in nowhere"),
        ({"init_from": "nowhere"}, "init_from: there is no checkpoint in nowhere"),
        ({"init_from": "mini-short"}, "tokenizer: "),
        ({"grow_from": "nowhere"}, "grow_from: there is no checkpoint in nowhere"),
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
def test_what_a_run_cannot_use(train, tmp_path, toy, fields, message):
    fields = {"dataset": toy / "data", "tokenizer": toy / "tokenizer", "output_dir": tmp_path / "run", **fields}
    code, errors = train("--config", CONFIG, *(text for name, value in fields.items() for text in (f"--{name}", value)))
    assert code == 1
    assert f"train.py: {message}" in errors
    assert "Traceback" not in errors


def test_another_runs_folder_is_not_overwritten_unless_that_is_wanted(train, tmp_path, toy):
    (tmp_path / "training_args.yaml").write_text("arguments: {}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 3.0}\n')
    options = ("--config", CONFIG, *toy_options(toy, tmp_path), "--num_train_epochs", 0.1)
    code, errors = train(*options)
    assert code == 1
    assert "holds a run: add --resume auto to go on, --overwrite true to remove it" in errors
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train_loss": 3.0}\n'
    assert train(*options, "--overwrite", "true")[0] == 0
    assert metrics(tmp_path)[0]["train_loss"] != 3.0


def test_a_resumed_run_is_the_same_run(train, tmp_path, toy):
    options = ("--config", CONFIG, *toy_options(toy, tmp_path / "run"), "--num_train_epochs", 0.25, "--save_steps", 2)
    options += ("--learning_rate", "0.001")
    assert train(*options, "--resume", "auto", "--save_total_limit", 2)[0] == 0, "auto begins where there is no state"
    states = [state.name for state in RunFolder(tmp_path / "run", keep=True).states()]
    assert states == ["step-00000004", "step-00000005"]
    code, errors = train(*options, "--resume", "auto", "--learning_rate", "0.5")
    assert code == 1
    assert "resume: learning_rate was 0.001 and is 0.5 now" in errors
    before = metrics(tmp_path / "run")
    assert train(*options, "--resume", tmp_path / "run" / "states" / "step-00000004")[0] == 0
    after = metrics(tmp_path / "run")
    assert [row.get("train_loss") for row in after] == [row.get("train_loss") for row in before]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_photos(train, tmp_path, toy, monkeypatch):
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
    code, errors = train(
        "--config", CONFIG, *toy_options(toy, tmp_path / "run"), "--save_steps", 2, "--logging_steps", 5
    )
    assert code == 1
    assert "step 6: the loss is no number; photos of the batch (image_id): 1" in errors
    assert len(re.findall(r"\b1\d\d\d\b", errors)) == 8
    assert [state.name for state in RunFolder(tmp_path / "run", keep=True).states()] == ["step-00000004"]
    assert max(row["step"] for row in metrics(tmp_path / "run")) == 5


def test_early_stopping_and_the_average_of_the_weights(train, tmp_path, toy):
    options = ("--eval_steps", 2, "--early_stopping_patience", 2, "--learning_rate", 1e-12, "--warmup_steps", 0)
    options += ("--muon_learning_rate", 0)
    code, _ = train("--config", CONFIG, *toy_options(toy, tmp_path / "run"), *options, "--ema_decay", 0.5)
    assert code == 0
    evals = [row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row]
    assert 3 <= len(evals) <= 6, "nothing is learned at this rate, so the run ends early"
    average = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in average.values())


def test_the_evidence_of_a_run(train, tmp_path, toy):
    code, _ = train(
        "--config", CONFIG, *toy_options(toy, tmp_path / "run"), "--num_train_epochs", 0.25, "--logging_steps", 2
    )
    assert code == 0
    folder = RunFolder(tmp_path / "run", keep=True)
    record = folder.description()
    assert record["arguments"]["learning_rate"] == yaml.safe_load(CONFIG.read_text())["learning_rate"]
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
    judged = [row for row in folder.rows() if "eval_loss" in row][-1]
    assert 0 <= judged["repetition_rate"] <= 1
    assert 0 <= judged["end_rate"] <= 1
    assert 0 <= judged["known_words"] <= 1
    assert json.loads((folder.path / "best" / "metrics.json").read_text()).items() >= judged.items()
    text = (folder.path / "best" / "README.md").read_text()
    best = min(one["eval_loss"] for one in folder.rows() if "eval_loss" in one)
    assert f"| {best:.3f} |" in text
    assert "--num_train_epochs 0.25 --per_device_train_batch_size 8" in text
    assert str(tmp_path) not in text
    assert ModelCard(text).data.pipeline_tag == "image-text-to-text"
    assert json.loads((folder.path / "best" / "tokenizer.json").read_text())["padding"] is None
    page = (folder.path / "samples.html").read_text()
    assert page.count("<img ") == 8
    assert page.count("step ") == 8


def test_through_transformers_own_trainer(tmp_path, toy, monkeypatch):
    options = (
        f"--dataset {toy / 'data'} --output_dir {tmp_path / 'run'} --max_steps 25 --learning_rate 1e-3 --use_cpu true"
    )
    options += " --per_device_train_batch_size 8 --logging_steps 1 --report_to none --eval_strategy no --seed 0"
    options += " --bf16 true"
    monkeypatch.setattr(sys, "argv", ["with_trainer.py", *options.split()])
    trainer = with_trainer.main()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    assert trainer.model.config._attn_implementation == "eager", "which is the faster in bf16 on a CPU"
    model = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "run")
    processor = NanoVLMProcessor.from_pretrained(tmp_path / "run")
    inputs = processor(images=square(3)[0], text="There is", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


def test_trackers_get_what_the_log_gets(train, tmp_path, toy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    options = ("--max_steps", 4, "--logging_steps", 1, "--eval_steps", 4, "--trackers", "tensorboard")
    assert train("--config", CONFIG, *toy_options(toy, out), *options)[0] == 0
    (folder,) = {path.parent for path in out.rglob("events.out.*") if path.parent.name == "nanovlm"}
    events = EventAccumulator(str(folder))
    events.Reload()
    tracked = [event.value for event in events.Scalars("train_loss")]
    rows = metrics(out)
    assert tracked == pytest.approx([row["train_loss"] for row in rows if "train_loss" in row])
    assert events.Scalars("eval_loss")[0].value == pytest.approx(rows[-1]["eval_loss"])


def test_recomputing_activations_changes_nothing(train, tmp_path, toy):
    losses = []
    for name, value in (("kept", "false"), ("recomputed", "true")):
        options = ("--num_train_epochs", 0.25, "--logging_steps", 1, "--activation_checkpointing", value)
        assert train("--config", CONFIG, *toy_options(toy, tmp_path / name), *options)[0] == 0
        losses.append([row["train_loss"] for row in metrics(tmp_path / name) if "train_loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
def test_compiled_training_learns_the_same(train, tmp_path, toy):
    losses = []
    for name, value in (("eager", "false"), ("compiled", "true")):
        options = ("--num_train_epochs", 0.5, "--logging_steps", 1, "--compile", value, "--dropout", 0.0)
        options += ("--muon_learning_rate", 0)  # whose bf16 rounds what compiling changes
        assert train("--config", CONFIG, *toy_options(toy, tmp_path / name), *options)[0] == 0
        losses.append([row["train_loss"] for row in metrics(tmp_path / name) if "train_loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "compiled" / "last")

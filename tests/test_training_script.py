"""The training script as a user runs it: launched, killed, resumed, called with wrong arguments."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from nanovlm_hf import NanoVLMForConditionalGeneration, NanoVLMProcessor, devices
from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.data.tokenizer import train_tokenizer_on
from nanovlm_hf.hub.staging import stage_checkpoint
from nanovlm_hf.training import augmentation, data, step, with_trainer
from nanovlm_hf.training.export import export
from nanovlm_hf.training.run_directory import RunDirectory

from helpers.runs import (
    CONFIG,
    ROOT,
    alone,
    command,
    fields_of,
    launch,
    measured,
    metrics,
    small_options,
    tiny_options,
    toy_options,
    wait_for,
    weights,
)
from helpers.toy_data import square, write_sources

FSDP_ON_CPUS = ROOT / "tests" / "helpers" / "fsdp_on_cpus.py"


@pytest.mark.slow
def test_the_script_trains_a_model_that_uses_the_image(tmp_path, toy):
    out = tmp_path / "run"
    launch(toy, out, num_train_epochs=10, eval_steps=85)
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
    assert pushed.data.datasets is None  # the toy dataset is on no Hub
    assert 'folder = "org/squares"' in pushed.text
    assert (tmp_path / "stage" / "loss.png").exists()


@pytest.mark.slow
def test_kills_change_nothing(train, tmp_path, toy):
    """With augmentation, dropout, EMA, gradient accumulation and bf16; `--resume auto` from the start."""
    fields = {"num_train_epochs": 2.5, "save_steps": 3, "eval_steps": 10, "logging_steps": 2, "ema_decay": 0.9}
    fields |= {"texts": "short", "gradient_accumulation_steps": 2, "resume": "auto", "save_total_limit": 2}
    fields |= {"per_device_train_batch_size": 4, "augment": "true"}
    assert train(*fields_of(toy, tmp_path / "whole", **fields))[0] == 0
    last = metrics(tmp_path / "whole")[-1]["step"]

    moments = random.Random(0)
    killed = tmp_path / "killed"
    for start in (command, alone):  # with the launcher and without
        process = subprocess.Popen(start(toy, killed, **fields), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = moments.uniform(0.1, 0.3) * last + (0.3 * last if start is alone else 0)
        wait_for(
            lambda target=target: any(row["step"] >= target for row in RunDirectory(killed, exist_ok=True).rows()),
            process,
        )
        time.sleep(moments.uniform(0, 0.1))
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()
    assert not (killed / "last").exists()
    assert train(*fields_of(toy, killed, **fields))[0] == 0
    assert measured(killed) == measured(tmp_path / "whole")
    assert weights(killed) == weights(tmp_path / "whole")
    assert len(list((killed / "states").iterdir())) == 2


@pytest.mark.slow
def test_a_signal_saves_before_it_ends_a_run(train, tmp_path, toy):
    """A run that each signal stops once, a few steps after it was resumed."""
    fields = {"max_steps": 50, "save_steps": 10_000, "eval_steps": 10_000, "resume": "auto"}
    folder, saved = RunDirectory(tmp_path / "run", exist_ok=True), 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = subprocess.Popen(alone(toy, folder.path, **fields), stderr=subprocess.PIPE, text=True)
        wait_for(lambda saved=saved: any(row["step"] >= saved + 4 for row in folder.rows()), process)
        process.send_signal(number)
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 128 + number
        assert "nanovlm_hf.training: stopped, the state is saved: --resume auto continues" in errors
        assert "Traceback" not in errors
        before, saved = saved, int(folder.states()[-1].name.removeprefix("step-"))
        assert saved >= before + 4
    assert train(*fields_of(toy, folder.path, **fields))[0] == 0
    assert train(*fields_of(toy, tmp_path / "whole", **fields))[0] == 0
    assert measured(folder.path) == measured(tmp_path / "whole")


@pytest.mark.slow
def test_the_losses_do_not_depend_on_the_number_of_processes(train, tmp_path, toy):
    """One process with four micro-batches a step, and two with two; ten steps through gloo."""
    runs = []
    for processes, pieces in ((1, 4), (2, 2)):
        fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": pieces, "max_steps": 10}
        fields |= {"mixed_precision": "no", "dropout": 0.0, "augment": "false", "texts": "short"}
        fields |= {"optimizer": "adamw"}  # Muon computes in bf16, which amplifies the last bit of a gradient
        out = tmp_path / str(processes)
        if processes == 1:
            assert train(*fields_of(toy, out, **fields))[0] == 0
        else:
            launch(toy, out, processes, **fields)
        assert RunDirectory(out, exist_ok=True).description()["processes"] == processes
        runs.append([row for row in metrics(out) if "train_loss" in row])
    one, two = runs
    assert len(one) == 10
    for row, same in zip(one, two, strict=True):
        assert same["train_loss"] == pytest.approx(row["train_loss"], abs=1e-5)
        assert same["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_eight_images_are_memorised(train, tmp_path):
    """The loss falls below 0.05, and `generate()` reproduces each text exactly."""
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
    code, _ = train("--config", CONFIG, *small_options(tmp_path, tmp_path / "run"), *options)
    assert code == 0
    assert metrics(tmp_path / "run")[-2]["train_loss"] < 0.05
    model = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "last").eval()
    processor = NanoVLMProcessor.from_pretrained(tmp_path / "run" / "last")
    from datasets import load_dataset

    rows = data._lowest_hashes(load_dataset(str(tmp_path / "data"), "short", split="train"), 8)
    inputs = processor(images=rows["image"][:], text=[""] * 8, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    assert processor.batch_decode(tokens, skip_special_tokens=True) == rows["description"][:]


@pytest.mark.slow
def test_sharded_weights_learn_the_same(train, tmp_path, toy):
    """FSDP2 over two processes: the losses of one process, a state to resume from, a model that loads."""
    fields = {"mixed_precision": "no", "dropout": 0.0, "augment": "false", "texts": "short", "max_steps": 10}
    fields |= {"save_steps": 6, "save_total_limit": 9, "eval_steps": 5, "per_device_train_batch_size": 4}
    fields |= {"optimizer": "adamw"}
    fsdp = {"processes": 2, "config": "fsdp.yaml", "script": FSDP_ON_CPUS}
    assert train(*fields_of(toy, tmp_path / "one", **fields, gradient_accumulation_steps=2))[0] == 0
    launch(toy, tmp_path / "sharded", **fsdp, **fields)
    launch(toy, tmp_path / "resumed", **fsdp, **fields, resume=tmp_path / "sharded" / "states" / "step-00000006")
    assert RunDirectory(tmp_path / "sharded", exist_ok=True).description()["distributed_type"] == "FSDP"
    assert not list((tmp_path / "sharded" / "states").rglob(".metadata")), "which would be unpickled"
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
    steps = {"max_steps": 10, "eval_steps": 5, "save_steps": 5, "optimizer": "adamw"}
    launch(toy, tmp_path / "run", processes, config="fsdp.yaml", **steps)
    assert metrics(tmp_path / "run")[-2]["train_loss"] < metrics(tmp_path / "run")[0]["train_loss"]
    NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "best")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"ema_decay": 0.9}, "ema_decay: not supported with FSDP"),
        ({"optimizer": "muon"}, "optimizer: Muon needs unsharded matrices: launch with --multi_gpu"),
    ],
)
def test_fields_that_fsdp_does_not_support_are_refused(tmp_path, toy, fields, problem):
    fields = {"processes": 2, "config": "fsdp.yaml", "script": FSDP_ON_CPUS} | fields
    done = subprocess.run(command(toy, tmp_path / "run", **fields), capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    assert f"nanovlm_hf.training: {problem}" in done.stderr


def test_fsdp_without_a_gpu_is_refused(train, tmp_path, toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, errors = train("--config", CONFIG, *toy_options(toy, tmp_path / "run"))
    assert code == 1
    assert "accelerate: FSDP needs a GPU" in errors


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_state_whole(train, toy, small_disk):
    disk = small_disk("180m")  # enough for best/ and one state of mini, not for two
    options = ("--save_steps", 2, "--num_train_epochs", 1, "--eval_steps", 1000, "--save_total_limit", 3)
    options += ("--optimizer", "adamw")  # its states are larger than Muon's
    code, errors = train("--config", CONFIG, *toy_options(toy, disk / "run"), *options)
    assert code == 1
    assert "cannot be written" in errors
    assert "the last state is intact, --resume auto continues" in errors
    states = RunDirectory(disk / "run", exist_ok=True).states()
    assert states
    assert all((state / "progress.json").exists() for state in states)
    subprocess.run(["mount", "-o", "remount,size=900m", disk], check=True)
    assert train("--config", CONFIG, *toy_options(toy, disk / "run"), *options, "--resume", "auto")[0] == 0


@pytest.mark.parametrize(
    ("yaml", "options", "message"),
    [
        ("learning_rat: 0.1", (), "there is no field 'learning_rat': did you mean 'learning_rate'?"),
        ("- a\n- b", (), "expected a mapping of field names to values"),
        ("a: [", (), "cannot be read as YAML"),
        ("learning_rate: fast", (), "invalid float value: 'fast'"),
        ("preset: huge", (), "invalid choice: 'huge'"),
        ("texts: [poem]", (), "texts: 'poem' is not one of short, long, captions"),
        ("learning_rate: 0", (), "learning_rate: 0.0 is not above 0"),
        ("", ("--eval_steps", "0"), "expected a mapping of field names to values"),
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
    assert (code, errors) == (2, f"nanovlm_hf.training: {tmp_path / 'none.yaml'}: no such file\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "nowhere"}, "dataset: nowhere (short): cannot be loaded"),
        ({"tokenizer": "nowhere"}, "tokenizer: there is no tokenizer.json in nowhere"),
        ({"init_from": "nowhere"}, "init_from: there is no checkpoint in nowhere"),
        ({"init_from": "mini-short"}, "tokenizer: "),
        ({"grow_from": "nowhere"}, "grow_from: there is no checkpoint in nowhere"),
        (
            {"per_device_train_batch_size": 5000},
            "per_device_train_batch_size: a step takes 5000 images, but the train split",
        ),
        ({"resume": "nowhere"}, "resume: there is no state in nowhere"),
        ({"train_samples": 5000}, "train_samples: 5000 images, but the train split has"),
        ({"n_head": 7}, "n_head, head_size, img_embd_dim: "),
        ({"trackers": "wandbb"}, "trackers, mixed_precision: "),
    ],
)
def test_unusable_inputs_are_refused(train, tmp_path, toy, fields, message):
    fields = {"dataset": toy / "data", "tokenizer": toy / "tokenizer", "output_dir": tmp_path / "run", **fields}
    code, errors = train("--config", CONFIG, *(text for name, value in fields.items() for text in (f"--{name}", value)))
    assert code == 1
    assert f"nanovlm_hf.training: {message}" in errors
    assert "Traceback" not in errors


def test_the_folder_of_another_run_is_overwritten_only_on_request(train, tmp_path, toy):
    (tmp_path / "training_args.yaml").write_text("arguments: {}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 3.0}\n')
    options = ("--config", CONFIG, *tiny_options(toy, tmp_path), "--num_train_epochs", 0.1)
    code, errors = train(*options)
    assert code == 1
    assert "holds a run: add --resume auto to resume it, --overwrite true to remove it" in errors
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train_loss": 3.0}\n'
    assert train(*options, "--overwrite", "true")[0] == 0
    assert metrics(tmp_path)[0]["train_loss"] != 3.0


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(train, tmp_path, toy):
    options = ("--config", CONFIG, *tiny_options(toy, tmp_path / "run"), "--num_train_epochs", 0.25, "--save_steps", 2)
    options += ("--learning_rate", "0.001")
    assert train(*options, "--resume", "auto", "--save_total_limit", 2)[0] == 0, (
        "auto starts a new run if there is no state"
    )
    states = [state.name for state in RunDirectory(tmp_path / "run", exist_ok=True).states()]
    assert states == ["step-00000004", "step-00000005"]
    code, errors = train(*options, "--resume", "auto", "--learning_rate", "0.5")
    assert code == 1
    assert "resume: learning_rate was 0.001 and is 0.5 now" in errors
    before = metrics(tmp_path / "run")
    assert train(*options, "--resume", tmp_path / "run" / "states" / "step-00000004")[0] == 0
    after = metrics(tmp_path / "run")
    assert [row.get("train_loss") for row in after] == [row.get("train_loss") for row in before]


@pytest.mark.slow
def test_a_nan_loss_stops_the_run_and_names_the_images(train, tmp_path, toy, monkeypatch):
    """An image of the sixth step turns to NaN; the state of the fourth is kept."""
    make = augmentation.to_pixel_values
    calls = []

    def poisoned(crops, *rest):
        calls.append(len(crops))
        values = make(crops, *rest)
        if len(calls) == 6:
            values[3] = float("nan")
        return values

    monkeypatch.setattr(step, "to_pixel_values", poisoned)
    code, errors = train(
        "--config", CONFIG, *small_options(toy, tmp_path / "run"), "--save_steps", 2, "--logging_steps", 5
    )
    assert code == 1
    assert "step 6: the loss is NaN or infinite; image_id of its batch: 1" in errors
    assert len(re.findall(r"\b1\d\d\d\b", errors)) == 8
    assert [state.name for state in RunDirectory(tmp_path / "run", exist_ok=True).states()] == ["step-00000004"]
    assert max(row["step"] for row in metrics(tmp_path / "run")) == 5


@pytest.mark.slow
def test_gradients_that_are_not_finite_are_not_saved(train, tmp_path, toy, monkeypatch):
    """The loss of that step is finite, and a state is due after it."""
    clip, calls = Accelerator.clip_grad_norm_, []

    def poisoned(self, parameters, *rest):
        parameters = list(parameters)
        calls.append(len(parameters))
        if len(calls) == 6:
            parameters[0].grad.fill_(float("nan"))
        return clip(self, parameters, *rest)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", poisoned)
    options = ("--save_steps", 2, "--eval_steps", 100, "--logging_steps", 100, "--max_steps", 10)
    code, errors = train("--config", CONFIG, *tiny_options(toy, tmp_path / "run"), *options)
    assert code == 1
    assert "step 6: the gradients are NaN or infinite; image_id of its batch: 1" in errors
    assert [state.name for state in RunDirectory(tmp_path / "run", exist_ok=True).states()] == ["step-00000004"]


@pytest.mark.slow
def test_early_stopping_with_ema(train, tmp_path, toy):
    options = ("--eval_steps", 2, "--early_stopping_patience", 2, "--learning_rate", 1e-12, "--warmup_steps", 0)
    options += ("--optimizer", "adamw")
    code, _ = train("--config", CONFIG, *small_options(toy, tmp_path / "run"), *options, "--ema_decay", 0.5)
    assert code == 0
    evals = [row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row]
    assert 3 <= len(evals) <= 6, "nothing is learned at this rate, so the run ends early"
    average = load_file(tmp_path / "run" / "last" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in average.values())


@pytest.mark.slow
def test_record_metrics_samples_and_card_of_a_run(train, tmp_path, toy):
    code, _ = train(
        "--config", CONFIG, *toy_options(toy, tmp_path / "run"), "--num_train_epochs", 0.25, "--logging_steps", 2
    )
    assert code == 0
    folder = RunDirectory(tmp_path / "run", exist_ok=True)
    record = folder.description()
    assert record["arguments"]["learning_rate"] == yaml.safe_load(CONFIG.read_text())["learning_rate"]
    assert record["data"]["train"]["photos"] > 130
    assert len(record["data"]["train"]["sha256"]) == 16
    assert record["packages"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{12}\+?", record["git_commit"] or "0" * 12)
    row = folder.rows()[0]
    names = {"step", "epoch", "learning_rate", "grad_norm", "train_loss", "images_per_second", "tokens_per_second"}
    assert set(row) >= names | {"teraflops", "mfu", "memory_mib"}
    # Mini's forward and backward of a photo with some ten tokens: about 3 x 2 x 0.8 GFLOP.
    assert 2e9 < 1e12 * row["teraflops"] / row["images_per_second"] < 8e9
    samples = [json.loads(line) for line in (folder.path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert all(line["text"].startswith(line["prefix"]) for line in samples)
    assert all(line["reference"].startswith(line["prefix"]) for line in samples)
    evaluated = [row for row in folder.rows() if "eval_loss" in row][-1]
    assert 0 <= evaluated["repetition_rate"] <= 1
    assert 0 <= evaluated["end_rate"] <= 1
    assert 0 <= evaluated["known_words"] <= 1
    assert json.loads((folder.path / "best" / "metrics.json").read_text()).items() >= evaluated.items()
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


@pytest.mark.slow
def test_training_with_transformers_trainer(tmp_path, toy, monkeypatch):
    options = (
        f"--dataset {toy / 'data'} --output_dir {tmp_path / 'run'} --max_steps 25 --learning_rate 1e-3 --use_cpu true"
    )
    options += " --per_device_train_batch_size 8 --logging_steps 1 --report_to none --eval_strategy no --seed 0"
    in_bf16 = devices.cpu_has_bf16()
    options += f" --bf16 {in_bf16}"
    monkeypatch.setattr(sys, "argv", ["train_with_trainer.py", *options.split()])
    trainer = with_trainer.main()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    assert trainer.model.config._attn_implementation == ("eager" if in_bf16 else "sdpa"), "the faster one"
    model = NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "run")
    processor = NanoVLMProcessor.from_pretrained(tmp_path / "run")
    inputs = processor(images=square(3)[0], text="There is", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.slow
def test_trackers_get_the_metrics_of_the_log(train, tmp_path, toy):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    options = ("--max_steps", 4, "--logging_steps", 1, "--eval_steps", 4, "--trackers", "tensorboard")
    assert train("--config", CONFIG, *small_options(toy, out), *options)[0] == 0
    (folder,) = {path.parent for path in out.rglob("events.out.*") if path.parent.name == "nanovlm"}
    events = EventAccumulator(str(folder))
    events.Reload()
    tracked = [event.value for event in events.Scalars("train_loss")]
    rows = metrics(out)
    assert tracked == pytest.approx([row["train_loss"] for row in rows if "train_loss" in row])
    assert events.Scalars("eval_loss")[0].value == pytest.approx(rows[-1]["eval_loss"])


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(train, tmp_path, toy):
    losses = []
    for name, value in (("kept", "false"), ("recomputed", "true")):
        options = ("--num_train_epochs", 0.25, "--logging_steps", 1, "--activation_checkpointing", value)
        assert train("--config", CONFIG, *small_options(toy, tmp_path / name), *options)[0] == 0
        losses.append([row["train_loss"] for row in metrics(tmp_path / name) if "train_loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
def test_compiled_training_learns_the_same(train, tmp_path, toy):
    losses = []
    for name, value in (("eager", "false"), ("compiled", "true")):
        options = ("--num_train_epochs", 0.5, "--logging_steps", 1, "--compile", value, "--dropout", 0.0)
        options += ("--optimizer", "adamw")  # Muon in bf16 amplifies the rounding that compiling changes
        assert train("--config", CONFIG, *small_options(toy, tmp_path / name), *options)[0] == 0
        losses.append([row["train_loss"] for row in metrics(tmp_path / name) if "train_loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "compiled" / "last")

"""Training with Transformers' `Trainer`: precision, label smoothing, and errors in one line."""

import json
import runpy
import sys

import pytest
import torch
from transformers import Trainer

from nanovlm_hf import InputError, devices
from nanovlm_hf.configuration_nanovlm import PRESETS
from nanovlm_hf.errors import UsageError
from nanovlm_hf.training import with_trainer

from helpers.models import random_image, tiny_model, tiny_processor
from helpers.runs import ROOT

SCRIPT = ROOT / "training" / "train_with_trainer.py"
REQUIRED = ("--dataset", "data", "--output_dir", "run")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Transformers stores the mixed precision in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs the script in this process: exit code and the errors."""

    def call(*options) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return stop.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("isa", ["AVX2", "ALL"])
def test_the_precision_is_chosen_where_none_is_given(monkeypatch, capsys, isa):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    in_bf16 = devices.cpu_has_bf16()
    options = [*REQUIRED, "--use_cpu", "true"]
    assert with_trainer.read_arguments(options)[1].bf16 == in_bf16
    assert capsys.readouterr().err.startswith(f"mixed_precision: {'bf16' if in_bf16 else 'no'} (")
    for asked in ("true", "false"):
        assert with_trainer.read_arguments([*options, "--bf16", asked])[1].bf16 == (asked == "true")
        assert "(as requested" in capsys.readouterr().err
    if not in_bf16:
        with_trainer.read_arguments([*options, "--bf16=true"])
        assert "although this CPU has no bfloat16 instructions" in capsys.readouterr().err


def test_smoothed_labels_are_shifted(tokenizer, tmp_path):
    """Trainer's loss with `label_smoothing_factor` is PyTorch's on the labels' predictions, batch by batch."""
    options = [*REQUIRED[:2], "--output_dir", str(tmp_path), "--label_smoothing_factor", "0.1", "--use_cpu", "true"]
    _, settings = with_trainer.read_arguments([*options, "--bf16", "false", "--report_to", "none"])
    model, processor = tiny_model(), tiny_processor(tokenizer)
    batch = processor(
        images=[random_image(0), random_image(1)],
        text=["There is a big dog.", "A kite"],
        return_labels=True,
        return_tensors="pt",
    )
    trainer = Trainer(model=model, args=settings, compute_loss_func=with_trainer.smoothed_loss(0.1))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        said = labels != -100
        wanted = torch.nn.functional.cross_entropy(logits[said], labels[said], label_smoothing=0.1)
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), wanted, atol=1e-4, rtol=0)
        count = said.sum()
        halves = [
            trainer.compute_loss(model, {name: value[row : row + 1] for name, value in batch.items()}, False, count)
            for row in range(2)
        ]
        torch.testing.assert_close(sum(halves), wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_run_with_smoothing_learns_to_predict(toy, tmp_path, monkeypatch):
    tiny = {"n_blks": 1, "n_layer": 1, "n_head": 4, "n_embd": 32, "head_size": 8, "img_embd_dim": 16}
    monkeypatch.setitem(PRESETS, "mini", PRESETS["mini"] | tiny)
    options = f"--dataset {toy / 'data'} --output_dir {tmp_path / 'run'} --max_steps 25 --learning_rate 1e-2"
    options += " --per_device_train_batch_size 8 --logging_steps 1 --report_to none --eval_strategy no --seed 0"
    options += " --use_cpu true --label_smoothing_factor 0.1 --bf16 false"
    monkeypatch.setattr(sys, "argv", ["train_with_trainer.py", *options.split()])
    trainer = with_trainer.main()
    again = options.replace("--max_steps 25", "--max_steps 26") + " --resume_from_checkpoint true"
    resumed = with_trainer.train(*with_trainer.read_arguments(again.split()))
    assert [row["step"] for row in resumed.state.log_history if "loss" in row] == list(range(1, 27))
    assert resumed.state.log_history[4] == trainer.state.log_history[4]
    saved = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    model, collate = trainer.model.eval(), trainer.data_collator
    rows = [trainer.eval_dataset[number] for number in range(8)]
    batch = collate(rows)
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        plain = model(**batch).loss
        logits = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits[:, :-1]
    assert plain < losses[0] * 0.7, "lower without smoothing as well"
    said = labels != -100
    wanted = torch.nn.functional.cross_entropy(logits[said], labels[said], label_smoothing=0.1).item()
    evaluated = trainer.evaluate(torch.utils.data.Subset(trainer.eval_dataset, range(8)))
    assert evaluated["eval_loss"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--preset", "huge"), "invalid choice: 'huge'"),
        (("--variant", "poem"), "invalid choice: 'poem'"),
        (("--learning_rate", "fast"), "invalid float value: 'fast'"),
        (("--label_smoothing_factor", "1.5"), "label_smoothing_factor: 1.5 is not from 0 to below 1"),
        (("--label_smoothing_factor", "nan"), "label_smoothing_factor: nan is not from 0 to below 1"),
        (("--eval_strategy", "sometimes"), "sometimes"),
        (("--bf16", "true", "--fp16", "true"), "fp16 and bf16"),
        (("--nonsense", "1"), "nonsense"),
    ],
)
def test_an_invalid_field_is_a_usage_error(options, problem):
    with pytest.raises(UsageError) as caught:
        with_trainer.read_arguments([*REQUIRED, "--use_cpu", "true", *options])
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_script_ends_with_one_line(script, tmp_path):
    code, errors = script("--dataset", "data", "--preset", "huge", "--output_dir", tmp_path)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("nanovlm_hf.training.with_trainer: ")
    code, errors = script("--dataset", tmp_path / "nowhere", "--output_dir", tmp_path)
    assert code == 1
    assert f"nanovlm_hf.training.with_trainer: dataset: {tmp_path / 'nowhere'} (short): cannot be loaded" in errors
    assert "Traceback" not in errors


def a_dataset(folder, rows):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as HubImage

    features = Features(
        {
            "image": HubImage(),
            "image_id": Value("int64"),
            "captions": List(Value("string")),
            "description": Value("string"),
        }
    )
    features = Features({name: kind for name, kind in features.items() if name in rows[0]})
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(folder / "short" / f"{split}.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: short\n  data_dir: short\n---\n")
    return str(folder)


def test_datasets_that_cannot_be_used_are_refused(tmp_path, tokenizer):
    from helpers.toy_data import jpeg_of

    rows = [
        {
            "image": {"bytes": jpeg_of(number), "path": None},
            "image_id": number,
            "captions": ["a square"],
            "description": "A square.",
        }
        for number in range(4)
    ]
    data = with_trainer.DataArguments(dataset="", variant="short")
    _, settings = with_trainer.read_arguments([*REQUIRED, "--use_cpu", "true", "--report_to", "none"])

    def refused(name, rows):
        data.dataset = a_dataset(tmp_path / name, rows)
        with pytest.raises(InputError) as caught:
            with_trainer.train(data, settings)
        return str(caught.value)

    for column in ("image", "captions", "description", "image_id"):
        problem = refused(f"no_{column}", [{k: v for k, v in row.items() if k != column} for row in rows])
        assert f"has no column '{column}'" in problem
        assert ("nanovlm data join" in problem) == (column == "image")
    assert "the text of image_id 2 (short) is empty" in refused("empty", [*rows[:2], rows[2] | {"description": " "}])
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg_of(0))
    named = [row | {"image": {"bytes": None, "path": str(secret)}} for row in rows]
    settings.output_dir = str(tmp_path / "run")
    assert refused("named", named)
    processor = tiny_processor(tokenizer)
    with pytest.raises(InputError, match="image_id 0 has no image"):
        with_trainer.collate(processor, named)
    with pytest.raises(InputError, match="image_id 0: "):
        with_trainer.collate(processor, [rows[0] | {"image": {"bytes": b"nothing", "path": None}}])
    long = with_trainer.collate(processor, [rows[0] | {"description": "dog " * 300}])
    assert long["input_ids"].shape == (1, 256)

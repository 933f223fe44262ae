"""Averaging the weights of runs, and exporting the average."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration
from nanovlm_hf.evaluation import decoding
from nanovlm_hf.training import average, compare, export, lineage, loop
from nanovlm_hf.training.arguments import read_arguments

from helpers.runs import metrics, toy_options

pytestmark = pytest.mark.slow  # all of them train

# A model of 37,000 parameters, which trains in seconds.
TINY = ("--n_blks", 1, "--n_layer", 1, "--n_head", 4, "--head_size", 4, "--img_embd_dim", 16, "--eval_samples", 8)


def options_for(toy, out, *options) -> list[str]:
    return list(map(str, (*toy_options(toy, out), *TINY, *options)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, toy):
    """Two runs that were initialised from a third."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name, *options):
        options = options_for(toy, folder / name, "--max_steps", 2, "--warmup_steps", 0, *options)
        return loop.train(read_arguments(options)).path

    begun = train("begun") / "best"
    return [train(f"seed_{seed}", "--init_from", begun, "--seed", seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def mean(runs):
    out = runs[0].with_name("mean")
    command = [sys.executable, "-m", "nanovlm_hf.training.average", *runs, "--out", out]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    (row,) = metrics(out)
    assert said == f"{out}: eval_loss {row['eval_loss']:.4f}, grounding gap {row['grounding_gap']:.4f}\n"
    return out


def weights(run):
    return load_file(run / "best" / "model.safetensors")


def test_the_weights_are_the_mean(runs, mean):
    first, second = map(weights, runs)
    assert any((first[name] - second[name]).abs().max() > 1e-4 for name in first)
    for name, value in weights(mean).items():
        assert (value - (first[name] + second[name]) / 2).abs().max() < 1e-6


def test_the_average_is_evaluated_as_a_run_is(train, tmp_path, toy, mean):
    """A run initialised from the average, at a negligible learning rate, has the same metrics."""
    rates = ("--learning_rate", 1e-12, "--warmup_steps", 0)
    options = options_for(toy, tmp_path / "run", "--init_from", mean / "best", "--max_steps", 1, *rates)
    assert train(*options)[0] == 0
    again, row = metrics(tmp_path / "run")[-1], metrics(mean)[0]
    for name in ("eval_loss", "grounding_gap", "end_rate", "words"):
        assert row[name] == pytest.approx(again[name], abs=1e-5)
    assert len((mean / "samples.jsonl").read_text().splitlines()) == 8


def test_an_average_of_decoders_is_evaluated_without_images(runs, toy):
    decoders = []
    for seed in (3, 4):
        out = runs[0].with_name(f"decoder_{seed}")
        options = ("--image_dropout", 1, "--seed", seed, "--max_steps", 1, "--warmup_steps", 0)
        decoders.append(loop.train(read_arguments(options_for(toy, out, *options))).path)
    measured = average.average(decoders, runs[0].with_name("decoder_mean"))
    assert measured["grounding_gap"] == 0


def test_the_card_lists_every_run_once(mean):
    text = (mean / "best" / "README.md").read_text()
    record = yaml.safe_load((mean / "best" / "training_args.yaml").read_text())
    listed = [one["arguments"]["output_dir"] for one in lineage.lineage(record)]
    assert listed == ["runs/begun", "runs/seed_1", "runs/seed_2", "runs/mean"]
    assert text.count("--output_dir runs/begun") == 1
    assert "\npython -m nanovlm_hf.training.average runs/seed_1 runs/seed_2 --out runs/mean\n```" in text
    assert "and 48 images, counted each time" in text, "three runs of two steps of eight"
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `runs/")] == listed
    assert "The weights are the average of 2 runs" in text
    assert "training loss at that step" not in text
    assert "\n\n\n" not in text
    assert str(mean.parent) not in text + (mean / "best" / "training_args.yaml").read_text()


def test_an_average_is_exported_and_kept_as_a_run_is(mean, tmp_path):
    export.export(mean, tmp_path / "shipped")
    NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "shipped")
    with Image.open(tmp_path / "shipped" / "loss.png") as figure:
        assert figure.size == (840, 480)
    assert json.loads((tmp_path / "shipped" / "metrics.json").read_text()) == metrics(mean)[0]
    kept = compare.keep(mean, tmp_path / "kept")
    assert compare.row(kept) == compare.row(tmp_path / "shipped")
    assert compare.row(kept)[:3] == ["`mean`", "0", "0.0"]
    assert compare.row(kept)[-1] == ""


def test_the_card_of_a_run_from_an_average_has_its_command(train, tmp_path, toy, mean):
    options = options_for(toy, tmp_path / "run", "--init_from", mean / "best", "--max_steps", 1)
    assert train(*options)[0] == 0
    text = (tmp_path / "run" / "best" / "README.md").read_text()
    assert text.index("--out runs/mean\n") < text.index("--output_dir runs/run")
    assert "--init_from runs/mean/best" in text


def test_runs_that_cannot_be_averaged(runs, mean, toy, tmp_path, fresh_accelerate):
    with pytest.raises(InputError, match="mean exists: remove it first"):
        average.average(runs, mean)
    with pytest.raises(InputError, match="nowhere: there is no best/ in this run: train it first"):
        average.average([*runs, tmp_path / "nowhere"], tmp_path / "out")

    def other(name, *options):
        options = options_for(toy, tmp_path / name, "--max_steps", 1, *options)
        return loop.train(read_arguments(options)).path

    with pytest.raises(InputError, match=r"full: its architecture or tokenizer differs from that of .*seed_1"):
        average.average([runs[0], other("full", "--vision_feature_select_strategy", "full")], tmp_path / "out")
    with pytest.raises(InputError, match="fewer: was evaluated on images or texts that differ"):
        average.average([runs[0], other("fewer", "--eval_samples", 5)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def module(monkeypatch, capsys):
    """Runs the `main` of a module: exit code and the errors."""

    def call(module, *options) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__.rpartition(".")[2], *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            module.main()
        return stop.value.code, capsys.readouterr().err

    return call


def test_a_single_run_cannot_be_averaged(module, runs, tmp_path):
    code, errors = module(average, runs[0], "--out", tmp_path / "out")
    assert code == 2
    assert "at least two runs are needed" in errors


@pytest.fixture
def damaged(runs, tmp_path):
    """A copy of a run for a test to damage."""
    shutil.copytree(runs[1], tmp_path / "damaged")
    return tmp_path / "damaged"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda run: (run / "training_args.yaml").unlink(), "there is no training_args.yaml"),
        (lambda run: (run / "training_args.yaml").write_text("a: ["), "cannot be read as YAML"),
        (lambda run: (run / "training_args.yaml").write_text("[]"), "training_args.yaml: "),
        (lambda run: field(run, "learning_rate", "fast"), "training_args.yaml: arguments.learning_rate: "),
        (lambda run: field(run, "warmup_steps", -1), "warmup_steps: -1 is less than 0"),
        (lambda run: field(run, "dataset", str(run / "gone")), "gone .short.: cannot be loaded"),
        (lambda run: (run / "best" / "model.safetensors").write_bytes(b"nothing"), "cannot be loaded"),
        (lambda run: (run / "best" / "config.json").write_text("[]"), "best"),
        (lambda run: fill(run, float("nan")), r"best: weight [\w.]+ holds NaN or infinity"),
    ],
)
def test_damaged_runs_cannot_be_averaged(runs, damaged, tmp_path, damage, problem, fresh_accelerate):
    damage(damaged)
    with pytest.raises(InputError, match=problem) as caught:
        average.average([damaged, runs[0]], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def field(run, name, value):
    record = yaml.safe_load((run / "training_args.yaml").read_text())
    record["arguments"][name] = value
    (run / "training_args.yaml").write_text(yaml.safe_dump(record))


def fill(run, value):
    content, name = weights(run), "model.vision_tower.embeddings.cls_token"
    content[name] = torch.full_like(content[name], value)
    save_file(content, run / "best" / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_half_precision_cannot_hold_are_not_exported(damaged, tmp_path, value):
    fill(damaged, value)
    with pytest.raises(InputError, match=r"NaN or infinity|too large for half precision"):
        export.export(damaged, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_export_that_fails_leaves_nothing(damaged, tmp_path):
    (damaged / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="there is no evaluation in it"):
        export.export(damaged, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_export_removes_no_other_folder(damaged, tmp_path):
    for name in ("out.partial", ".out", "out.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    before = sorted(tmp_path.iterdir())
    export.export(damaged, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])
    assert len(list(tmp_path.glob("*/thesis.tex"))) == 3


def test_ways_of_decoding_need_a_model_and_a_dataset(module, toy, tmp_path):
    code, errors = module(decoding, tmp_path / "nowhere", "--dataset", toy / "data")
    assert (code, errors.count("\n")) == (1, 1)
    code, errors = module(decoding, "mini-short", "--dataset", toy / "data", "--photos", 0)
    assert (code, "--photos" in errors) == (2, True)
    code, errors = module(decoding, "mini-short", "--dataset", tmp_path / "nowhere")
    assert code == 1
    assert errors.splitlines()[-1].startswith("decoding: --dataset ")
    assert "Traceback" not in errors

"""The mean of runs: its weights, how it is judged, and what it tells of them."""

import json
import subprocess
import sys

import average
import card
import compare
import export
import loop
import pytest
import yaml
from arguments import read_arguments
from PIL import Image
from runs import ROOT, metrics, toy_options
from safetensors.torch import load_file

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration


@pytest.fixture(scope="module")
def runs(tmp_path_factory, toy):
    """Two runs that went on from a third."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name, *options):
        options = (*toy_options(toy, folder / name), "--max_steps", 2, "--warmup_steps", 0, *options)
        return loop.train(read_arguments(list(map(str, options)))).path

    begun = train("begun") / "best"
    return [train(f"seed_{seed}", "--init_from", begun, "--seed", seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def mean(runs):
    out = runs[0].with_name("mean")
    command = [sys.executable, ROOT / "training" / "average.py", *runs, "--out", out]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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


def test_it_is_judged_as_a_run_is(train, tmp_path, toy, mean):
    """A run that begins from it, and changes nothing, says the same of it."""
    rates = ("--learning_rate", 1e-12, "--warmup_steps", 0)
    options = (*toy_options(toy, tmp_path / "run"), "--init_from", mean / "best", "--max_steps", 1, *rates)
    assert train(*options)[0] == 0
    again, row = metrics(tmp_path / "run")[-1], metrics(mean)[0]
    for name in ("eval_loss", "grounding_gap", "end_rate", "words"):
        assert row[name] == pytest.approx(again[name], abs=1e-5)
    assert len((mean / "samples.jsonl").read_text().splitlines()) == 8


def test_its_card_tells_of_every_run_once(mean):
    text = (mean / "best" / "README.md").read_text()
    assert text == card.card(mean / "best")
    record = yaml.safe_load((mean / "best" / "training_args.yaml").read_text())
    told = [one["arguments"]["output_dir"] for one in card.lineage(record)]
    assert told == ["runs/begun", "runs/seed_1", "runs/seed_2", "runs/mean"]
    assert text.count("--output_dir runs/begun") == 1
    assert "\npython training/average.py runs/seed_1 runs/seed_2 --out runs/mean\n```" in text
    assert "for 48 photos, counted each time" in text.replace("\n", " "), "three runs of two steps of eight"
    assert "the weights are the mean of 2 runs'" in text
    assert "training loss at that step" not in text
    assert "\n\n\n" not in text
    assert str(mean.parent) not in text + (mean / "best" / "training_args.yaml").read_text()


def test_a_mean_ships_and_is_kept_as_a_run_is(mean, tmp_path):
    export.export(mean, tmp_path / "shipped")
    NanoVLMForConditionalGeneration.from_pretrained(tmp_path / "shipped")
    with Image.open(tmp_path / "shipped" / "loss.png") as figure:
        assert figure.size == (840, 480)
    assert json.loads((tmp_path / "shipped" / "metrics.json").read_text()) == metrics(mean)[0]
    kept = compare.keep(mean, tmp_path / "kept")
    assert compare.row(kept) == compare.row(tmp_path / "shipped")
    assert compare.row(kept)[:3] == ["`mean`", "0", "0.0"]
    assert compare.row(kept)[-1] == ""


def test_a_run_that_goes_on_from_a_mean_tells_of_it(train, tmp_path, toy, mean):
    options = (*toy_options(toy, tmp_path / "run"), "--init_from", mean / "best", "--max_steps", 1)
    assert train(*options)[0] == 0
    text = (tmp_path / "run" / "best" / "README.md").read_text()
    assert text.index("--out runs/mean\n") < text.index("--output_dir runs/run")
    assert "--init_from runs/mean/best" in text


def test_what_has_no_mean(runs, mean, toy, tmp_path, fresh_accelerate):
    with pytest.raises(InputError, match="mean: exists: remove it first"):
        average.average(runs, mean)
    with pytest.raises(InputError, match="nowhere: there is no best/ in this run: train it first"):
        average.average([*runs, tmp_path / "nowhere"], tmp_path / "out")

    def other(name, *options):
        options = (*toy_options(toy, tmp_path / name), "--max_steps", 1, *options)
        return loop.train(read_arguments(list(map(str, options)))).path

    with pytest.raises(InputError, match=r"full: is of other sizes than .*seed_1, or of another tokenizer"):
        average.average([runs[0], other("full", "--vision_feature_select_strategy", "full")], tmp_path / "out")
    with pytest.raises(InputError, match="fewer: was judged on other photos or texts"):
        average.average([runs[0], other("fewer", "--eval_samples", 5)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_run_has_no_mean(runs, tmp_path):
    command = [sys.executable, ROOT / "training" / "average.py", runs[0], "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "a mean is of two runs or more" in done.stderr

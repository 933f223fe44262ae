"""Model cards and the table of runs: what they say is what the files beside them say."""

import json
import shutil
import subprocess
import sys

import card
import compare
import pytest
import record
import yaml
from run_folder import RECORD, RunFolder
from runs import ROOT

from nanovlm_hf import SHIPPED, InputError

RUNS = [*sorted(path.parent for path in (ROOT / "training" / "experiments").rglob(RECORD)), *SHIPPED.values()]
ROWS = [
    {"step": 10, "train_loss": 3.0, "epoch": 0.5, "images_per_second": 40.0},
    {"step": 20, "train_loss": 2.0, "epoch": 1.0, "images_per_second": 80.0},
    {"step": 20, "eval_loss": 2.5, "eval_loss_wrong_photo": 2.75, "grounding_gap": 0.25, "grounding_gap_stderr": 0.01},
    {"step": 30, "train_loss": 1.0, "epoch": 1.5, "images_per_second": 80.0},
    {"step": 30, "eval_loss": 2.6, "eval_loss_wrong_photo": 2.7, "grounding_gap": 0.1, "grounding_gap_stderr": 0.01},
]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "mini-short"
    shutil.copytree(SHIPPED["mini-short"], folder)
    return folder


def a_run(folder, init_from=None):
    """The files of a run, written by hand."""
    shipped = yaml.safe_load((SHIPPED["mini-short"] / RECORD).read_text())
    arguments = shipped["arguments"] | {
        "dataset": str(folder / "data"),
        "output_dir": str(folder),
        "init_from": init_from and str(init_from),
        "resume": "auto",
        "overwrite": False,
    }
    keep = ("data", "processes", "device", "packages", "git_commit")
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(yaml.safe_dump({"arguments": arguments} | {name: shipped[name] for name in keep}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return RunFolder(folder, keep=True)


def test_a_record_tells_the_runs_before_and_no_folder_of_the_machine(tmp_path):
    a_run(tmp_path / "first")
    public = record.public_record(a_run(tmp_path / "second", tmp_path / "first" / "best"))
    assert str(tmp_path) not in yaml.safe_dump(public)
    assert public["arguments"]["init_from"] == "runs/first/best"
    assert public["arguments"]["output_dir"] == "runs/second"
    assert public["photos_seen"] == 30 * 32
    assert public["hours"] == round((10 * 32 / 40 + 20 * 32 / 80) / 3600, 2)
    (before,) = public["before"]
    assert before["arguments"]["output_dir"] == "runs/first"
    assert before["photos_seen"] == 30 * 32
    assert record.best_metrics(RunFolder(tmp_path / "second", keep=True)) == ROWS[2] | {"train_loss": 2.0, "epoch": 1.0}


def test_a_run_from_a_checkpoint_tells_the_checkpoints_own_run(tmp_path):
    """By short name, or from a folder with its record beside the weights; without one, nothing is made up."""
    shipped = yaml.safe_load((SHIPPED["mini-long"] / RECORD).read_text())
    for number, init_from in enumerate(("mini-long", SHIPPED["mini-long"])):
        (before,) = record.public_record(a_run(tmp_path / str(number), init_from))["before"]
        assert before == {name: value for name, value in shipped.items() if name not in ("name", "about")}
    assert record.public_record(a_run(tmp_path / "other", "org/model"))["before"] == []


def test_hours_and_grams_add_up():
    one = {"hours": 2.0, "photos_seen": 100, "device": "2 cores of AMD EPYC", "before": []}
    two = one | {"hours": 3.0, "before": [one]}
    taken = card._compute(two)
    assert (taken["hours"], taken["photos"]) == (5.0, 200)
    assert taken["grams"] == pytest.approx(5 * 20 / 1000 * 480)
    assert card._compute(one | {"device": "1 core of AMD EPYC"})["grams"] == pytest.approx(2 * 10 / 1000 * 480)
    assert card._compute(one | {"device": "NVIDIA H100 80GB HBM3"})["grams"] == pytest.approx(2 * 0.7 * 480)
    assert card._compute(two | {"device": "something new"})["grams"] is None


def test_the_command_is_the_config_and_what_differs():
    kept = yaml.safe_load((ROOT / "training" / "experiments" / "mini_short" / RECORD).read_text())
    kept["arguments"].pop("muon_learning_rate", None)  # as in the record of a run that is older than the field

    def launch(**fields):
        commit, line = card.command(kept | {"arguments": kept["arguments"] | fields})
        assert commit == f"# made with the code of {kept['git_commit']}"
        return line

    usual = "accelerate launch training/train.py --config training/configs/mini_short.yaml"
    assert launch(num_train_epochs=7.0, texts=["short", "captions"]).startswith(usual)
    assert "--num_train_epochs 7.0" in launch(num_train_epochs=7.0)
    assert "--texts short captions" in launch(texts=["short", "captions"])
    assert "--muon_learning_rate 0.0" in launch()
    assert "muon_learning_rate" not in launch(muon_learning_rate=3e-3)
    own = launch(output_dir="runs/mine")
    assert own.startswith("accelerate launch training/train.py --dataset data --output_dir runs/mine")
    assert "--variant" not in own
    long = launch(output_dir="runs/mine", variant="long", texts=["long"])
    assert "--variant long" in long
    assert "--texts" not in long


def a_report(folder, name="mini-short"):
    """A report of `nanovlm evaluate` on three items, in which the second names most that nobody saw."""
    evaluation = json.loads((SHIPPED["mini-short"] / "evaluation.json").read_text())
    measured = evaluation["in_domain"]
    unseen = [["hat"], ["hat", "ball", "car"], []]
    measured["mentions"]["rows"] = [{"unseen": things} for things in unseen]
    measured["originality"]["rows"] = []
    settings = {"dataset": "data", "variant": "short", "prefix_words": None}
    results = {
        "settings": settings,
        "models": {name: {}},
        "grounding": {name: evaluation["grounding"]},
        "sets": {"in_domain": {"items": 3, "models": {name: measured}}},
    }
    (folder / "completions").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    rows = [
        {
            "item_id": str(number),
            "model": name,
            "prefix": "A dog",
            "text": f"A dog says | {number}.",
            "completion": f"says | {number}.",
            "reference": f"A dog sees {number}.",
        }
        for number in range(3)
    ]
    (folder / "completions" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_an_evaluation_becomes_part_of_the_card(checkpoint, tmp_path):
    command = [sys.executable, ROOT / "training" / "card.py", checkpoint, "--report", a_report(tmp_path / "report")]
    subprocess.run(command, check=True)
    text = (checkpoint / "README.md").read_text()
    assert "completions of 3 test photos" in text.replace("\n", " ")
    assert r"| 0 | A dog | says \| 0. | sees 0. |" in text
    first_failure = text.split("| photo | begins | it says | not there | the description |\n")[1].splitlines()[1]
    assert first_failure == r"| 1 | A dog | says \| 1. | hat, ball, car | sees 1. |"


def test_a_card_without_an_evaluation(checkpoint):
    (checkpoint / "evaluation.json").unlink()
    text = card.card(checkpoint)
    assert "nanovlm evaluate" not in text
    assert "## What it says" not in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / RECORD).unlink(), "there is no training_args.yaml or metrics.json"),
        (lambda folder: (folder / "metrics.json").write_text("{}"), "metrics.json has no eval_loss"),
        (lambda folder: (folder / "metrics.json").write_text("{"), "line 1 is not JSON"),
        (lambda folder: (folder / "evaluation.json").write_text("{}"), "evaluation.json has no grounding.retrieval"),
    ],
)
def test_no_card_of_half_a_checkpoint(checkpoint, change, problem):
    change(checkpoint)
    with pytest.raises(InputError, match=problem):
        card.card(checkpoint)


def test_a_report_of_another_model(checkpoint, tmp_path):
    with pytest.raises(InputError, match="says nothing of a model mini-short"):
        card.add_evaluation(checkpoint, a_report(tmp_path / "report", name="other"))


def test_runs_are_kept_and_compared(tmp_path):
    folder = compare.keep(a_run(tmp_path / "try").path, tmp_path / "kept")
    assert {path.name for path in folder.iterdir()} == {RECORD, "metrics.jsonl"}
    assert compare.row(folder) == compare.row(tmp_path / "try")
    assert compare.table([folder]).splitlines()[2] == ("| `try` | 960 | 0.0 | 2.500 | 2.750 | 0.250 ± 0.010 | 2.000 |")
    with pytest.raises(InputError, match="this is no run"):
        compare.keep(tmp_path, tmp_path / "kept")


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.name)
def test_the_table_of_experiments_is_what_was_measured(folder):
    said = (ROOT / "training" / "EXPERIMENTS.md").read_text()
    assert f"| {' | '.join(compare.row(folder))} |" in said
    assert compare.commands([folder]) in said
    assert "/root" not in (folder / RECORD).read_text()

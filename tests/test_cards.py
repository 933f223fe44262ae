"""Model cards and the table of experiments state what the records and metrics say."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from nanovlm_hf import SHIPPED, InputError
from nanovlm_hf.errors import UsageError, printable
from nanovlm_hf.hub import gallery, model_card
from nanovlm_hf.hub.dataset_card import read_card
from nanovlm_hf.hub.model_metadata import hub_card
from nanovlm_hf.training import arguments as train_arguments
from nanovlm_hf.training import compare, compute, lineage, record
from nanovlm_hf.training.run_directory import RECORD, RunDirectory

from helpers.runs import ROOT

RUNS = [*sorted(path.parent for path in (ROOT / "training" / "experiments").rglob(RECORD)), *SHIPPED.values()]
ROWS = [
    {"step": 10, "train_loss": 3.0, "epoch": 0.5, "images_per_second": 40.0},
    {"step": 20, "train_loss": 2.0, "epoch": 1.0, "images_per_second": 80.0},
    {"step": 20, "eval_loss": 2.5, "eval_loss_wrong_photo": 2.75, "grounding_gap": 0.25, "grounding_gap_stderr": 0.01},
    {"step": 30, "train_loss": 1.0, "epoch": 1.5, "images_per_second": 80.0},
    {"step": 30, "eval_loss": 2.6, "eval_loss_wrong_photo": 2.7, "grounding_gap": 0.1, "grounding_gap_stderr": 0.01},
]


NAN_METRICS = json.dumps(ROWS[2] | {"eval_loss": float("nan")})


def damage(folder, name, value):
    """Change a field of a checkpoint's record."""
    content = yaml.safe_load((folder / RECORD).read_text())
    (folder / RECORD).write_text(yaml.safe_dump(content | {name: value}))


def evaluated(folder, **fields):
    """Change fields of a checkpoint's evaluation."""
    path = folder / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_arguments(folder, **values):
    """Change arguments in a record."""
    content = yaml.safe_load((folder / RECORD).read_text())
    damage(folder, "arguments", content["arguments"] | values)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "mini-short"
    shutil.copytree(SHIPPED["mini-short"], folder)
    return folder


def a_run(folder, init_from=None):
    """Write the files of a run."""
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
    return RunDirectory(folder, exist_ok=True)


def test_a_record_has_the_runs_before_and_no_local_path(tmp_path):
    a_run(tmp_path / "first")
    public = lineage.public_record(a_run(tmp_path / "second", tmp_path / "first" / "best"))
    assert str(tmp_path) not in yaml.safe_dump(public)
    assert public["arguments"]["init_from"] == "runs/first/best"
    assert public["arguments"]["output_dir"] == "runs/second"
    assert public["photos_seen"] == 30 * 32
    assert public["hours"] == round((10 * 32 / 40 + 20 * 32 / 80) / 3600, 2)
    (before,) = public["before"]
    assert before["arguments"]["output_dir"] == "runs/first"
    assert before["photos_seen"] == 30 * 32
    assert record.best_metrics(RunDirectory(tmp_path / "second", exist_ok=True)) == ROWS[2] | {
        "train_loss": 2.0,
        "epoch": 1.0,
    }


def test_the_command_of_a_run_has_its_number_of_processes():
    recorded = yaml.safe_load((SHIPPED["mini-long"] / RECORD).read_text())
    assert lineage.command(recorded)[-1].startswith("accelerate launch -m nanovlm_hf.training ")
    several = lineage.command(recorded | {"processes": 4})[-1]
    assert several.startswith("accelerate launch --num_processes 4 -m nanovlm_hf.training ")


def test_a_run_from_a_checkpoint_has_the_run_of_the_checkpoint_before_it(tmp_path):
    """By short name, or from a directory with its record; without a record the lineage is empty."""
    shipped = yaml.safe_load((SHIPPED["mini-long"] / RECORD).read_text())
    for number, init_from in enumerate(("mini-long", SHIPPED["mini-long"])):
        (before,) = lineage.public_record(a_run(tmp_path / str(number), init_from))["before"]
        assert before == {name: value for name, value in shipped.items() if name not in ("name", "about")}
    assert lineage.public_record(a_run(tmp_path / "other", "org/model"))["before"] == []


ONE = {"hours": 2.0, "photos_seen": 100, "device": "2 cores of AMD EPYC", "processes": 1, "before": []}
ONE |= {"arguments": {"output_dir": "runs/one"}}


def test_each_run_counts_with_its_own_device():
    two = ONE | {"hours": 3.0, "device": "1 cores of AMD EPYC", "before": [ONE]}
    three = ONE | {"device": "NVIDIA H100 80GB HBM3", "processes": 4, "before": [two]}
    taken = compute.stages(three)
    gpus = "4 x NVIDIA H100 80GB HBM3"
    assert [stage.hardware for stage in taken] == ["2 cores of AMD EPYC", "1 core of AMD EPYC", gpus]
    grams = [2 * 20 / 1000 * 480, 3 * 10 / 1000 * 480, 2 * 4 * 0.7 * 480]
    assert [stage.grams for stage in taken] == pytest.approx(grams)
    assert compute.total_grams(taken) == pytest.approx(sum(grams))
    assert compute.unit_hours(taken) == {"core-hours of AMD EPYC": 7.0, "GPU-hours of NVIDIA H100 80GB HBM3": 8.0}
    statement = compute.compute_statement(taken)
    assert (
        "In total: 7.00 core-hours of AMD EPYC and 8.00 GPU-hours of NVIDIA H100 80GB HBM3 and 300 images" in statement
    )
    assert "10 W per core, 700 W per NVIDIA H100 80GB HBM3 and the world average of 480 g" in statement
    # Processes of one machine share its cores.
    assert compute.stages(ONE | {"processes": 2})[0].grams == pytest.approx(grams[0])


@pytest.mark.parametrize("device", ["a|b\n# title", "2 cores of <script>", "`x`", f"{'9' * 5000} cores of x", "[a](b)"])
def test_a_device_is_a_cell_of_the_table(device):
    statement = compute.compute_statement(compute.stages(ONE | {"device": device}))
    (row,) = [line for line in statement.splitlines() if line.startswith("| `runs/one`")]
    assert row.count("|") == 6
    assert not set("<[") & set(statement)


def test_an_unknown_device_has_no_estimate():
    taken = compute.stages(ONE | {"device": "something new", "before": [ONE]})
    assert compute.total_grams(taken) is None
    assert compute.emissions(taken) is None
    statement = compute.compute_statement(taken)
    assert "| `runs/one` | 100 | 2.00 | something new | unknown |" in statement
    assert "CO2 is estimated" not in statement


@pytest.mark.parametrize("folder", SHIPPED.values(), ids=SHIPPED.keys())
def test_the_cards_of_the_released_checkpoints_state_the_compute_of_each_run(folder):
    """The card and its metadata are compared with the records alone."""
    runs: dict[str, dict] = {}

    def walk(record):
        for before in record["before"]:
            walk(before)
        known = runs.setdefault(record["arguments"]["output_dir"], record)
        assert known["hours"] == record["hours"]

    walk(yaml.safe_load((folder / RECORD).read_text()))
    text = (folder / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `runs/")]
    assert [row[0].strip("`") for row in rows] == list(runs)
    core_hours, grams, hours = 0.0, 0.0, {}
    for (_, images, clock, hardware, co2), one in zip(rows, runs.values(), strict=True):
        cores, processor = re.fullmatch(r"(\d+) cores? of (.*)", one["device"]).groups()
        assert hardware == f"{cores} {'core' if cores == '1' else 'cores'} of {processor}"
        assert images == f"{one['photos_seen']:,}"
        assert float(clock) == one["hours"]
        assert float(co2) == pytest.approx(one["hours"] * int(cores) * 10 * 0.48, abs=0.051)
        core_hours += int(cores) * one["hours"]
        grams += one["hours"] * int(cores) * 10 * 0.48
        hours[hardware] = hours.get(hardware, 0) + one["hours"]
    images = sum(one["photos_seen"] for one in runs.values())
    assert f"In total: {core_hours:.2f} core-hours of AMD EPYC and {images:,} images" in text
    assert f"CO2 is estimated, not measured: about {grams:.0f} g" in text
    metadata = ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data.co2_eq_emissions
    assert metadata["emissions"] == pytest.approx(grams, abs=0.051)
    for hardware, value in hours.items():
        assert f"{hardware} ({value:.2f} hours)" in metadata["hardware_used"]
    assert hours


@pytest.mark.parametrize(
    ("init_from", "recorded"),
    [
        ("mini-short", "mini-short"),
        ("checkpoints/base-short", "base-short"),
        (SHIPPED["mini-long"], "mini-long"),
        ("org/model", "org/model"),
        ("models/mine", "models/mine"),
        ("/home/somebody/models/mine", "mine"),
        ("../models/mine", "mine"),
        ("/home/somebody/try/best", "runs/try/best"),
        ("runs/try/last", "runs/try/last"),
    ],
)
def test_a_record_names_a_checkpoint_without_local_paths(tmp_path, monkeypatch, init_from, recorded):
    monkeypatch.chdir(ROOT)
    public = lineage.public_record(a_run(tmp_path / "run", init_from))
    assert public["arguments"]["init_from"] == recorded
    assert f"--init_from {recorded}" in lineage.command(public)[-1]


def metadata_of(folder):
    model_card.write_card(folder)
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data


OTHER_DATA = {"train": {"photos": 40, "sha256": "a" * 16}, "validation": {"photos": 4, "sha256": "b" * 16}}


@pytest.mark.parametrize(
    ("dataset", "named"),
    [("my_cats", None), ("org/cats", ["org/cats"]), ("/home/me/cats", None), ("../cats", None), ("here/cats", None)],
)
def test_the_card_names_a_dataset_that_others_can_know(checkpoint, tmp_path, monkeypatch, dataset, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "cats").mkdir(parents=True)
    assert metadata_of(checkpoint).datasets == ["ShortDesc"], "by the hashes of its splits"
    damage(checkpoint, "data", OTHER_DATA)
    change_arguments(checkpoint, dataset=dataset)
    assert metadata_of(checkpoint).datasets == named


def test_the_hub_id_of_a_dataset_is_taken_from_the_run(tmp_path):
    """The checkpoint's own record has only the last part of the name."""
    run = a_run(tmp_path / "run")
    change_arguments(run.path, dataset="org/cats")
    damage(run.path, "data", OTHER_DATA)
    best = shutil.copytree(SHIPPED["mini-short"], run.path / "best")
    damage(best, "data", OTHER_DATA)
    assert metadata_of(best).datasets == ["org/cats"]


@pytest.mark.parametrize(
    ("init_from", "base_model"),
    [
        ("mini-long", "mini-long"),
        ("org/model", "org/model"),
        (None, None),
        ("runs/last", None),
        ("runs/try/best", None),
        ("mine", None),
        ("here/model", None),
    ],
)
def test_the_card_names_the_base_model(checkpoint, tmp_path, monkeypatch, init_from, base_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert metadata_of(checkpoint).base_model is None
    change_arguments(checkpoint, init_from=init_from)
    assert metadata_of(checkpoint).base_model == base_model
    earlier = yaml.safe_load((checkpoint / RECORD).read_text())
    change_arguments(checkpoint, init_from="runs/first/best")
    damage(checkpoint, "before", [{name: value for name, value in earlier.items() if name not in ("name", "about")}])
    assert metadata_of(checkpoint).base_model == base_model, "of the run before"


@pytest.mark.parametrize(
    ("texts", "teacher", "init_from"),
    [
        (["short"], [], None),
        (["short", "long", "captions"], ["efficientnet-lite0"], "mini-short"),
        (["short", "stories.txt"], ["mini-short", "org/dinov2"], "model"),
        (["short", "/a/my stories.txt", "/b/my stories.txt"], ["/models/vit"], "org/model"),
    ],
)
def test_names_are_not_paths_in_the_folder_of_a_run(tmp_path, monkeypatch, texts, teacher, init_from):
    monkeypatch.chdir(a_run(tmp_path / "old").path)
    run = a_run(tmp_path / "new", init_from)
    change_arguments(
        run.path, texts=texts, text_weights=[1.0] * len(texts), teacher=teacher, dataset=".", tokenizer="."
    )
    public = lineage.public_record(run)
    names = [*public["arguments"]["texts"], *public["arguments"]["teacher"], public["arguments"]["init_from"] or ""]
    assert not any(name.startswith("runs/") for name in names)
    assert public["arguments"]["dataset"] == "old"
    lineage.check_lineage(run.description(), run)
    given = train_arguments.read_arguments(shlex.split(lineage.command(public)[-1])[4:])
    assert given.texts == public["arguments"]["texts"]
    assert [path.name for path in (run.path, tmp_path / "old")] == ["new", RunDirectory(".", exist_ok=True).name]


def test_a_run_that_was_initialised_from_itself_is_refused(tmp_path):
    a_run(tmp_path / "one", tmp_path / "two" / "best")
    with pytest.raises(InputError, match=r"initialised from itself: correct init_from"):
        lineage.public_record(a_run(tmp_path / "two", tmp_path / "one" / "best"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher", 5),
        ("tokenizer", 5),
        ("texts", [1]),
        ("per_device_train_batch_size", 10**400),
        ("gradient_accumulation_steps", 0),
        ("patch_dropout", "0.5"),
        ("muon_learning_rate", "high"),
        ("seed", -1),
        ("grow_from", "a\0b"),
        ("output_dir", ""),
    ],
)
def test_a_damaged_argument_of_a_record_is_named_with_its_file(tmp_path, name, value):
    run = a_run(tmp_path / "run").path
    change_arguments(run, **{name: value})
    with pytest.raises(InputError, match=name) as caught:
        compare.record_of(run)
    assert str(caught.value).startswith(f"{run / RECORD}: ")
    assert "configs" not in str(caught.value)


@pytest.mark.parametrize("commit", ["abc\nrm -rf ~ #", "deadbeef; reboot", "HEAD", "$(reboot)", 5])
def test_a_commit_is_hexadecimal(tmp_path, commit):
    run = a_run(tmp_path / "run").path
    damage(run, "git_commit", commit)
    with pytest.raises(InputError, match="git_commit"):
        compare.commands([run])


@pytest.mark.parametrize("value", ["a b", "a\nrm -rf ~ #", "$(reboot)", "`reboot`", "a;reboot", "'", "a\u202eb"])
@pytest.mark.parametrize("name", ["grow_from", "output_dir", "texts", "average_of"])
def test_a_command_quotes_its_values(tmp_path, name, value):
    run = a_run(tmp_path / "run").path
    record = yaml.safe_load((run / RECORD).read_text())
    if name == "average_of":
        record |= {"average_of": [value, "two"]}
    elif name == "texts":
        record["arguments"] |= {"texts": ["short", f"{value}.txt"], "text_weights": [1.0, 1.0]}
    else:
        record["arguments"] |= {name: value}
    *_, line = lineage.command(record)
    assert len(line.splitlines()) == 1
    assert any(word.startswith(printable(value)) for word in shlex.split(line))


def test_the_card_states_the_precision_that_was_used(checkpoint):
    path = checkpoint / RECORD
    content = yaml.safe_load(path.read_text())
    content["arguments"]["mixed_precision"] = "auto"
    for used, stated in (("bf16", "bf16 autocast"), ("no", "float32")):
        path.write_text(yaml.safe_dump(content | {"mixed_precision": used}))
        text = model_card.card(checkpoint)
        assert f"cosine schedule, {stated}." in text
        assert "--mixed_precision" not in text


def test_the_command_is_the_config_and_the_arguments_that_differ():
    kept = yaml.safe_load((ROOT / "training" / "experiments" / "mini_short" / RECORD).read_text())
    kept["arguments"].pop("muon_learning_rate", None)  # as in the record of a run that is older than the argument

    def launch(**fields):
        commit, line = lineage.command(kept | {"arguments": kept["arguments"] | fields})
        assert commit == f"# at commit {kept['git_commit']}"
        return line

    usual = "accelerate launch -m nanovlm_hf.training --config mini_short"
    two = {"texts": ["short", "captions"], "text_weights": [1.0, 1.0]}
    assert launch(num_train_epochs=7.0, **two).startswith(usual)
    assert "--num_train_epochs 7.0" in launch(num_train_epochs=7.0)
    assert "--texts short captions" in launch(**two)
    assert "--optimizer adamw" in launch()
    assert "muon_learning_rate" not in launch()
    assert "--optimizer" not in launch(muon_learning_rate=3e-3), "which the configuration sets"
    assert "--muon_learning_rate 0.001" in launch(muon_learning_rate=1e-3)
    assert "muon_learning_rate" not in launch(muon_learning_rate=3e-3)
    own = launch(output_dir="runs/mine")
    assert own.startswith("accelerate launch -m nanovlm_hf.training --dataset data --output_dir runs/mine")
    assert "--variant" not in own
    long = launch(output_dir="runs/mine", variant="long", texts=["long"])
    assert "--variant long" in long
    assert "--texts" not in long


def a_report(folder, name="mini-short", written_from=None):
    """Write a report of `nanovlm evaluate` on three items; the second names most unseen objects."""
    evaluation = json.loads((SHIPPED["mini-short"] / "evaluation.json").read_text())
    measured = evaluation["in_domain"]
    unseen = [["hat"], ["hat", "ball", "car"], []]
    measured["mentions"]["rows"] = [{"unseen": things} for things in unseen]
    measured["originality"]["rows"] = []
    settings = {"dataset": "data", "variant": "short", "prefix_words": None, "written_from": written_from}
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


@pytest.mark.slow
def test_the_card_contains_an_evaluation(checkpoint, tmp_path):
    command = [sys.executable, "-m", "nanovlm_hf.hub.model_card", checkpoint, "--report", a_report(tmp_path / "report")]
    subprocess.run(command, check=True)
    text = (checkpoint / "README.md").read_text()
    assert "Completions of 3 test images" in text
    assert r"| 0 | A dog | says \| 0. | sees 0. |" in text
    failures = text.split("| image | prefix | completion | unseen objects | rest of the description |\n")[1]
    assert failures.splitlines()[1] == r"| 1 | A dog | says \| 1. | hat, ball, car | sees 1. |"


def test_the_best_model_of_a_run_has_its_name_in_a_report(checkpoint, tmp_path):
    best = tmp_path / "mine" / "best"
    best.parent.mkdir()
    checkpoint.rename(best)
    model_card.add_evaluation(best, a_report(tmp_path / "report", name="mine-best"))
    model_card.write_card(best)
    assert "Completions of 3 test images" in (best / "README.md").read_text()


def test_metrics_that_a_dataset_cannot_have_are_left_out(checkpoint):
    """Object precision needs human captions, and retrieval among 32 as many images."""
    evaluation = json.loads((checkpoint / "evaluation.json").read_text())
    evaluation["in_domain"]["mentions"]["precision"] |= {"mean": None}
    del evaluation["grounding"]["retrieval"]["32"]
    (checkpoint / "evaluation.json").write_text(json.dumps(evaluation))
    model_card.write_card(checkpoint)
    card = hub_card(checkpoint, "you/model")
    assert "object_precision" not in card
    assert "R@1" not in card
    assert "rouge1_nearest" in card
    assert "| object precision: objects added by the completion that a human caption names (cf. CHAIR) | - |" in card
    assert "own description" not in card


@pytest.mark.parametrize(
    ("written_from", "stated", "dataset"),
    [
        (None, "on\n953 validation images, with", "320 validation images of the evaluation, see the card"),
        (
            "image",
            "only images count whose descriptions were written from the image.",
            "320 validation images whose descriptions were written from the image, see the card",
        ),
    ],
)
def test_the_card_tells_the_images_of_training_and_evaluation_apart(
    checkpoint, tmp_path, written_from, stated, dataset
):
    model_card.add_evaluation(checkpoint, a_report(tmp_path / "report", written_from=written_from))
    assert json.loads((checkpoint / "evaluation.json").read_text())["written_from"] == written_from
    model_card.write_card(checkpoint)
    text = (checkpoint / "README.md").read_text()
    assert stated in text
    assert ("images count whose" in text) == (written_from is not None)
    results = {
        result.metric_type: (result.dataset_name, result.dataset_split)
        for result in ModelCard.load(checkpoint / "README.md", ignore_metadata_errors=False).data.eval_results
    }
    assert results["grounding_gap"] == ("validation images of the training, see the card", "validation")
    assert results["r_at_1_of_32"] == (dataset, "validation")
    assert results["object_precision"][1] == "test"


def test_a_card_without_an_evaluation(checkpoint):
    (checkpoint / "evaluation.json").unlink()
    text = model_card.card(checkpoint)
    assert "nanovlm evaluate" not in text
    assert "Example completions" not in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / RECORD).write_text("[]"), "training_args.yaml: "),
        (lambda folder: (folder / RECORD).write_text("name: x"), "training_args.yaml: arguments: Field required"),
        (lambda folder: (folder / RECORD).write_text("a: ["), "cannot be read as YAML"),
        (lambda folder: damage(folder, "hours", float("nan")), "training_args.yaml: hours: "),
        (lambda folder: damage(folder, "device", 3), "training_args.yaml: device: "),
        (lambda folder: damage(folder, "before", [{}]), "training_args.yaml: before.0.arguments: Field required"),
        (
            lambda folder: (folder / "metrics.json").write_text('{"eval_loss": 1}'),
            "metrics.json: eval_loss_wrong_photo is missing or is not a number",
        ),
        (
            lambda folder: (folder / "metrics.json").write_text(NAN_METRICS),
            "metrics.json contains a number that is NaN",
        ),
        (lambda folder: (folder / RECORD).unlink(), "there is no training_args.yaml or metrics.json"),
        (
            lambda folder: (folder / "metrics.json").write_text("{}"),
            "metrics.json: eval_loss is missing or is not a number",
        ),
        (lambda folder: (folder / "metrics.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "evaluation.json").write_text("{}"), "evaluation.json: "),
        (lambda folder: evaluated(folder, written_from="me"), "written_from: choose captions or image"),
        (lambda folder: evaluated(folder, items=None), "evaluation.json: items is missing"),
    ],
)
def test_an_incomplete_checkpoint_has_no_card(checkpoint, change, problem):
    change(checkpoint)
    with pytest.raises(InputError, match=problem):
        model_card.card(checkpoint)


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", '{"settings": {}, "models": {"mini-short": {}}, "grounding": {"mini-short": {}}}']
)
def test_a_damaged_report_is_rejected(checkpoint, tmp_path, content):
    report = a_report(tmp_path / "report")
    (report / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"results\.json: "):
        model_card.add_evaluation(checkpoint, report)


def test_a_report_of_another_model_is_rejected(checkpoint, tmp_path):
    with pytest.raises(InputError, match="has no model mini-short"):
        model_card.add_evaluation(checkpoint, a_report(tmp_path / "report", name="other"))


def test_completions_of_another_evaluation_are_rejected(checkpoint, tmp_path):
    report = a_report(tmp_path / "report")
    completions = report / "completions" / "mini-short.jsonl"
    completions.write_text("".join(completions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"mini-short\.jsonl: 2 completions, but .*: evaluate mini-short again"):
        model_card.add_evaluation(checkpoint, report)


def test_runs_are_kept_and_compared(tmp_path):
    folder = compare.keep(a_run(tmp_path / "try").path, tmp_path / "kept")
    assert {path.name for path in folder.iterdir()} == {RECORD, "metrics.jsonl"}
    assert compare.row(folder) == compare.row(tmp_path / "try")
    assert compare.table([folder]).splitlines()[2] == ("| `try` | 960 | 0.0 | 2.500 | 2.750 | 0.250 ± 0.010 | 2.000 |")
    with pytest.raises(InputError, match="not a run"):
        compare.keep(tmp_path, tmp_path / "kept")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (RECORD, "a: [", "cannot be read as YAML"),
        (RECORD, "just words", "training_args.yaml: "),
        (RECORD, "arguments: {}", "training_args.yaml: arguments.dataset: Field required"),
        ("metrics.jsonl", "", "there is no evaluation in it"),
        ("metrics.jsonl", '{"step": 1, "eval_loss": NaN}\n', "metrics.jsonl: step 1: eval_loss: "),
        ("metrics.jsonl", '{"step": 1, "eval_loss": 2.0}\n', "eval_loss_wrong_photo: Field required"),
    ],
)
def test_damaged_runs_are_not_compared(tmp_path, name, content, problem):
    run = a_run(tmp_path / "try").path
    (run / name).write_text(content)
    with pytest.raises(InputError, match=problem) as caught:
        compare.keep(run, tmp_path / "kept")
    assert str(caught.value).startswith(str(run))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "kept").exists()


def test_runs_are_kept_under_their_own_names(tmp_path, monkeypatch):
    one, two = (a_run(tmp_path / parent / "run").path for parent in "ab")
    monkeypatch.chdir(one)
    assert compare.keep(Path("."), Path("../exp")) == Path("../exp/run")
    compare.check_names([one, tmp_path / "other"])
    for other in (two, Path("."), one / ".." / "run"):
        with pytest.raises(UsageError, match="have the same name"):
            compare.check_names([one, other])
    with pytest.raises(UsageError, match="holds a run, which would be overwritten"):
        compare.keep(one, two.parent)
    before = (two / RECORD).read_bytes()
    assert compare.keep(two, two.parent).resolve() == two
    assert (two / RECORD).read_bytes() == before


@pytest.mark.parametrize("name", ["none/x.webp", "out.xyz", "out", "folder.png", "fifo.png", "out.pgf"])
def test_a_gallery_that_cannot_be_written_is_refused_before_the_models_run(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    monkeypatch.setattr(gallery, "gallery", lambda: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gallery", str(tmp_path / name)])
    with pytest.raises(SystemExit) as stop:
        gallery.main()
    errors = capsys.readouterr().err
    assert (stop.value.code, errors.count("\n")) == (2 if name.startswith("out") else 1, 1)
    assert str(tmp_path / name) in errors


@pytest.mark.parametrize("folder", RUNS, ids=lambda path: path.name)
def test_the_table_of_experiments_is_what_was_measured(folder):
    text = (ROOT / "training" / "EXPERIMENTS.md").read_text()
    assert f"| {' | '.join(compare.row(folder))} |" in text
    assert compare.commands([folder]) in text
    assert "/root" not in (folder / RECORD).read_text()


def test_a_card_with_many_beginnings_is_read_in_linear_time(tmp_path):
    front = "---\nlicense: mit\nconfigs: []\n---\n"
    (tmp_path / "README.md").write_text(front + "<!-- about -->\n" * 30_000)
    begin = time.process_time()
    assert read_card(tmp_path).about == ""
    assert time.process_time() - begin < 1
    (tmp_path / "README.md").write_text(f"{front}<!-- about -->\na\n<!-- about -->\nb\n<!-- end of about -->\n")
    assert read_card(tmp_path).about == "a\n<!-- about -->\nb"

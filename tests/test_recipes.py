"""The recipes: every stage has valid fields and starts from an earlier one. `accelerate` only reads the fields here."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nanovlm_hf.training.arguments import read_arguments
from nanovlm_hf.training.initial_model import model_config

RECIPES = Path(__file__).parents[1] / "training/recipes"
ACCELERATE = """#!{python}
import json, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def follow(tmp_path):
    """Runs a recipe and returns the fields of its stages by name."""
    launcher = tmp_path / "bin/accelerate"
    launcher.parent.mkdir()
    log = tmp_path / "log.jsonl"
    launcher.write_text(ACCELERATE.format(python=sys.executable, log=str(log)))
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "data").mkdir()
    (tmp_path / "stories.txt").write_text("A dog runs.\n")

    def call(name, *arguments):
        log.unlink(missing_ok=True)
        subprocess.run(
            ["bash", RECIPES / f"{name}.sh", "data", "out", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{launcher.parent}:{os.environ['PATH']}"},
            check=True,
            capture_output=True,
        )
        stages = {}
        for line in log.read_text().splitlines():
            command = json.loads(line)
            assert command[0] == "launch"
            script = next(index for index, one in enumerate(command) if one.endswith("train.py"))
            assert Path(command[script]).samefile(RECIPES.parent / "train.py")
            fields = read_arguments(command[script + 1 :])
            assert fields.resume == "auto"
            if fields.init_from:
                assert Path(fields.init_from).parent.name in stages, "it starts from a stage that comes before it"
            assert Path(fields.output_dir).parent == Path("out")
            stages[Path(fields.output_dir).name] = fields
        return stages

    return call


@pytest.fixture
def check_variants():
    """Checks the last stages of a recipe, which fine-tune on each variant."""

    def check(stages, preset):
        short, long = (stages[f"{preset}_{variant}"] for variant in ("short", "long"))
        assert {short.init_from, long.init_from} == {f"out/{preset}_texts/last"}
        assert (short.texts, long.texts) == (["short"], ["long"])
        assert {fields.preset for fields in stages.values()} == {preset}

    return check


def test_mini_starts_from_random_weights(follow, check_variants):
    stages = follow("mini", "stories.txt")
    assert list(stages) == ["mini_vision", "mini_decoder", "mini_texts", "mini_short", "mini_long"]
    vision, decoder, texts, *_ = stages.values()
    assert vision.teacher
    assert vision.init_from is vision.grow_from is None
    assert not any(vision.weights_of_images)
    assert (decoder.image_dropout, decoder.texts[-1]) == (1, "stories.txt")
    assert Path(decoder.init_from) == Path("out/mini_vision/last")
    assert Path(texts.init_from) == Path("out/mini_decoder/last")
    check_variants(stages, "mini")


def test_without_text_files_the_captions_follow_the_encoder(follow):
    stages = follow("mini")
    assert list(stages) == ["mini_vision", "mini_texts", "mini_short", "mini_long"]
    assert Path(stages["mini_texts"].init_from) == Path("out/mini_vision/last")


def test_the_speedrun_is_a_short_way_to_mini_short(follow):
    stages = follow("speedrun")
    assert list(stages) == ["mini_vision", "mini_texts", "mini_short"]
    assert stages["mini_texts"].init_from == "out/mini_vision/last"
    assert stages["mini_short"].init_from == "out/mini_texts/last"


@pytest.mark.parametrize(("preset", "smaller"), [("base", "mini-short"), ("large", "out/base_short/best")])
def test_a_larger_model_grows_from_a_smaller_one(follow, check_variants, preset, smaller):
    stages = follow(preset, smaller)
    assert list(stages) == [f"{preset}_texts", f"{preset}_short", f"{preset}_long"]
    assert stages[f"{preset}_texts"].grow_from == smaller
    check_variants(stages, preset)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mini", []),
        ("mini", ["data"]),
        ("mini", ["nothing", "out"]),
        ("mini", ["data", "out", "nothing.txt"]),
        ("speedrun", ["data", "out", "stories.txt"]),
        ("base", ["data", "out"]),
        ("base", ["nothing", "out", "mini-short"]),
        ("large", ["data", "out", "base-short", "stories.txt"]),
        ("ablations", ["data", "out"]),
        ("ablations", ["data", "out", "nothing.txt"]),
    ],
)
def test_wrong_use_is_one_line(tmp_path, name, arguments):
    (tmp_path / "data").mkdir()
    done = subprocess.run(["bash", RECIPES / f"{name}.sh", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "usage" in done.stderr or "no such file or folder" in done.stderr


def test_each_ablation_differs_in_one_respect(follow):
    stages = follow("ablations", "stories.txt")
    assert stages.pop("vision").teacher
    assert stages.pop("decoder").image_dropout == 1
    assert {(fields.max_steps, fields.patch_dropout, tuple(fields.texts)) for fields in stages.values()} == {
        (400, 0.5, ("short", "long", "captions"))
    }
    assert [name for name, fields in stages.items() if fields.init_from is None] == [
        *("scratch", "encoder_50", "encoder_60", "encoder_70")
    ]
    assert {stages[f"images_{number}"].train_samples for number in (1000, 3000, 9000)} == {1000, 3000, 9000}
    mini = model_config(stages["scratch"], vocab_size=5120).parameter_counts()
    for name, share in (("scratch", 0.8), ("encoder_70", 0.7), ("encoder_60", 0.6), ("encoder_50", 0.5)):
        counts = model_config(stages[name], vocab_size=5120).parameter_counts()
        assert counts["total"] == pytest.approx(mini["total"], rel=0.01)
        assert counts["encoder"] / (counts["encoder"] + counts["decoder"]) == pytest.approx(share, abs=0.015)

"""The recipes: every stage has valid fields and starts from an earlier one. `accelerate` only reads the fields here."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nanovlm_hf.training.arguments import read_arguments

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

    def call(name, *texts):
        log.unlink(missing_ok=True)
        subprocess.run(
            ["bash", RECIPES / f"{name}.sh", "data", "out", *texts],
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
            for start in filter(None, (fields.init_from, fields.grow_from)):
                assert Path(start).parent.name in stages, "it starts from a stage that comes before it"
            assert Path(fields.output_dir).parent == Path("out")
            stages[Path(fields.output_dir).name] = fields
        return stages

    return call


@pytest.mark.parametrize("preset", ["mini", "base", "large"])
def test_a_recipe_leads_to_both_variants(follow, preset):
    stages = follow(preset, "stories.txt")
    smaller = {"mini": [], "base": ["mini_vision"], "large": ["mini_vision", "base_vision"]}[preset]
    parts = ("vision", "decoder", "texts", "short", "long")
    assert list(stages) == smaller + [f"{preset}_{part}" for part in parts]
    for name, fields in stages.items():
        assert fields.preset == name.split("_")[0]
    vision, decoder, texts, short, long = (stages[f"{preset}_{part}"] for part in parts)
    assert vision.teacher
    assert not any(vision.weights_of_images)
    assert (decoder.image_dropout, decoder.texts[-1]) == (1, "stories.txt")
    assert Path(decoder.init_from) == Path(f"out/{preset}_vision/last")
    assert Path(texts.init_from) == Path(f"out/{preset}_decoder/last")
    assert {short.init_from, long.init_from} == {f"out/{preset}_texts/last"}
    assert (short.texts, long.texts) == (["short"], ["long"])


def test_without_text_files_the_captions_follow_the_encoder(follow):
    stages = follow("mini")
    assert list(stages) == ["mini_vision", "mini_texts", "mini_short", "mini_long"]
    assert Path(stages["mini_texts"].init_from) == Path("out/mini_vision/last")


@pytest.mark.parametrize("arguments", [[], ["data"], ["nothing", "out"], ["data", "out", "nothing.txt"]])
def test_wrong_use_is_one_line(tmp_path, arguments):
    (tmp_path / "data").mkdir()
    done = subprocess.run(["bash", RECIPES / "mini.sh", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "usage" in done.stderr or "no such file or folder" in done.stderr

"""Publishing a checkpoint on a Hub of the tests' own, and loading it in fresh processes, as a stranger does."""

import json
import shutil
import subprocess
import sys

import pytest
import transformers
from conftest import only_line, picture
from huggingface_hub import ModelCard
from servers import serve
from test_push import online

from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.publish import eval_results

METRICS = json.loads((SHIPPED["mini-short"] / "metrics.json").read_text())
METRICS_OF_TRAINING = ("eval_loss", "eval_loss_wrong_photo", "grounding_gap")


@pytest.fixture
def hub(tmp_path):
    with serve("hub_server.py", tmp_path / "hub") as running:
        yield running


def push(hub, home, *options, checkpoint="mini-short", token="hf_write"):
    command = [sys.executable, "-m", "nanovlm_hf.cli", "push", checkpoint, "org/tiny", *options]
    done = subprocess.run(command, env=online(hub, home, token), capture_output=True, text=True)
    assert "hf_" not in done.stdout + done.stderr, "a token is never printed"
    assert "Traceback" not in done.stderr, done.stderr
    return done


LOAD = """
import json, sys
how, name, photo = sys.argv[1:]
if how == "without":
    sys.modules["nanovlm_hf"] = None
else:
    import nanovlm_hf
import transformers
from PIL import Image
auto_class = getattr(transformers, "AutoModelForVision2Seq", transformers.AutoModelForImageTextToText)
trust = {"trust_remote_code": True} if how == "without" else {"trust_remote_code": False}
model = auto_class.from_pretrained(name, **trust)
processor = transformers.AutoProcessor.from_pretrained(name, **trust)
inputs = processor(images=Image.open(photo), text="There is a big", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
print(json.dumps([type(model).__module__.split(".")[0], processor.batch_decode(tokens, skip_special_tokens=True)[0]]))
"""


def load(hub, home, photo, how, name="org/tiny"):
    command = [sys.executable, "-c", LOAD, how, name, str(photo)]
    done = subprocess.run(command, env=online(hub, home, token=None), cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_push_and_load_in_fresh_processes(hub, tmp_path):
    done = push(hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{hub.url}/org/tiny"]
    assert len([entry for entry in hub.entries() if "/commit/" in entry["path"]]) == 1, "one commit"
    photo = tmp_path / "photo.png"
    picture(size=(224, 224)).save(photo)
    home = tmp_path / "stranger"
    home.mkdir()
    own = load(hub, home, photo, "with", str(SHIPPED["mini-short"]))
    assert own[0] == "nanovlm_hf"
    assert load(hub, home, photo, "with") == own
    module, text = load(hub, home, photo, "without")
    assert (module, text) == ("transformers_modules", own[1])


@pytest.mark.slow
def test_a_broken_network_publishes_nothing_and_the_next_try_all(tmp_path):
    with serve("hub_server.py", tmp_path / "hub", "--drop-uploads", "1000") as hub:
        done = push(hub, tmp_path / "home")
        assert done.returncode == 1
        assert "org/tiny: the Hub cannot be reached" in done.stderr.splitlines()[-1]
        assert not any("/commit/" in entry["path"] for entry in hub.entries())
    with serve("hub_server.py", tmp_path / "again", "--drop-uploads", "1") as hub:
        done = push(hub, tmp_path / "home")
        if done.returncode:  # one version of huggingface_hub tries again by itself, the other does not
            done = push(hub, tmp_path / "home")
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_repository_of_another_model_is_left_alone(hub, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    transformers.BertConfig().save_pretrained(folder)
    script = "import sys, huggingface_hub as hub; api = hub.HfApi(); api.create_repo('org/tiny', exist_ok=True); "
    script += "api.upload_folder(repo_id='org/tiny', folder_path=sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, folder], env=online(hub, tmp_path / "home"), check=True)
    before = len([entry for entry in hub.entries() if "/commit/" in entry["path"]])
    done = push(hub, tmp_path / "home")
    assert done.returncode == 1
    assert "org/tiny: there is a model of type 'bert' already: name another repository" in done.stderr
    assert len([entry for entry in hub.entries() if "/commit/" in entry["path"]]) == before


@pytest.mark.parametrize(
    ("token", "code", "message"),
    [
        (None, 2, "no Hub token: run `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", 1, "org/tiny: the Hub does not accept the token (401)"),
        ("hf_read", 1, "org/tiny: the token may not write there (403)"),
    ],
)
def test_tokens_that_will_not_do(hub, tmp_path, token, code, message):
    done = push(hub, tmp_path / "home", token=token)
    assert done.returncode == code
    assert message in only_line(done.stderr.splitlines())


@pytest.fixture
def staged(tmp_path):
    from nanovlm_hf.publish import stage_checkpoint

    def stage(checkpoint="mini-short", code=True):
        stage_checkpoint(str(checkpoint), "org/tiny", tmp_path / "stage", code)
        return tmp_path / "stage"

    return stage


def test_the_cards_metadata_are_the_checkpoints_metrics(staged):
    folder = staged()
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license
    assert card.data.model_name == "tiny"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {result.metric_type: result.metric_value for result in eval_results(SHIPPED["mini-short"])}
    assert {name: results[name] for name in METRICS_OF_TRAINING} == {
        name: round(METRICS[name], 4) for name in METRICS_OF_TRAINING
    }
    assert card.data.datasets == ["org/ShortDesc"]
    assert 'folder = "org/tiny"' in card.text
    assert "SHIPPED" not in card.text.split("folder = ")[1].splitlines()[0]


def test_weights_go_as_they_are_and_the_package_stays_so(staged):
    before = {path.name: path.read_bytes() for path in SHIPPED["mini-short"].iterdir() if path.is_file()}
    folder = staged()
    assert (folder / "model.safetensors").read_bytes() == before["model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"].startswith("modeling_nanovlm.")
    assert {name: value for name, value in config.items() if name != "auto_map"} == json.loads(before["config.json"])
    assert len(list(folder.glob("*.py"))) == 5
    assert {path.name: path.read_bytes() for path in SHIPPED["mini-short"].iterdir() if path.is_file()} == before


def test_without_code(staged):
    folder = staged(code=False)
    assert not list(folder.glob("*.py"))
    assert not any("auto_map" in path.read_text() for path in folder.glob("*.json"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "README.md").unlink(), "there is no README.md"),
        (lambda folder: (folder / "metrics.json").unlink(), "there is no metrics.json"),
        (lambda folder: (folder / "metrics.json").write_text("{}"), "metrics.json has no eval_loss"),
        (
            lambda folder: (folder / "metrics.json").write_text(json.dumps(METRICS | {"eval_loss": 1.0})),
            "README.md does not say that eval_loss is 1.0",
        ),
    ],
)
def test_checkpoints_that_are_not_whole(run, tmp_path, change, problem):
    folder = tmp_path / "checkpoint"
    shutil.copytree(SHIPPED["mini-short"], folder)
    change(folder)
    code, _, errors = run("push", folder, "org/tiny", "--dry-run")
    assert code == 1
    assert problem in only_line(errors)


def test_dry_run_and_wrong_names(run, tmp_path):
    code, lines, _ = run("push", "mini-short", "org/tiny", "--dry-run")
    assert code == 0
    assert {line.split()[-1] for line in lines[:-1]} >= {
        "model.safetensors",
        "README.md",
        "modeling_nanovlm.py",
        "loss.png",
    }
    assert lines[-1].endswith("/org/tiny")
    for name in ("tiny", "org/ti ny", "a/b/c"):
        assert run("push", "mini-short", name, "--dry-run")[0] == 2
    assert run("push", "nothing", "org/tiny", "--dry-run")[0] == 1

"""Publishing a checkpoint on a local test Hub, and loading it in fresh processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.export.runtime import OnnxModel
from nanovlm_hf.generation_nanovlm import greedy_settings
from nanovlm_hf.hub.model_metadata import eval_results, hub_card
from nanovlm_hf.hub.staging import stage_checkpoint
from nanovlm_hf.loading import load_model

from helpers.hub_client import online, run_commands
from helpers.models import old_names, random_image, tiny_model, tiny_processor
from helpers.output import only_line
from helpers.servers import serve

METRICS = json.loads((SHIPPED["mini-short"] / "metrics.json").read_text())
METRICS_OF_TRAINING = ("eval_loss", "eval_loss_wrong_photo", "grounding_gap")


PUSH = ["push", "mini-short", "org/tiny"]


def push(hub, home, token="hf_write"):
    return run_commands(hub, home, (token, PUSH))[0]


LOAD = """
import json, sys
how, photo, name_of_class, *names = sys.argv[1:]
if how == "without":
    sys.modules["nanovlm_hf"] = None
else:
    import nanovlm_hf
import transformers
from PIL import Image
auto_class = getattr(transformers, name_of_class, transformers.AutoModelForImageTextToText)
trust = {"trust_remote_code": True} if how == "without" else {"trust_remote_code": False}
loaded = []
for name in names:
    model = auto_class.from_pretrained(name, **trust)
    processor = transformers.AutoProcessor.from_pretrained(name, **trust)
    inputs = processor(images=Image.open(photo), text="There is a big", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = processor.batch_decode(tokens, skip_special_tokens=True)[0]
    loaded.append([type(model).__module__.split(".")[0], text])
print(json.dumps(loaded))
"""


def load(hub, home, photo, how, *names, auto_class="AutoModelForVision2Seq"):
    command = [sys.executable, "-c", LOAD, how, photo, auto_class, *names]
    environment = online(hub, home, token=None)
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_push_and_load_in_fresh_processes(hub, tmp_path):
    done = push(hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{hub.url}/org/tiny"]
    assert len([entry for entry in hub.entries() if "/commit/" in entry["path"]]) == 1, "one commit"
    photo = tmp_path / "photo.png"
    random_image(size=(224, 224)).save(photo)
    home = tmp_path / "other-user"
    home.mkdir()
    own, published = load(hub, home, photo, "with", SHIPPED["mini-short"], "org/tiny")
    assert own[0] == "nanovlm_hf"
    assert published == own
    ((module, text),) = load(hub, home, photo, "without", "org/tiny")
    assert (module, text) == ("transformers_modules", own[1])


PUSH_FROM_PYTHON = """
import sys
import torch, transformers
from nanovlm_hf import NanoVLMForConditionalGeneration, NanoVLMProcessor
from nanovlm_hf.hub.code import register_code
folder, local = sys.argv[1:]
model, processor = (one.from_pretrained(folder) for one in (NanoVLMForConditionalGeneration, NanoVLMProcessor))
model.push_to_hub("org/tiny")
processor.push_to_hub("org/tiny")
model.save_pretrained(local + "/plain")
processor.save_pretrained(local + "/plain")
model.save_pretrained(local + "/saved", push_to_hub=True, repo_id="org/saved")
processor.save_pretrained(local + "/saved-processor", push_to_hub=True, repo_id="org/saved")
model.model.push_to_hub("org/base")
register_code()
settings = {"push_to_hub": True, "hub_model_id": "org/trained", "report_to": []}
arguments = transformers.TrainingArguments(local + "/trainer", **settings)
transformers.Trainer(model, arguments, processing_class=processor).push_to_hub()
"""


@pytest.mark.slow
def test_push_to_hub_and_trainer_upload_the_code(hub, tmp_path):
    folder = SHIPPED["mini-short"]
    done = subprocess.run(
        [sys.executable, "-c", PUSH_FROM_PYTHON, folder, tmp_path],
        env=online(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "plain").glob("*.py"))
    assert not any("auto_map" in path.read_text() for path in (tmp_path / "plain").glob("*.json"))
    photo = tmp_path / "photo.png"
    random_image(size=(224, 224)).save(photo)
    home = tmp_path / "other-user"
    home.mkdir()
    pushed, saved, trained = load(hub, home, photo, "without", "org/tiny", "org/saved", "org/trained")
    assert pushed[0] == "transformers_modules"
    assert saved == trained == pushed
    load_base = "import transformers; print(transformers.AutoModel.from_pretrained('org/base', trust_remote_code=True))"
    environment = online(hub, home, token=None) | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", load_base], env=environment, cwd=home, capture_output=True, text=True)
    assert done.stdout.startswith("NanoVLMModel("), done.stderr


@pytest.mark.slow
def test_the_example_of_a_card_runs_without_the_package(hub, tmp_path):
    done = push(hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    home = tmp_path / "other-user"
    home.mkdir()
    random_image(size=(224, 224)).save(home / "photo.jpg")
    fetch = "import sys, huggingface_hub as hub; print(open(hub.hf_hub_download('org/tiny', 'README.md')).read())"
    environment = online(hub, home, token=None)
    card = subprocess.run([sys.executable, "-c", fetch], env=environment, capture_output=True, text=True, check=True)
    example = card.stdout.split("```python\n")[1].split("```")[0]
    block = "import sys; sys.modules['nanovlm_hf'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", block + example], env=environment, cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("There is a big")
    assert "If its repository includes the code" not in card.stdout


@pytest.mark.slow
def test_onnx_is_pushed_beside_the_weights(hub, tmp_path):
    (done,) = run_commands(hub, tmp_path / "home", ("hf_write", [*PUSH, "--onnx"]))
    assert done.returncode == 0, done.stderr
    fetch = "import huggingface_hub as hub; print(hub.snapshot_download('org/tiny'))"
    environment = online(hub, tmp_path / "other-user", token=None)
    found = subprocess.run([sys.executable, "-c", fetch], env=environment, capture_output=True, text=True, check=True)
    folder = Path(found.stdout.splitlines()[-1])
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert {"onnx", "transformers.js"} <= set(card.data.tags)
    assert "const repo = 'org/tiny';" in card.text.split("### In JavaScript")[1].split("## Intended uses")[0]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "nanovlm_hf"
    # With the configuration of `onnx/`, as transformers.js takes it, the repository is an exported folder.
    exported = tmp_path / "exported"
    shutil.copytree(folder, exported)
    for file in ("config.json", "generation_config.json"):
        shutil.copyfile(folder / "onnx" / file, exported / file)
    image = random_image(size=(224, 224))
    model, processor = load_model("mini-short")
    inputs = processor(images=image, text="There is a big", return_tensors="pt")
    greedy = greedy_settings(model.generation_config)
    for num_beams, settings in ((None, {}), (1, greedy)):
        expected = processor.batch_decode(model.generate(**inputs, **settings), skip_special_tokens=True)[0]
        assert OnnxModel(exported).complete(image, "There is a big", num_beams=num_beams) == expected


@pytest.mark.slow
def test_a_broken_network_publishes_nothing_and_a_second_try_everything(tmp_path):
    with serve("hub_server.py", tmp_path / "hub", "--drop-uploads", "1000") as hub:
        done = push(hub, tmp_path / "home")
        assert done.returncode == 1
        assert "org/tiny: the Hub cannot be reached" in done.stderr.splitlines()[-1]
        assert not any("/commit/" in entry["path"] for entry in hub.entries())
    with serve("hub_server.py", tmp_path / "again", "--drop-uploads", "1") as hub:
        done = push(hub, tmp_path / "home")
        if done.returncode:  # only one of the supported versions of huggingface_hub retries by itself
            done = push(hub, tmp_path / "home")
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_repository_of_another_model_is_unchanged(hub, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    transformers.BertConfig().save_pretrained(folder)
    script = "import sys, huggingface_hub as hub; api = hub.HfApi(); api.create_repo('org/tiny', exist_ok=True); "
    script += "api.upload_folder(repo_id='org/tiny', folder_path=sys.argv[1])"
    command = [sys.executable, "-c", script, folder]
    subprocess.run(command, env=online(hub, tmp_path / "home"), check=True, timeout=600)
    before = len([entry for entry in hub.entries() if "/commit/" in entry["path"]])
    done = push(hub, tmp_path / "home")
    assert done.returncode == 1
    assert "org/tiny: it already holds a model of type 'bert': choose another repository" in done.stderr
    assert len([entry for entry in hub.entries() if "/commit/" in entry["path"]]) == before


UPLOAD = """
import sys, huggingface_hub as hub
repo, kind, folder = sys.argv[1:]
api = hub.HfApi()
api.create_repo(repo, repo_type=kind, exist_ok=True, **({"space_sdk": "static"} if kind == "space" else {}))
api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder)
"""


def upload(hub, home, repo, kind, folder, files):
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    subprocess.run([sys.executable, "-c", UPLOAD, repo, kind, folder], env=online(hub, home), check=True, timeout=600)


def commits(hub):
    return len([entry for entry in hub.entries() if "/commit/" in entry["path"]])


@pytest.mark.slow
def test_other_contents_of_a_repository_are_kept(hub, tmp_path):
    home = tmp_path / "home"
    upload(hub, home, "org/lora", "model", tmp_path / "lora", ["adapter_config.json", "adapter_model.safetensors"])
    upload(hub, home, "org/app", "space", tmp_path / "app", ["index.html"])
    before = commits(hub)
    lora, app, first, private = run_commands(
        hub,
        home,
        ("hf_write", ["push", "mini-short", "org/lora"]),
        ("hf_write", ["demo", "--push", "org/app"]),
        ("hf_write", PUSH),
        ("hf_write", [*PUSH, "--private"]),
    )
    assert only_line(lora.stderr.splitlines()).startswith(
        "nanovlm: org/lora: it holds adapter_config.json and no model"
    )
    assert "org/app: it already holds another app (index.html)" in app.stderr
    assert first.returncode == 0, first.stderr
    assert "org/tiny: it exists and is public: make it private" in only_line(private.stderr.splitlines())
    assert [one.returncode for one in (lora, app, private)] == [1, 1, 1]
    assert commits(hub) == before + 1
    upload(hub, home, "org/tiny", "model", tmp_path / "more", ["old.safetensors", "extra/weights.safetensors"])
    (again,) = run_commands(hub, home, ("hf_write", PUSH))
    assert again.returncode == 0, again.stderr
    listing = "import huggingface_hub as hub; print(*hub.HfApi().list_repo_files('org/tiny'))"
    environment = online(hub, home, token=None)
    done = subprocess.run([sys.executable, "-c", listing], env=environment, capture_output=True, text=True, check=True)
    assert "extra/weights.safetensors" in done.stdout.split()
    assert "old.safetensors" not in done.stdout.split()


@pytest.mark.slow
def test_refused_tokens_and_one_that_the_server_repeats(hub, tmp_path):
    """Tokens of the environment, and then one of a file, as `hf auth login` writes it."""
    echo = "echo-0123456789"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(echo)
    wrong, reader, *echoes = run_commands(
        hub, tmp_path / "home", *((token, PUSH) for token in ("hf_wrong", "hf_read", echo, None))
    )
    assert "org/tiny: the Hub does not accept the token (401)" in only_line(wrong.stderr.splitlines())
    assert "org/tiny: the token is not allowed to write there (403)" in only_line(reader.stderr.splitlines())
    for done in echoes:
        assert "org/tiny: the Hub refuses it (" in only_line(done.stderr.splitlines())
        assert echo not in done.stdout + done.stderr
    assert {done.returncode for done in (wrong, reader, *echoes)} == {1}


REFUSE = r"""
import sys, huggingface_hub as hub
from nanovlm_hf import InputError
from nanovlm_hf.hub.auth import hub_errors
from nanovlm_hf.hub.models import _check_same_model_type
contents = [b"{", b"[]", b"", b"\xff", b"5", b'{"a": "' + b"a" * 2_000_000 + b'"}', b'{"model_type": ["bert"]}', b"{}"]
api = hub.HfApi()
for number, content in enumerate(contents):
    api.create_repo(f"org/tiny{number}")
    api.upload_file(path_or_fileobj=content, path_in_repo="config.json", repo_id=f"org/tiny{number}")
    try:
        with hub_errors(f"org/tiny{number}"):
            _check_same_model_type(api, f"org/tiny{number}", ["config.json"])
        print("accepted")
    except InputError as error:
        print(len(str(error).splitlines()), error)
"""


@pytest.mark.slow
def test_a_repository_with_an_invalid_config_is_unchanged(hub, tmp_path):
    command, environment = [sys.executable, "-c", REFUSE], online(hub, tmp_path / "home")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert len(lines) == 8, done.stderr
    for number, line in enumerate(lines):
        problem = "it already holds a model of type" if number > 5 else "its config.json is not that of a model"
        assert line.startswith(f"1 org/tiny{number}: {problem}")
    assert not [entry for entry in hub.entries() if entry["method"] == "GET" and "tiny5/resolve" in entry["path"]]


def test_a_missing_token_is_a_usage_error(run, monkeypatch):
    monkeypatch.setattr("nanovlm_hf.hub.auth.get_token", lambda: None)
    code, _, errors = run("push", "mini-short", "org/tiny")
    assert code == 2
    assert only_line(errors) == "nanovlm: no Hub token: run `hf auth login`, or set HF_TOKEN"


@pytest.fixture
def staged(tmp_path):
    def stage(checkpoint="mini-short", code=True):
        stage_checkpoint(str(checkpoint), "org/tiny", tmp_path / "stage", code)
        return tmp_path / "stage"

    return stage


def test_card_metadata_state_the_metrics(staged):
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


@pytest.mark.parametrize(("base", "published"), [("mini-long", None), ("org/base", "org/base")])
def test_a_base_model_is_published_by_its_hub_id(tmp_path, base, published):
    folder = shutil.copytree(SHIPPED["mini-short"], tmp_path / "checkpoint")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("---\n", f"---\nbase_model: {base}\n", 1))
    assert ModelCard(hub_card(folder, "org/tiny")).data.base_model == published


def test_a_card_with_the_old_name_of_a_metric_is_accepted(tmp_path):
    folder = shutil.copytree(SHIPPED["mini-short"], tmp_path / "checkpoint")
    card = folder / "README.md"
    assert "type: object_precision" in card.read_text()
    card.write_text(card.read_text().replace("type: object_precision", "type: things_precision"))
    assert "org/tiny" in hub_card(folder, "org/tiny")


def test_weights_are_published_unchanged(staged):
    before = {path.name: path.read_bytes() for path in SHIPPED["mini-short"].iterdir() if path.is_file()}
    folder = staged()
    assert (folder / "model.safetensors").read_bytes() == before["model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"].startswith("modeling_nanovlm.")
    assert {name: value for name, value in config.items() if name != "auto_map"} == json.loads(before["config.json"])
    assert len(list(folder.glob("*.py"))) == 10
    assert {path.name: path.read_bytes() for path in SHIPPED["mini-short"].iterdir() if path.is_file()} == before


def test_without_code(staged):
    folder = staged(code=False)
    assert not list(folder.glob("*.py"))
    assert not any("auto_map" in path.read_text() for path in folder.glob("*.json"))


def test_an_auto_map_of_other_code_is_not_published(staged, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(SHIPPED["mini-short"], checkpoint)
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((checkpoint / name).read_text()) | {"auto_map": {"AutoConfig": "other/code--config.Config"}}
        (checkpoint / name).write_text(json.dumps(fields))
    before = (checkpoint / "config.json").read_bytes()
    folder = staged(checkpoint, code=False)
    assert not any("auto_map" in path.read_text() for path in folder.glob("*.json"))
    assert (checkpoint / "config.json").read_bytes() == before
    shutil.rmtree(folder)
    folder = staged(checkpoint)
    assert not any("other/code" in path.read_text() for path in folder.glob("*.json"))
    assert "auto_map" in json.loads((folder / "config.json").read_text())


def nested(value, depth=3):
    return {"a": [nested(value, depth - 1)]} if depth else value


@pytest.mark.parametrize("code", [False, True])
def test_fields_that_name_other_code_are_removed_at_every_depth(staged, tmp_path, code):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(SHIPPED["mini-short"], checkpoint)
    evil = {"auto_map": {"AutoModel": "evil/repo--model.X"}, "custom_pipelines": {"x": {"impl": "evil.X"}}}
    evil |= {"custom_generate": "evil/repo", "trust_remote_code": True, "attn_implementation": "evil/kernel"}
    names = [path.name for path in checkpoint.glob("*.json") if path.name not in ("tokenizer.json", "metrics.json")]
    assert {"config.json", "generation_config.json", "special_tokens_map.json", "evaluation.json"} <= set(names)
    before = {}
    for name in names:
        fields = json.loads((checkpoint / name).read_text())
        before[name] = fields | {"more": nested({})}
        (checkpoint / name).write_text(json.dumps(fields | evil | {"more": nested(evil)}))
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"] |= evil
    config["text_config"] |= evil
    text = json.dumps(config)
    (checkpoint / "config.json").write_text(text)
    folder = staged(checkpoint, code=code)
    for name in names:
        published = (folder / name).read_text()
        assert "evil" not in published, name
        fields = json.loads(published)
        own = fields.pop("auto_map", {})
        assert code or own == {}
        assert fields == before[name]
    assert (checkpoint / "config.json").read_text() == text


@pytest.mark.parametrize("shards", [False, True])
def test_weights_of_version_0_1_0_are_published_under_the_current_names(staged, tmp_path, tokenizer, shards):
    checkpoint = tmp_path / "checkpoint"
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(checkpoint, max_shard_size="60KB" if shards else "5GB")
    tiny_processor(tokenizer).save_pretrained(checkpoint)
    for name in ("README.md", "metrics.json"):
        shutil.copyfile(SHIPPED["mini-short"] / name, checkpoint / name)
    current = {}
    for path in checkpoint.glob("*.safetensors"):
        weights = load_file(path)
        current |= weights
        save_file(old_names(weights), path, metadata={"format": "pt"})
    index = checkpoint / "model.safetensors.index.json"
    assert index.exists() is shards
    if shards:
        content = json.loads(index.read_text())
        index.write_text(json.dumps(content | {"weight_map": old_names(content["weight_map"])}))
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    folder = staged(checkpoint)
    published = {}
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        published |= weights
        if shards:
            names = json.loads((folder / index.name).read_text())["weight_map"]
            assert {name for name, file in names.items() if file == path.name} == weights.keys()
    assert published.keys() == current.keys()
    assert all(
        weight.equal(published[name]) and weight.dtype == published[name].dtype for name, weight in current.items()
    )
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "README.md").unlink(), "README.md is missing"),
        (lambda folder: (folder / "metrics.json").unlink(), "metrics.json is missing"),
        (
            lambda folder: (folder / "metrics.json").write_text("{}"),
            "metrics.json: eval_loss is missing or is not a number",
        ),
        (
            lambda folder: (folder / "metrics.json").write_text(json.dumps(METRICS | {"eval_loss": 1.0})),
            "README.md does not state that eval_loss is 1.0",
        ),
    ],
)
def test_incomplete_checkpoints_are_refused(run, tmp_path, change, problem):
    folder = tmp_path / "checkpoint"
    shutil.copytree(SHIPPED["mini-short"], folder)
    change(folder)
    code, _, errors = run("push", folder, "org/tiny", "--dry-run")
    assert code == 1
    assert problem in only_line(errors)


def test_dry_run_and_invalid_names(run, tmp_path):
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

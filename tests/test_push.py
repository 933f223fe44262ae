"""Publishing on a Hub of the tests' own, and loading from it in fresh processes, as a stranger does."""

import json
import os
import subprocess
import sys

import pytest
from servers import serve
from toy_data import write_sources

from nanovlm_hf.data.build import build_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    sources = write_sources(folder / "sources", photos=40)
    build_dataset(sources / "captions.json", sources / "descriptions.jsonl", sources / "images", folder / "data")
    return folder / "data"


@pytest.fixture
def hub(tmp_path):
    with serve("hub_server.py", tmp_path / "hub") as running:
        yield running


def online(hub, home, token="hf_write", **more):
    """The environment of a process that takes the test server for the Hub; hub 2.x needs xet off for plain uploads."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | more
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("HF_TOKEN", None)
    return environment | ({"HF_TOKEN": token} if token else {})


def push(hub, dataset, home, *options, token="hf_write"):
    command = [sys.executable, "-m", "nanovlm_hf.cli", "data", "push", "--dataset", dataset, "--namespace", "org"]
    done = subprocess.run([*command, *options], env=online(hub, home, token), capture_output=True, text=True)
    assert "hf_" not in done.stdout + done.stderr, "a token is never printed"
    assert "Traceback" not in done.stderr, done.stderr
    return done


LOAD = """
import json, sys
from datasets import load_dataset
name, streaming, text_only = sys.argv[1], sys.argv[2] == "streaming", sys.argv[3] == "text"
splits = load_dataset(name, streaming=streaming)
rows = [row for rows in splits.values() for row in rows]
assert text_only or all(row["image"].size == (224, 224) for row in rows)
print(json.dumps({row["image_id"]: row["description"] for row in rows}))
"""


def load(hub, name, home, how="whole", form="photos", token="hf_write"):
    command = [sys.executable, "-c", LOAD, name, how, form]
    done = subprocess.run(command, env=online(hub, home, token), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_push_and_load_in_a_fresh_process(hub, dataset, tmp_path):
    done = push(hub, dataset, tmp_path / "home", "--license", "cc-by-4.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{hub.url}/datasets/org/ShortDesc", f"{hub.url}/datasets/org/LongDesc"]
    short = load(hub, "org/ShortDesc", tmp_path / "stranger", token=None)
    assert len(short) == 40
    assert all(text.count(".") == 1 for text in short.values())
    assert load(hub, "org/ShortDesc", tmp_path / "stranger", "streaming", token=None) == short
    long = load(hub, "org/LongDesc", tmp_path / "stranger", "streaming", token=None)
    assert all(text.count(".") == 3 for text in long.values())


@pytest.mark.slow
def test_a_second_push_replaces_the_first(hub, dataset, tmp_path):
    assert push(hub, dataset, tmp_path / "home").returncode == 0
    sources = write_sources(tmp_path / "sources", photos=25)
    build_dataset(sources / "captions.json", sources / "descriptions.jsonl", None, tmp_path / "text")
    assert push(hub, tmp_path / "text", tmp_path / "home").returncode == 0
    assert len(load(hub, "org/ShortDesc", tmp_path / "stranger", form="text", token=None)) == 25


@pytest.mark.parametrize(
    ("token", "code", "message"),
    [
        (None, 2, "no Hub token: run `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", 1, "org/ShortDesc: the Hub does not accept the token (401)"),
        ("hf_read", 1, "org/ShortDesc: the token may not write there (403)"),
    ],
)
def test_tokens_that_will_not_do(hub, dataset, tmp_path, token, code, message):
    done = push(hub, dataset, tmp_path / "home", token=token)
    assert done.returncode == code
    assert done.stderr.startswith(f"nanovlm: {message}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_hub_that_is_not_there(dataset, tmp_path):
    class Nowhere:
        url = "http://127.0.0.1:9"

    done = push(Nowhere, dataset, tmp_path / "home")
    assert done.returncode == 1
    assert "org/ShortDesc: the Hub cannot be reached" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_network_that_breaks_publishes_nothing_by_halves(dataset, tmp_path):
    with serve("hub_server.py", tmp_path / "hub", "--drop-uploads", "1000") as hub:
        done = push(hub, dataset, tmp_path / "home")
        assert done.returncode == 1
        assert "the Hub cannot be reached" in done.stderr.splitlines()[-1]
        assert not any("/commit/" in entry["path"] for entry in hub.entries())


def test_to_folder_writes_what_would_be_uploaded(run, dataset, tmp_path):
    about = tmp_path / "about.md"
    about.write_text("## Rights\n\nEverybody's.")
    code, lines, _ = run("data", "push", "--dataset", dataset, "--to-folder", tmp_path / "out", "--about", about)
    assert code == 0
    assert lines == [str(tmp_path / "out" / "ShortDesc"), str(tmp_path / "out" / "LongDesc")]
    card = (tmp_path / "out" / "LongDesc" / "README.md").read_text()
    assert "# LongDesc\n" in card
    assert "Everybody's." in card
    assert "ShortDesc" not in card
    code, _, errors = run("data", "push", "--dataset", dataset, "--to-folder", tmp_path / "out")
    assert code == 1
    assert "it is there already" in errors[0]
    # What a dataset was built with, its repositories have too.
    run("data", "card", "--dataset", dataset, "--license", "mit", "--about", about)
    assert run("data", "push", "--dataset", dataset, "--to-folder", tmp_path / "again")[0] == 0
    card = (tmp_path / "again" / "ShortDesc" / "README.md").read_text()
    assert "license: mit" in card
    assert "Everybody's." in card
    code, _, errors = run("data", "push", "--dataset", tmp_path, "--to-folder", tmp_path / "out")
    assert code == 1
    assert "no finished dataset" in errors[0]
    assert run("data", "push", "--dataset", dataset)[0] == 2

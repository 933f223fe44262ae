"""Publish datasets on a local Hub server, and load them in fresh processes."""

import base64
import json
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from nanovlm_hf.data.build import build_dataset

from helpers.hub_client import online, run_commands
from helpers.output import only_line
from helpers.servers import serve
from helpers.toy_data import write_sources


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    sources = write_sources(folder / "sources", photos=40)
    build_dataset(sources / "captions.json", sources / "descriptions.jsonl", sources / "images", folder / "data")
    return folder / "data"


def pushing(dataset, *options) -> list:
    return ["data", "push", "--dataset", dataset, "--namespace", "org", *options]


def push(hub, dataset, home, *options, token="hf_write"):
    return run_commands(hub, home, (token, pushing(dataset, *options)))[0]


LOAD = """
import json, sys
from datasets import load_dataset
loaded = []
for how in sys.argv[1:]:
    name, _, streaming = how.partition("+")
    splits = load_dataset(name, streaming=bool(streaming))
    rows = [row for rows in splits.values() for row in rows]
    assert all(row["image"].size == (224, 224) for row in rows if "image" in row)
    loaded.append([{row["image_id"]: row["description"] for row in rows}, "image" in rows[0]])
print(json.dumps(loaded))
"""


def load(hub, home, *how):
    """Load datasets without a token in one process; a name that ends with `+streaming` is streamed."""
    environment = online(hub, home, token=None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *how], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_push_and_load_in_a_fresh_process(hub, dataset, tmp_path):
    done = push(hub, dataset, tmp_path / "home", "--license", "cc-by-4.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{hub.url}/datasets/org/ShortDesc", f"{hub.url}/datasets/org/LongDesc"]
    whole, streamed, long = load(
        hub, tmp_path / "stranger", "org/ShortDesc", "org/ShortDesc+streaming", "org/LongDesc+streaming"
    )
    assert len(whole[0]) == 40
    assert all(text.count(".") == 1 for text in whole[0].values())
    assert streamed == whole
    assert all(text.count(".") == 3 for text in long[0].values())
    assert whole[1]
    assert long[1]


@pytest.mark.slow
def test_a_second_push_replaces_the_first(hub, dataset, tmp_path):
    sources = write_sources(tmp_path / "sources", photos=25)
    build_dataset(sources / "captions.json", sources / "descriptions.jsonl", None, tmp_path / "text")
    commands = [("hf_write", pushing(folder)) for folder in (dataset, tmp_path / "text")]
    assert [done.returncode for done in run_commands(hub, tmp_path / "home", *commands)] == [0, 0]
    ((texts, with_images),) = load(hub, tmp_path / "stranger", "org/ShortDesc")
    assert len(texts) == 25
    assert not with_images


@pytest.mark.slow
def test_invalid_tokens(hub, dataset, tmp_path):
    expected = [
        (None, 2, "no Hub token: run `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", 1, "org/ShortDesc: the Hub does not accept the token (401)"),
        ("hf_read", 1, "org/ShortDesc: the token is not allowed to write there (403)"),
    ]
    commands = [(token, pushing(dataset)) for token, _, _ in expected]
    for done, (_, code, message) in zip(run_commands(hub, tmp_path / "home", *commands), expected, strict=True):
        assert done.returncode == code
        assert only_line(done.stderr.splitlines()).startswith(f"nanovlm: {message}")


@pytest.mark.slow
def test_an_unreachable_hub(dataset, tmp_path):
    class Nowhere:
        url = "http://127.0.0.1:9"

    done = push(Nowhere, dataset, tmp_path / "home")
    assert done.returncode == 1
    assert "org/ShortDesc: the Hub cannot be reached" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_broken_connection_publishes_nothing_partially(dataset, tmp_path):
    with serve("hub_server.py", tmp_path / "hub", "--drop-uploads", "1000") as hub:
        done = push(hub, dataset, tmp_path / "home")
        assert done.returncode == 1
        assert "the Hub cannot be reached" in done.stderr.splitlines()[-1]
        assert not any("/commit/" in entry["path"] for entry in hub.entries())


def put(hub, name, files):
    """Create a dataset repository with these files, as another program would."""
    headers = {"Authorization": "Bearer hf_write"}
    create = {"type": "dataset", "organization": "org", "name": name}
    requests.post(f"{hub.url}/api/repos/create", json=create, headers=headers).raise_for_status()
    lines = [{"key": "header", "value": {"summary": "Upload"}}]
    for path, content in files.items():
        value = {"path": path, "content": base64.b64encode(content.encode()).decode()}
        lines.append({"key": "file", "value": value})
    content = "\n".join(map(json.dumps, lines))
    url = f"{hub.url}/api/datasets/org/{name}/commit/main"
    requests.post(url, data=content, headers=headers).raise_for_status()


def commits(hub):
    return [entry["path"] for entry in hub.entries() if entry["path"].endswith("/commit/main")]


OTHERS = {"README.md": "---\nlicense: mit\ntags: [medical]\n---\n", "data.csv": "a\n1\n"}


@pytest.mark.slow
def test_a_dataset_of_another_kind_is_not_overwritten(hub, dataset, tmp_path):
    put(hub, "LongDesc", OTHERS)
    before = commits(hub)
    done = push(hub, dataset, tmp_path / "home")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("nanovlm: org/LongDesc: holds another dataset")
    assert commits(hub) == before, "the other variant is not uploaded either"


@pytest.mark.slow
def test_a_dataset_on_the_hub_is_read(hub, dataset, tmp_path):
    assert push(hub, dataset, tmp_path / "home").returncode == 0
    read = "import sys; from nanovlm_hf.data.rows import load; print(len(load(sys.argv[1], 'short', split='train')))"

    def load(name, offline):
        command, environment = (
            [sys.executable, "-c", read, name],
            online(hub, tmp_path / "home", HF_HUB_OFFLINE=offline),
        )
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    for offline in ("0", "1"):  # then from the cache
        done = load("org/ShortDesc", offline)
        assert done.stdout.strip() == "37", done.stderr
    # A card may also name a file of the machine that reads it.
    put(hub, "Foreign", {"README.md": CARD.format(tmp_path / "home" / "**"), "x.txt": "x"})
    (tmp_path / "home" / "private.txt").write_text("secret")
    done = load("org/Foreign", "0")
    assert "InputError: org/Foreign: its README.md names a file outside the dataset" in done.stderr.splitlines()[-1]


CARD = "---\nconfigs:\n- config_name: short\n  data_files:\n  - split: train\n    path: '{}/private.txt'\n---\n"


@pytest.mark.slow
def test_an_empty_repository_is_used(hub, dataset, tmp_path):
    put(hub, "ShortDesc", {".gitattributes": "*.parquet filter=lfs\n"})
    put(hub, "LongDesc", {"README.md": "---\ntags:\n- nanovlm_hf\n---\n"})
    assert push(hub, dataset, tmp_path / "home").returncode == 0


@pytest.mark.parametrize("namespace", ["a b", "a/b", "..", "", "caf\xe9", "\x1b"])
def test_an_impossible_namespace_is_wrong_usage(run, dataset, namespace):
    code, _, errors = run("data", "push", "--dataset", dataset, "--namespace", namespace)
    assert code == 2
    assert "/ShortDesc" in only_line(errors)


def test_only_files_that_the_card_names_are_published(run, dataset, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    (tmp_path / "secret.txt").write_text("secret")
    (copy / ".env").write_text("HF_TOKEN=hf_secret")
    (copy / "notes.txt").write_text("private")
    (copy / "short" / "evil.py").write_text("import os")
    (copy / "short" / "train-other.parquet").write_bytes(b"of another build")
    (copy / "long" / "link.parquet").symlink_to(tmp_path / "secret.txt")
    code, _, errors = run("data", "push", "--dataset", copy, "--to-folder", tmp_path / "out")
    assert code == 0
    assert only_line(errors) == (
        "nanovlm: not published: long/link.parquet, notes.txt, short/evil.py, short/train-other.parquet"
    )
    names = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert {name for name in names if not name.endswith(".parquet")} == {"README.md", "stats.json", "statistics.png"}
    whole = sorted(path.name for path in dataset.glob("*/*.parquet"))
    assert [name for name in names if name.endswith(".parquet")] == whole


def test_links_are_not_published(run, dataset, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    path = next((copy / "short").glob("train-*"))
    path.rename(tmp_path / path.name)
    for target in (tmp_path / path.name, copy / "kept.parquet"):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        shutil.copy(tmp_path / path.name, copy / "kept.parquet")
        code, _, errors = run("data", "push", "--dataset", copy, "--to-folder", tmp_path / "out")
        assert code == 1
        assert "leads out of this folder" in errors[-1] or "not a Parquet file of the dataset" in errors[-1]


ALIASES = f"---\np: &p [{'p, ' * 2000}]\nd: &d [{'{path: *p}, ' * 2000}]\n"
ALIASES += f"configs: [{'{data_files: *d}, ' * 2000}]\n---\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "# A card without front matter\n",
        lambda text: text.replace("---\n", "", 1),
        lambda text: "---\n",
        lambda text: "---\n- a\n- b\n---\n",
        lambda text: "---\n: [\n---\n",
        lambda text: "---\ndate: 2024-99-99\n---\n",
        lambda text: "---\n" + "[" * 5000 + "\n---\n",
        lambda text: "---\na: " + "9" * 5000 + "\n---\n",
        lambda text: "---\na: !!python/object/apply:os.system [true]\n---\n",
        lambda text: "---\n\tx\n---\n",
        lambda text: ALIASES,
        lambda text: text.replace("license: other", "license: 7"),
        lambda text: text.replace("license: other", "license: [mit]"),
        lambda text: text.replace("license: other\n", ""),
        lambda text: text.replace("configs:", "config:"),
        lambda text: text.replace("configs:", "configs: 7\nother:"),
        lambda text: text.replace("data_files:", "data_file:"),
        lambda text: text.replace("data_files:", "data_files: x\n  other:"),
        lambda text: text.replace("- split: train", "- x: &a [*a]"),
        lambda text: text.replace("path:", "paths:"),
        lambda text: text.replace("short/train-", "../short/train-"),
        lambda text: text.replace("short/train-", "/short/train-"),
        lambda text: text.replace("short/train-", "none/train-"),
        lambda text: text.replace("- short/train-", "- 7 #"),
        lambda text: text.encode("utf-16"),
    ],
)
def test_a_damaged_card_is_one_line(run, dataset, tmp_path, change):
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    text = change((copy / "README.md").read_text())
    (copy / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, errors = run("data", "push", "--dataset", copy, "--to-folder", tmp_path / "out")
    assert code == 1
    assert str(copy) in only_line(errors)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
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
    assert "already exists" in errors[0]
    # Licence and origin are taken from the dataset's card.
    run("data", "card", "--dataset", dataset, "--license", "mit", "--about", about)
    assert run("data", "push", "--dataset", dataset, "--to-folder", tmp_path / "again")[0] == 0
    card = (tmp_path / "again" / "ShortDesc" / "README.md").read_text()
    assert "license: mit" in card
    assert "Everybody's." in card
    code, _, errors = run("data", "push", "--dataset", tmp_path, "--to-folder", tmp_path / "out")
    assert code == 1
    assert "no finished dataset" in errors[0]
    assert run("data", "push", "--dataset", dataset)[0] == 2


def changed(rows, column, value):
    return rows.set_column(rows.column_names.index(column), column, pa.array([value] * len(rows)))


TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows.append_column("note", pa.array(["x"] * len(rows))), "column 'note': it is not one of"),
        (lambda rows: changed(rows, "source", f"by {TOKEN}"), "column 'source': it contains a token"),
        (lambda rows: changed(rows, "captions", ["a dog", TOKEN]), "column 'captions': it contains a token"),
        (
            lambda rows: changed(rows, "description", "see /home/alice/x"),
            "it contains the path of a home",
        ),
        (
            lambda rows: changed(rows, "coco_url", "http://me:secret@host/x.jpg"),
            "'coco_url': it contains a token",
        ),
        (lambda rows: changed(rows, "image", {"bytes": b"x", "path": "/home/alice/passport.jpg"}), "path of a home"),
        (lambda rows: changed(rows, "image", {"bytes": b"x", "path": "/data/private/a.jpg"}), "without a folder"),
        (lambda rows: changed(rows, "image", {"bytes": b"x", "path": "D:\\private\\a.jpg"}), "without a folder"),
        (
            lambda rows: changed(rows, "image", {"bytes": b"x", "path": "a.jpg", "note": "x"}),
            "it has the type",
        ),
        (lambda rows: changed(rows, "captions", [{"a": TOKEN}]), "column 'captions': it has the type"),
        (lambda rows: rows.append_column("file_name", pa.array(["/mnt/x.jpg"] * len(rows))), "leads out of"),
        (
            lambda rows: rows.replace_schema_metadata({"author": "/home/alice/data"}),
            "its metadata: it contains",
        ),
    ],
)
def test_what_is_private_is_not_published(run, dataset, tmp_path, change, problem):
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    path = sorted(copy.glob("short/train-*.parquet"))[0]
    rows = change(pq.read_table(path))
    path.unlink()
    pq.write_table(rows, path)
    code, _, errors = run("data", "push", "--dataset", copy, "--to-folder", tmp_path / "out")
    line = only_line(errors)
    assert code == 1
    assert problem in line
    assert path.name in line
    assert TOKEN not in line
    assert not (tmp_path / "out").exists()


def test_a_private_text_about_the_origin_is_not_published(run, dataset, tmp_path):
    about = tmp_path / "about.md"
    about.write_text("Made from /home/alice/photos")
    code, _, errors = run("data", "push", "--dataset", dataset, "--to-folder", tmp_path / "out", "--about", about)
    assert code == 1
    assert "--about" in only_line(errors)

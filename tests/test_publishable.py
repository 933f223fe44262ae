"""Which files of a folder `nanovlm push` publishes, and which it refuses."""

import itertools
import json
import os
import shutil
import time

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nanovlm_hf.errors import holds_secret, scrub
from nanovlm_hf.hub.model_metadata import METRICS
from nanovlm_hf.hub.publishable import _names_home
from nanovlm_hf.hub.staging import stage_checkpoint, stage_space

from helpers.models import tiny_model, tiny_processor
from helpers.output import only_line

TOKEN = "hf_" + "aB3" * 11 + "x"
CARD = """---
library_name: transformers
datasets: ShortDesc
model-index:
- name: tiny
  results:
  - task: {type: image-text-to-text}
    dataset: {name: "validation images, see the card", type: nanovlm_hf, split: validation}
    metrics:
    - {type: eval_loss, value: 2.5}
    - {type: eval_loss_wrong_photo, value: 2.75}
    - {type: grounding_gap, value: 0.25}
---

# tiny

folder = "somewhere"

| 2.500 | 2.750 | 0.250 |
"""


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor(tokenizer).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    metrics = dict(zip(METRICS, (2.5, 2.75, 0.25), strict=True))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1} | metrics) + "\n")
    (folder / "training_args.yaml").write_text("name: tiny\n")
    return folder


@pytest.fixture
def checkpoint(whole_checkpoint, tmp_path):
    """A folder of a tiny model that can be published."""
    return shutil.copytree(whole_checkpoint, tmp_path / "tiny")


def dry_run(run, folder):
    return run("push", folder, "org/tiny", "--dry-run", "--without-code")


def test_only_the_files_of_a_checkpoint_are_published(run, checkpoint, tmp_path):
    own = {path.name for path in checkpoint.iterdir()}
    for name in (".env", "optimizer.pkl", "pytorch_model.bin", "scheduler.pt", "try.ipynb", "evil.py", "a.safetensors"):
        (checkpoint / name).write_text("secret")
    (checkpoint / "states").mkdir()
    (checkpoint / "link.txt").symlink_to("/etc/passwd")
    os.mkfifo(checkpoint / "adapter_config.json")
    code, lines, errors = dry_run(run, checkpoint)
    assert code == 0
    assert {line.split()[-1] for line in lines[:-1]} == own
    assert only_line(errors).startswith("nanovlm: not published: .env, a.safetensors, adapter_config.json, ")
    assert "states/" in errors[0]
    skipped = stage_checkpoint(str(checkpoint), "org/tiny", tmp_path / "stage")
    staged = {path.name for path in (tmp_path / "stage").iterdir()}
    assert staged - own == {path.name for path in (tmp_path / "stage").glob("*.py")} > {"modeling_nanovlm.py"}
    assert "evil.py" in skipped
    assert not any(path.is_symlink() for path in (tmp_path / "stage").iterdir())


def link(target, name="README.md"):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def write(name, text, mode="a"):
    def change(folder):
        with (folder / name).open(mode) as file:
            file.write(text)

    return change


def replace_by_pipe(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def note_in_weights(folder):
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt", "key": TOKEN})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (link("/etc/passwd"), "README.md: a link that leads out of this folder"),
        (link("../outside"), "README.md: a link that leads out of this folder"),
        (link(".env"), "README.md: a link that leads out of this folder"),
        (link("/dev/zero", "loss.png"), "loss.png: not a regular file"),
        (link("nowhere", "evaluation.json"), "evaluation.json: cannot be read"),
        (link("evaluation.json", "evaluation.json"), "evaluation.json: cannot be read"),
        (replace_by_pipe, "config.json: not a regular file"),
        (write("training_args.yaml", f"token: {TOKEN}\n"), "training_args.yaml: it contains a token, key or password"),
        (write("README.md", "OPENAI_API_KEY=sk-abcdefghijklmnop\n"), "README.md: it contains a token, key or password"),
        (write("metrics.jsonl", '{"note": "https://me:pass@example.org/"}\n'), "metrics.jsonl: it contains a token"),
        (write("tokenizer.json", TOKEN), "tokenizer.json: it contains a token"),
        (note_in_weights, "model.safetensors: it contains a token"),
        (
            write("training_args.yaml", "dataset: /home/someone/data\n"),
            "training_args.yaml: it contains the path of a home",
        ),
        (
            write("README.md", "see file:///Users/someone/notes\n"),
            "README.md: it contains the path of a home",
        ),
        (
            write("metrics.jsonl", '{"a": "C:\\\\Users\\\\me"}\n'),
            "metrics.jsonl: it contains the path of a home",
        ),
        (write("loss.png", "text"), "loss.png: not a PNG image"),
        (lambda folder: (folder / "README.md").write_bytes(b"---\n\xff\n---\n"), "README.md: not UTF-8 text"),
        (write("metrics.jsonl", "{"), "metrics.jsonl: line 2: not JSON"),
    ],
)
def test_private_and_foreign_files_are_refused_in_one_line(run, checkpoint, change, problem):
    (checkpoint.parent / "outside").write_text("secret")
    (checkpoint / ".env").write_text("secret")
    change(checkpoint)
    code, lines, errors = dry_run(run, checkpoint)
    assert (code, lines) == (1, [])
    assert problem in only_line(errors)
    assert TOKEN not in errors[0]


HOMES = [
    *("/home/alice", "/data/home/alice/x", "/var/home/alice", "/export/home/alice", "/nfs/homes/alice", "/home2/alice"),
    *("/home//alice", "//home/./alice", "../../home/alice", "host:/home/alice", "file:///home/alice", "/home/\u00e9"),
    *(
        "/Users/alice",
        "/mnt/c/Users/alice",
        "C:/Users/alice",
        r"C:\Users\alice",
        r"c:\\users\\alice",
        r"\\host\Users\alice",
    ),
    *(
        r"C:\Documents and Settings\alice",
        "/root/x",
        "/root",
        "/var/root/x",
        "see ~alice/data",
        "'~alice'",
        "x: ~alice",
    ),
    *(
        r"\/home\/alice\/x",
        r"\u002fhome\u002falice",
        r"C:\u005cUsers\u005cnick",
        r"\x2fhome\x2falice",
        r"a\n/home/alice",
    ),
    *("%2Fhome%2Falice", "%252Fhome%252Falice", "&#47;home&#47;alice", "https://example.org/?file=/home/alice"),
]
NO_HOMES = [
    *("~/runs", "https://example.org/home/page", "docs/home/index.html", "./home/x", "a ~100 gain, ~~old~~", "</root>"),
    *("about ~threefold\nmore", "/tmp/x", "and/or/home", "lists/users/me", "key: ~\n", "the root/x"),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SECRETS = [
    *("AKIAIOSFODNN7EXAMPLE", f"gho_{LETTERS}0123456789", f"ghs_{LETTERS}", f"github_pat_11ABC_{LETTERS}"),
    *("glpat-abcdefghij1234567890", f"AIzaSyA-{LETTERS}12345", f"npm_{LETTERS}", f"nvapi-{LETTERS}", f"gsk_{LETTERS}"),
    *(f"r8_{LETTERS}", "pypi-AgEIcHlwaS5vcmc", "xoxb-1234-abcdef", "sk-ant-api03-abcdefgh", f"wandb_v1_{LETTERS}"),
    *(
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.abc",
    ),
    *("https://x.org/?api_key=0123456789", "Authorization: Basic dXNlcjpwYXNzd29yZA==", f"my_hf_{LETTERS}ABCDEF"),
]
ASSIGNED = [
    *("AZURE_OPENAI_API_KEY=0123456789abcdef", '"wandb_api_key": "0123456789abcdef01234567"'),
    *(r"\u0041KIAIOSFODNN7EXAMPLE", "hf%5Fabcdefghijklmnopqrstuvwxyz", r"https:\/\/me:pass@example.org\/"),
]
NO_SECRETS = [
    *('"loss_per_token": 3.4567890123456789e-05,', '"pad_token": "<pad>"', "OPENAI_API_KEY=your-key", "token: null"),
    *('"cls_token": "model-00001-of-00003.safetensors"', "global-average-pooling-of-images", "?page=2&sort=up"),
    *("a Basic understanding of things", '"tokens_per_token": 12345678901234567890'),
]


@pytest.mark.parametrize(("texts", "named"), [(HOMES, True), (NO_HOMES, False)])
def test_homes_are_found_in_every_spelling(texts, named):
    assert [text for text in texts if _names_home(text) is not named] == []


@pytest.mark.parametrize(("texts", "secret"), [(SECRETS, True), (ASSIGNED, True), (NO_SECRETS, False)])
def test_secrets_are_found_by_their_form_and_their_names(texts, secret):
    assert [text for text in texts if holds_secret(f"see {text} there") is not secret] == []


def test_secrets_in_messages_are_masked():
    assert [text for text in SECRETS if "***" not in scrub(text)] == []


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "AZURE_STORAGE_KEY", "MY_TOKEN", "DB_PASSWORD", "client_secret"])
def test_values_of_secret_variables_are_found(monkeypatch, name):
    monkeypatch.setenv(name, "correct horse/battery")
    assert holds_secret("it is correct horse/battery.")
    assert holds_secret(r"it is correct horse\/battery.")
    assert scrub("it is correct horse/battery.") == "it is ***."
    monkeypatch.setenv(name, "short")
    assert not holds_secret("a short text")


@pytest.mark.parametrize(
    "piece", ["/", "-/", "\\", "%25", "eyJ", "-----BEGIN ", "token=a", " ~a", "://", "/home ", "sk-", "-eyJ", "key=1a"]
)
def test_the_search_for_private_text_takes_linear_time(piece):
    start = time.process_time()
    for text in (piece * 50_000, piece * 50_000 + "."):
        holds_secret(text)
        _names_home(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            write("training_args.yaml", 'x: "\\/home\\/alice\\/secret"\n'),
            "training_args.yaml: it contains the path of a home",
        ),
        (write("README.md", "see /data/home/alice/notes\n"), "README.md: it contains the path of a home"),
        (write("README.md", "AKIAIOSFODNN7EXAMPLE\n"), "README.md: it contains a token, key or password"),
        (
            lambda folder: edit_json(folder / "tokenizer.json", {"note": "/home/alice"}),
            "tokenizer.json: it contains the path of a home",
        ),
    ],
)
def test_private_text_is_refused(run, checkpoint, change, problem):
    change(checkpoint)
    code, _, errors = dry_run(run, checkpoint)
    assert code == 1
    assert problem in only_line(errors)


def png(folder, text=None, compressed=False, behind=b""):
    info = PngInfo()
    info.add_text("Comment", text or "a plot", zip=compressed)
    Image.new("RGB", (8, 8)).save(folder / "loss.png", pnginfo=info)
    with (folder / "loss.png").open("ab") as file:
        file.write(behind)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, None),
        ({"text": "/home/alice/plot.py"}, "loss.png: it contains the path of a home directory"),
        ({"text": TOKEN}, "loss.png: it contains a token"),
        ({"text": TOKEN, "compressed": True}, "loss.png: this PNG image is damaged, or holds more than a plot"),
        ({"behind": b"PK"}, "loss.png: this PNG image is damaged, or holds more than a plot"),
    ],
)
def test_what_an_image_says_is_checked(run, checkpoint, settings, problem):
    png(checkpoint, **settings)
    code, _, errors = dry_run(run, checkpoint)
    assert code == (problem is not None)
    assert errors == [] if problem is None else problem in only_line(errors)


def edit_json(path, fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_checkpoint_in_the_home_folder_is_published(run, checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert dry_run(run, f"~/{checkpoint.name}")[0] == 0


def test_many_blank_lines_in_a_card_take_no_time(run, checkpoint):
    card = checkpoint / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\n" + "\n" * 150_000, 1))
    assert "README.md: more than 100 blank lines in a row" in only_line(dry_run(run, checkpoint)[2])


def test_the_current_token_is_found_whatever_its_form(run, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-very-private-word")
    write("README.md", "a-very-private-word")(checkpoint)
    assert "it contains a token" in only_line(dry_run(run, checkpoint)[2])


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("from huggingface_hub import hf_hub_download", False),
        ("HF_HUB_OFFLINE=1 HF_TOKEN=... hf_transfer nanovlm_hf", False),
        ("send it as a Bearer authentication header; git+ssh://git@github.com/a/b", False),
        ("a risk-averse, task-oriented person", False),
        ("There is a torch bearer smiling. The torch bearer jumps...", False),
        ("Authorization: Bearer abc123.def456", True),
        (f"'{TOKEN}'", True),
        ("hf_" + "a" * 34, True),
    ],
)
def test_secrets_are_distinguished_from_code_about_them(text, secret):
    assert holds_secret(text) is secret


def test_a_snapshot_of_the_hubs_cache_can_be_published(run, checkpoint, tmp_path, monkeypatch):
    """Its files are links to blobs that are named by their hash."""
    for cache, place in ((tmp_path / "elsewhere", "snapshots/0a1b"), (tmp_path / "cache", "../../folder")):
        monkeypatch.setattr("nanovlm_hf.hub.publishable.HF_HUB_CACHE", str(tmp_path / "cache"))
        repository = cache / "models--org--tiny"
        snapshot = (repository / place).resolve()
        (repository / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(checkpoint.iterdir())):
            shutil.copyfile(path, repository / "blobs" / str(number))
            (snapshot / path.name).symlink_to(repository / "blobs" / str(number))
        code, lines, errors = dry_run(run, snapshot)
        assert (code, errors) == (0, [])
        assert len(lines) == len(list(checkpoint.iterdir())) + 1


METADATA = CARD.split("---\n")[1]
BOMB = "a: &a [1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghi")
)
RESULTS = METADATA[METADATA.index("model-index") :]


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# tiny\n",
        "---\n---\n",
        "---\nlicense: mit\n",
        "---\n- a\n- b\n---\n",
        "---\njust text\n---\n",
        "---\na: [\n---\n",
        "---\na: 1\na: 2\n---\n",
        f"---\n{'[' * 5000}\n---\n",
        f"---\n{'{' * 100_000}\n---\n",
        f"---\na: {'9' * 5000}\n---\n",
        f"---\n{BOMB}---\n",
        "---\n" + "a" * 300_000 + ": 1\n---\n",
        "---\na: !!python/object/apply:os.system [id]\n---\n",
        CARD.replace("datasets: ShortDesc", "datasets: 5"),
        CARD.replace("datasets: ShortDesc", "datasets: [{a: 1}]"),
        CARD.replace(RESULTS, "model-index: 5\n"),
        CARD.replace(RESULTS, "model-index: []\n"),
        CARD.replace(RESULTS, "model-index: [5]\n"),
        CARD.replace(RESULTS, "model-index: [{name: tiny}]\n"),
        CARD.replace(RESULTS, "model-index: [{name: [1], results: 5}]\n"),
        CARD.replace("{type: eval_loss, value: 2.5}", "{type: [eval_loss], value: 2.5}"),
        CARD.replace("{type: eval_loss, value: 2.5}", "{type: eval_loss, value: {a: 2.5}}"),
        CARD.replace("{type: eval_loss, value: 2.5}", "eval_loss"),
        CARD.replace("task: {type: image-text-to-text}", "task: 3"),
        CARD.replace("| 2.500", "| 2.400"),
    ],
)
def test_a_damaged_card_is_refused_in_one_line(run, checkpoint, card):
    (checkpoint / "README.md").write_text(card)
    code, lines, errors = dry_run(run, checkpoint)
    assert (code, lines) == (1, [])
    assert "README.md" in only_line(errors)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "5", "null", '"text"', "{}", "[" * 100_000, "{'a': 1}"),
        '{"eval_loss": "2.5"}',
        '{"eval_loss": NaN}',
        '{"eval_loss": true}',
        '{"eval_loss": {"mean": 2.5}}',
        '{"eval_loss": 1e999}',
        '{"eval_loss": ' + "9" * 400 + "}",
        '{"eval_loss": ' + "9" * 5000 + "}",
        '{"eval_loss": 2.5, "eval_loss_wrong_photo": 2.75, "grounding_gap": 0.25, "words": [NaN]}',
        '{"eval_loss": 2.5, "eval_loss_wrong_photo": 2.75, "grounding_gap": [0.25]}',
    ],
)
@pytest.mark.parametrize("name", ["metrics.json", "evaluation.json"])
def test_damaged_metrics_are_refused_in_one_line(run, checkpoint, name, content):
    (checkpoint / name).write_text(content)
    code, lines, errors = dry_run(run, checkpoint)
    assert (code, lines) == (1, [])
    assert name in only_line(errors)


@pytest.mark.parametrize(
    "name",
    ["", "/", "tiny", "org/", "/tiny", "a/b/c", "../../etc", "org/tiny.git", "org/a--b", "org/ti\nny", "org/tiny\n"],
)
def test_invalid_repository_names_are_usage_errors(run, name):
    assert run("push", "mini-short", name, "--dry-run")[0] == 2
    assert run("push", "mini-short", "órg/tiny", "--dry-run")[0] == 2
    assert run("push", "mini-short", f"org/{'a' * 200}", "--dry-run")[0] == 2


def test_a_space_holds_only_the_app_the_package_and_its_checkpoints(tmp_path, monkeypatch):
    from nanovlm_hf.checkpoints import SHIPPED
    from nanovlm_hf.hub import staging

    package = shutil.copytree(staging.PACKAGE, tmp_path / "nanovlm_hf", ignore=shutil.ignore_patterns("mini-*"))
    own = {path.relative_to(package) for path in package.rglob("*.py")}
    for name in (".env", "data/.env", "checkpoints/mine/model.safetensors", "data/images.tar", "__pycache__/a.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("stray")
    (package / "outside.py").symlink_to("/etc/passwd")
    shipped = shutil.copytree(SHIPPED["mini-short"], package / "checkpoints" / "mini-short")
    (shipped / "optimizer.pkl").write_text("stray")
    monkeypatch.setattr(staging, "PACKAGE", package)
    monkeypatch.setattr(staging, "SHIPPED", {"mini-short": shipped})
    stage_space(tmp_path / "space")
    staged = {path.relative_to(tmp_path / "space") for path in (tmp_path / "space").rglob("*") if path.is_file()}
    inside = {path.relative_to("nanovlm_hf") for path in staged if path.parts[0] == "nanovlm_hf"}
    assert {path for path in inside if path.suffix == ".py"} == own
    assert {path.name for path in inside if "mini-short" in path.parts} == {
        path.name for path in SHIPPED["mini-short"].iterdir()
    }
    assert "stray" not in "".join(path.read_text(errors="replace") for path in (tmp_path / "space").rglob(".env"))
    for suffix in (".pkl", ".tar", ".pyc"):
        assert not [path for path in staged if path.suffix == suffix]
    assert not [path for path in staged if path.name in (".env", "outside.py") or "mine" in path.parts]
    assert {path.name for path in staged if len(path.parts) == 1} == {"README.md", "app.py", "requirements.txt"}

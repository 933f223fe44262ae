import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from nanovlm_hf import NanoVLMConfig
from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.cli.command import app
from nanovlm_hf.completion import BATCH_SIZE
from nanovlm_hf.evaluation.calibration import paper_outputs

from helpers.image_files import png_header
from helpers.models import random_image, tiny_model, tiny_processor
from helpers.output import only_line
from helpers.toy_data import write_sources


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    random_image().save(path)
    return path


def test_one_image_gives_one_line(run, saved, photo):
    code, lines, errors = run("complete", photo, "--model", saved, "--prefix", "There is a big", "--max-new-tokens", 5)
    assert (code, errors) == (0, [])
    assert len(lines) == 1
    assert lines[0].startswith("There is a big")


def test_line_equals_output_of_generate(run, saved, photo, tokenizer):
    processor = tiny_processor(tokenizer)
    inputs = processor(images=random_image(), text="A dog", return_tensors="pt")
    tokens = tiny_model().generate(**inputs, max_new_tokens=6, do_sample=False)
    want = " ".join(processor.batch_decode(tokens, skip_special_tokens=True)[0].split())
    assert run("complete", photo, "--model", saved, "--prefix", "A dog ", "--max-new-tokens", 6)[1] == [want]


def test_folder_of_several_batches(run, saved, tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    for number in range(BATCH_SIZE + 3):
        random_image(number).save(folder / f"{number:02}.jpg")
    (folder / "notes.txt").write_text("not a photo")
    code, lines, errors = run("complete", folder, "--model", saved, "--max-new-tokens", 3)
    assert code == 0
    assert only_line(errors) == f"nanovlm: {folder}: 1 file skipped: not an image"
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in sorted(folder.glob("*.jpg"))]


def test_json_lines(run, saved, photo):
    beams = ("--num-beams", 2, "--num-return-sequences", 2)
    options = ("--json", "--blind", "--prefix", "A", "--max-new-tokens", 4)
    code, lines, _ = run("complete", photo, "--model", saved, *beams, *options)
    row = json.loads(lines[0])
    assert code == 0
    assert (row["photo"], row["prefix"]) == (str(photo), "A")
    assert len(row["completions"]) == len(row["blind"]) == 2


def test_blind_also_completes_for_a_blank_image(run, saved, photo):
    _, lines, _ = run("complete", photo, "--model", saved, "--blind", "--max-new-tokens", 8)
    assert len(lines) == 2
    assert lines[1].startswith("(blank image) ")
    assert lines[1].removeprefix("(blank image) ") != lines[0]


def test_seed_makes_sampling_reproducible(run, saved, photo):
    options = ("--temperature", 1.5, "--num-return-sequences", 3, "--max-new-tokens", 8)
    one, same, other = (run("complete", photo, "--model", saved, *options, "--seed", seed)[1] for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert len(one) == 3


def test_invalid_image_does_not_stop_the_others(run, saved, photo, tmp_path):
    bad = {
        "missing.jpg": (None, "no such file"),
        "empty.jpg": (b"", "is empty"),
        "text.jpg": (b"just words", "not an image that Pillow can read"),
        "cut.jpg": (None, "is damaged"),
        "huge.png": (png_header(20_000, 20_000), "too many pixels"),
    }
    random_image(size=(300, 300)).save(tmp_path / "whole.jpg", quality=95)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    for name, (content, _) in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    random_image(size=(1, 1)).save(tmp_path / "dot.png")
    paths = [photo, *(tmp_path / name for name in bad), tmp_path / "dot.png"]
    code, lines, errors = run("complete", *paths, "--model", saved, "--max-new-tokens", 3)
    assert code == 1
    assert [line.split(": ")[0] for line in lines] == [str(photo), str(tmp_path / "dot.png")]
    assert len(errors) == len(bad)
    for error, (name, (_, message)) in zip(errors, bad.items(), strict=True):
        assert name in error
        assert message in error


def test_errors_are_reported_in_json_lines(run, saved, photo, tmp_path):
    code, lines, _ = run("complete", tmp_path / "none.jpg", photo, "--model", saved, "--json", "--max-new-tokens", 2)
    rows = [json.loads(line) for line in lines]
    assert code == 1
    assert "no such file" in rows[0]["error"]
    assert rows[1]["completions"]


def test_folder_without_images(run, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, errors = run("complete", tmp_path / "empty", "--model", saved)
    assert code == 1
    assert "there is no image in this folder" in only_line(errors)


def test_unreadable_folder(run, saved, tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)  # root can read every folder
    code, _, errors = run("complete", tmp_path / "locked", "--model", saved)
    assert code == 1
    assert "the folder cannot be read (Permission denied)" in only_line(errors)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--prefix", "a <image> b"), 2, "<image> stands for the image"),
        (("--prefix", "A <eos> dog"), 2, "prefix: <eos> is a special token and must not be part of the text"),
        (("--prefix", "<pad><pad>"), 2, "prefix: <pad> is a special token"),
        (("--prefix", "<bos>"), 2, "prefix: <bos> is a special token"),
        (("--prefix", "A \udcff"), 2, "--prefix: it is not UTF-8 text"),
        (("--prefix", "word " * 60), 1, "leave no room in the model's 48"),
        (("--max-new-tokens", 60), 1, "ask for 47 at most"),
        (("--max-new-tokens", 0), 2, "max-new-tokens"),
        (("--num-return-sequences", 3), 2, "each beam gives one completion"),
        (("--temperature", "inf"), 2, "--temperature inf: must be 0 (no sampling)"),
        (("--temperature", "1e-60"), 2, "--temperature 1e-60: must be 0 (no sampling)"),
        (("--seed", 2**32), 2, "--seed"),
        (("--temperature", "warm"), 2, "temperature"),
        (("--colour", "red"), 2, "--colour"),
        (("--model", "no-such-model"), 1, "not a local folder, a Hub id"),
    ],
)
def test_invalid_options(run, saved, photo, options, code, message):
    got, lines, errors = run("complete", photo, "--model", saved, *options)
    assert (got, lines) == (code, [])
    assert message in only_line(errors)


@pytest.mark.parametrize(
    "arguments",
    [
        ("push", "mini-short", "org/ti\udcffny", "--dry-run"),
        ("evaluate", "--model", "mini-short", "--dataset", "d", "--out", "o", "--prefix", "A \udcff"),
        ("evaluate", "--model", "mini-short", "--dataset", "d", "--out", "o", "--judge", "\udcff"),
        ("data", "push", "--dataset", "d", "--license", "\udcff"),
        ("demo", "--push", "org/\udcff"),
        ("serve", "--host", "\udcff"),
    ],
)
def test_text_that_is_not_utf8_is_wrong_usage(run, arguments):
    code, lines, errors = run(*arguments)
    assert (code, lines) == (2, [])
    assert ": it is not UTF-8 text" in only_line(errors)


def test_empty_prefix(run, saved, photo):
    code, lines, _ = run("complete", photo, "--model", saved, "--prefix", "  ", "--max-new-tokens", 8)
    assert code == 0
    assert lines[0]


@pytest.fixture
def corrupted(tmp_path, saved):
    folder = tmp_path / "broken"
    shutil.copytree(saved, folder)
    return folder


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def other_project(folder: Path) -> None:
    (folder / "config.json").write_text('{"vit_hidden_dim": 768, "lm_hidden_dim": 960}')


def reshape(folder: Path) -> None:
    config = NanoVLMConfig.from_pretrained(folder)
    config.text_config.intermediate_size = 64
    config.save_pretrained(folder)


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def grow_the_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"id": 320, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(token | {"normalized": False, "special": True})
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"not json"), "cannot be loaded"),
        (lambda f: (f / "config.json").unlink(), "there is no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "there is no tokenizer.json"),
        (other_project, "huggingface/nanoVLM"),
        (lambda f: edit_config(f, model_type="llava"), "a model of type 'llava'"),
        (reshape, "config.json asks for"),
        (drop_a_weight, "the weights lack model.language_model.norm.weight"),
        (grow_the_vocabulary, "the tokenizer has 321 entries, the model 320"),
    ],
    ids=[
        "no weights",
        "invalid weights",
        "no config",
        "invalid config",
        "no tokenizer",
        "huggingface/nanoVLM",
        "another model",
        "mismatched weights",
        "missing weight",
        "tokenizer too large",
    ],
)
def test_broken_model_folders(run, photo, corrupted, corrupt, message):
    corrupt(corrupted)
    code, lines, errors = run("complete", photo, "--model", corrupted)
    assert (code, lines) == (1, [])
    assert message in only_line(errors)
    assert str(corrupted) in errors[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", {"height": 100_000, "width": 100_000}), ("image_mean", "abc"), ("image_std", [0, 0, 0])],
)
def test_invalid_image_processor_settings(run, photo, corrupted, field, value):
    for name in ("preprocessor_config.json", "processor_config.json"):  # Transformers 5 reads the second one
        if (corrupted / name).exists():
            content = json.loads((corrupted / name).read_text())
            content.get("image_processor", content)[field] = value
            (corrupted / name).write_text(json.dumps(content))
    code, lines, errors = run("complete", photo, "--model", corrupted)
    assert (code, lines) == (1, [])
    assert field in only_line(errors)


def test_pickled_weights_are_not_loaded(run, photo, corrupted):
    torch.save(load_file(corrupted / "model.safetensors"), corrupted / "pytorch_model.bin")
    (corrupted / "model.safetensors").unlink()
    code, _, errors = run("complete", photo, "--model", corrupted)
    assert code == 1
    assert "cannot be loaded" in only_line(errors)


def test_info_prints_table_2(run, saved):
    code, lines, _ = run("info", "mini")
    assert code == 0
    shares = {line.split()[0]: line.split()[2] for line in lines[1:]}
    assert shares == {"encoder": "69.0%", "projector": "14.0%", "decoder": "17.0%", "total": "100.0%"}
    assert "5,674,944" in lines[-1]
    counts = NanoVLMConfig.from_pretrained(saved).parameter_counts()
    assert f"{counts['total']:,}" in run("info", saved)[1][-1]
    assert run("info", "huge")[0] == 1


def test_data_commands(run, tmp_path):
    sources = write_sources(tmp_path / "sources", photos=30)
    out = tmp_path / "data"
    arguments = ["--captions", sources / "captions.json", "--descriptions", sources / "descriptions.jsonl"]
    code, lines, _ = run("data", "build", *arguments, "--images", sources / "images", "--out", out)
    assert code == 0
    assert lines[0].startswith("short: ")
    assert run("data", "tokenizer", "--dataset", out, "--out", tmp_path / "tokenizer", "--vocab-size", 290)[0] == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()
    fields = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"  # exists in Transformers 4.57 and 5
    code, _, errors = run("data", "tokenizer", "--dataset", tmp_path / "nothing", "--out", tmp_path / "t")
    assert code == 1
    assert "cannot be loaded as a dataset" in only_line(errors)
    code, _, errors = run("data", "build", *arguments, "--images", sources / "images", "--out", out)
    assert code == 1
    assert "already contains a dataset" in only_line(errors[-1:])


def test_output_folder_that_is_not_writable(run, tmp_path):
    sources = write_sources(tmp_path / "sources", photos=5)
    (tmp_path / "file").write_text("not a folder")
    arguments = ["--captions", sources / "captions.json", "--descriptions", sources / "descriptions.jsonl"]
    code, _, errors = run("data", "build", *arguments, "--images", sources / "images", "--out", tmp_path / "file" / "x")
    assert code == 1
    assert str(tmp_path / "file") in only_line(errors)


@pytest.mark.parametrize(
    ("old", "new"),
    [("--grounding-photos=-1", "--grounding-images"), ("--judge-sees-photo=1", "--judge-sees-image")],
)
def test_old_names_of_options_still_work(run, old, new):
    code, _, errors = run("evaluate", old)
    assert code == 2
    assert f"'{new}'" in only_line(errors)


def test_help_does_not_import_torch():
    command = Path(sys.executable).with_name("nanovlm")
    probe = (
        f"import runpy, sys\nsys.argv = [{str(command)!r}, '--help']\n"
        f"try: runpy.run_path({str(command)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout


@pytest.mark.slow
def test_packaged_checkpoint_in_a_fresh_process(tmp_path, photo):
    command = Path(sys.executable).with_name("nanovlm")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [command, "complete", photo, "--prefix", "There is a"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("There is a ")
    assert done.stdout.count("\n") == 1
    assert SHIPPED["mini-short"].is_dir()


def test_released_checkpoint_that_is_not_installed(run, photo, monkeypatch):
    monkeypatch.delitem(SHIPPED, "mini-long")
    code, _, errors = run("complete", photo, "--model", "mini-long")
    assert code == 1
    assert "mini-long: it is not in the package, but in checkpoints/ of its repository" in only_line(errors)
    code, _, errors = run("complete", photo, "--model", "mini")
    assert code == 1
    assert "or a released checkpoint (mini-short" in only_line(errors)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_released_checkpoint_by_its_short_name(run, photo, name):
    code, lines, errors = run("complete", photo, "--model", name, "--prefix", "There is a", "--max-new-tokens", 8)
    assert code == 0, errors
    assert lines[0].startswith("There is a ")


def _numbers(command, path=()):
    """Yield the path of each command with each of its options that takes a number."""
    for name, below in getattr(command, "commands", {}).items():
        yield from _numbers(below, (*path, name))
    yield from ((path, one) for one in command.params if one.type_descriptor.annotation in (int, float))


def test_numbers_that_never_end_are_refused():
    """A seed may have any size; the other bounds are checked with a message that gives the reason."""
    unbounded = {"seed", "concurrency", "temperature", "judge_temperature", "max_cost"}
    found = list(_numbers(typer.main.get_command(app)))
    assert len(found) > 30
    for path, option in found:
        assert option.name in unbounded or getattr(option, "max", None) is not None, (*path, option.name)


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "describe", "--captions", "c.json", "--out", "o", "--attempts"),
        ("data", "describe", "--captions", "c.json", "--out", "o", "--tries"),
        ("evaluate", "judge", "--completions", "paper", "--out", "o", "--dry-run", "--repeats"),
        ("complete", "--num-beams"),
        ("data", "ingest", "--captions", "c.json", "--out", "o", "--workers"),
    ],
)
@pytest.mark.parametrize("number", ["1000000000", "9" * 5000])
def test_an_absurd_number_is_refused(run, arguments, number):
    code, _, errors = run(*arguments, number)
    assert code == 2
    assert arguments[-1] in only_line(errors)


WRITE_FOLDER = [
    ("data", "build", "--captions", "c.json", "--descriptions", "d.jsonl", "--text-only", "--out"),
    ("data", "describe", "--captions", "c.json", "--out"),
    ("data", "ingest", "--captions", "c.json", "--out"),
    ("data", "join", "--dataset", "d", "--images", "i", "--out"),
    ("data", "push", "--dataset", "d", "--to-folder"),
    ("data", "tokenizer", "--dataset", "d", "--out"),
    ("evaluate", "--model", "m", "--dataset", "d", "--out"),
    ("evaluate", "judge", "--completions", "paper", "--out"),
    ("evaluate", "sheet", "--completions", "c.jsonl", "--out"),
    ("export", "m", "--out"),
]
WRITE_FILE = [
    ("evaluate", "human-sheet", "--completions", "c.jsonl", "--out"),
    ("evaluate", "human-score", "--key", "k.json", "--ratings", "r.json", "--out"),
]


@pytest.mark.parametrize(
    ("command", "name", "problem"),
    [
        *((command, "file", "this is a file: name a folder") for command in WRITE_FOLDER),
        *((command, "file/below", "file is a file: name another folder") for command in WRITE_FOLDER),
        *((command, "n" * 300, "cannot be written (File name too long): name another") for command in WRITE_FOLDER),
        *((command, "no/such/x.html", "there is no folder no/such: make it") for command in WRITE_FILE),
        *((command, "file/x.html", "file is a file: name another folder") for command in WRITE_FILE),
        *((command, "folder.html", "this is a folder: name a file") for command in WRITE_FILE),
        *((command, "", "this is a folder: name a file") for command in WRITE_FILE),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_option(run, tmp_path, monkeypatch, command, name, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.html").mkdir()
    code, _, errors = run(*command, name)
    line = only_line(errors)
    assert problem in line
    assert "Errno" not in line
    assert "unexpected" not in line
    assert code == 1
    assert f"{command[-1]} {name}"[:40].strip() in line


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_sheet_in_a_folder_without_a_name(run, tmp_path, monkeypatch, name):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    code, _, errors = run("evaluate", "sheet", "--completions", paper_outputs(), "--no-calibration", "--out", name)
    if name in ("", "."):
        assert (code, errors) == (0, [])
        assert (tmp_path / "a" / "b.key.json").exists()
    else:
        assert code == 2
        assert f"--out {name}: it exists" in only_line(errors)


def test_grades_in_the_root_folder_have_no_key(run, tmp_path):
    code, _, errors = run("evaluate", "judge", "--grades", "/x.csv", "--grader", "A", "--out", tmp_path / "out")
    assert code == 2
    assert "no place for a key next to it" in only_line(errors)

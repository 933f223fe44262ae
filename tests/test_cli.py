import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import only_line, picture, tiny_model, tiny_processor
from safetensors.torch import load_file, save_file
from test_photos import png_header
from toy_data import write_sources

from nanovlm_hf import NanoVLMConfig
from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.completion import BATCH_SIZE


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    picture().save(path)
    return path


def test_one_photo_gives_one_line(run, saved, photo):
    code, lines, errors = run("complete", photo, "--model", saved, "--prefix", "There is a big", "--max-new-tokens", 5)
    assert (code, errors) == (0, [])
    assert len(lines) == 1
    assert lines[0].startswith("There is a big")


def test_the_line_is_what_generate_says(run, saved, photo, tokenizer):
    processor = tiny_processor(tokenizer)
    inputs = processor(images=picture(), text="A dog", return_tensors="pt")
    tokens = tiny_model().generate(**inputs, max_new_tokens=6, do_sample=False)
    want = " ".join(processor.batch_decode(tokens, skip_special_tokens=True)[0].split())
    assert run("complete", photo, "--model", saved, "--prefix", "A dog ", "--max-new-tokens", 6)[1] == [want]


def test_folders_and_several_batches(run, saved, tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    for number in range(BATCH_SIZE + 3):
        picture(number).save(folder / f"{number:02}.jpg")
    (folder / "notes.txt").write_text("not a photo")
    code, lines, errors = run("complete", folder, "--model", saved, "--max-new-tokens", 3)
    assert (code, errors) == (0, [])
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in sorted(folder.glob("*.jpg"))]


def test_json_lines(run, saved, photo):
    beams = ("--num-beams", 2, "--num-return-sequences", 2)
    options = ("--json", "--blind", "--prefix", "A", "--max-new-tokens", 4)
    code, lines, _ = run("complete", photo, "--model", saved, *beams, *options)
    row = json.loads(lines[0])
    assert code == 0
    assert (row["photo"], row["prefix"]) == (str(photo), "A")
    assert len(row["completions"]) == len(row["blind"]) == 2


def test_blind_prints_what_a_blank_picture_gives(run, saved, photo):
    _, lines, _ = run("complete", photo, "--model", saved, "--blind", "--max-new-tokens", 8)
    assert len(lines) == 2
    assert lines[1].startswith("(blank picture) ")
    assert lines[1].removeprefix("(blank picture) ") != lines[0]


def test_a_seed_repeats_a_sample(run, saved, photo):
    options = ("--temperature", 1.5, "--num-return-sequences", 3, "--max-new-tokens", 8)
    one, same, other = (run("complete", photo, "--model", saved, *options, "--seed", seed)[1] for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert len(one) == 3


def test_a_bad_photo_does_not_stop_the_others(run, saved, photo, tmp_path):
    bad = {
        "missing.jpg": (None, "there is no such file"),
        "empty.jpg": (b"", "is empty"),
        "text.jpg": (b"just words", "no picture that Pillow can read"),
        "cut.jpg": (None, "is damaged"),
        "huge.png": (png_header(20_000, 20_000), "too many pixels"),
    }
    picture(size=(300, 300)).save(tmp_path / "whole.jpg", quality=95)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    for name, (content, _) in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    picture(size=(1, 1)).save(tmp_path / "dot.png")
    paths = [photo, *(tmp_path / name for name in bad), tmp_path / "dot.png"]
    code, lines, errors = run("complete", *paths, "--model", saved, "--max-new-tokens", 3)
    assert code == 1
    assert [line.split(": ")[0] for line in lines] == [str(photo), str(tmp_path / "dot.png")]
    assert len(errors) == len(bad)
    for error, (name, (_, message)) in zip(errors, bad.items(), strict=True):
        assert name in error
        assert message in error


def test_errors_are_rows_of_json_too(run, saved, photo, tmp_path):
    code, lines, _ = run("complete", tmp_path / "none.jpg", photo, "--model", saved, "--json", "--max-new-tokens", 2)
    rows = [json.loads(line) for line in lines]
    assert code == 1
    assert "there is no such file" in rows[0]["error"]
    assert rows[1]["completions"]


def test_a_folder_without_photos(run, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, errors = run("complete", tmp_path / "empty", "--model", saved)
    assert code == 1
    assert "there is no photo in this folder" in only_line(errors)


def test_an_unreadable_folder(run, saved, tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read every folder, so the refusal is made here
    code, _, errors = run("complete", tmp_path / "locked", "--model", saved)
    assert code == 1
    assert "the folder cannot be read (Permission denied)" in only_line(errors)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--prefix", "a <image> b"), 2, "<image> stands for the photo"),
        (("--prefix", "word " * 60), 1, "leave no room in the model's 48"),
        (("--max-new-tokens", 60), 1, "ask for 47 at most"),
        (("--max-new-tokens", 0), 2, "max-new-tokens"),
        (("--num-return-sequences", 3), 2, "greedy search has one answer"),
        (("--temperature", "warm"), 2, "temperature"),
        (("--colour", "red"), 2, "--colour"),
        (("--model", "no-such-model"), 1, "this is no folder, no Hub id"),
    ],
)
def test_wrong_options(run, saved, photo, options, code, message):
    got, lines, errors = run("complete", photo, "--model", saved, *options)
    assert (got, lines) == (code, [])
    assert message in only_line(errors)


def test_an_empty_prefix_lets_the_model_begin(run, saved, photo):
    code, lines, _ = run("complete", photo, "--model", saved, "--prefix", "  ", "--max-new-tokens", 8)
    assert code == 0
    assert lines[0]


@pytest.fixture
def broken(tmp_path, saved):
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
    ("break_it", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"not json"), "cannot be loaded"),
        (lambda f: (f / "config.json").unlink(), "there is no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded"),
        (other_project, "huggingface/nanoVLM"),
        (lambda f: edit_config(f, model_type="llava"), "a model of type 'llava'"),
        (reshape, "config.json asks for"),
        (drop_a_weight, "the weights lack model.language_model.norm.weight"),
        (grow_the_vocabulary, "the tokenizer has 321 entries, the model 320"),
    ],
    ids=[
        "no weights",
        "weights that are none",
        "no config",
        "config that is none",
        "no tokenizer",
        "huggingface/nanoVLM",
        "another model",
        "weights of another shape",
        "a weight missing",
        "tokenizer too large",
    ],
)
def test_broken_model_folders(run, photo, broken, break_it, message):
    break_it(broken)
    code, lines, errors = run("complete", photo, "--model", broken)
    assert (code, lines) == (1, [])
    assert message in only_line(errors)
    assert str(broken) in errors[0]


def test_pickled_weights_are_not_opened(run, photo, broken):
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    code, _, errors = run("complete", photo, "--model", broken)
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
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"  # which Transformers 4.57 and 5 both have
    code, _, errors = run("data", "tokenizer", "--dataset", tmp_path / "nothing", "--out", tmp_path / "t")
    assert code == 1
    assert "cannot be loaded as a dataset" in only_line(errors)
    code, _, errors = run("data", "build", *arguments, "--images", sources / "images", "--out", out)
    assert code == 1
    assert "there is a dataset already" in only_line(errors[-1:])


def test_a_folder_that_cannot_be_written(run, tmp_path):
    sources = write_sources(tmp_path / "sources", photos=5)
    (tmp_path / "file").write_text("not a folder")
    arguments = ["--captions", sources / "captions.json", "--descriptions", sources / "descriptions.jsonl"]
    code, _, errors = run("data", "build", *arguments, "--images", sources / "images", "--out", tmp_path / "file" / "x")
    assert code == 1
    assert str(tmp_path / "file") in only_line(errors)


def test_the_installed_command_needs_no_pytorch_for_help():
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


def test_the_checkpoint_that_ships_answers_from_a_clean_process(tmp_path, photo):
    command = Path(sys.executable).with_name("nanovlm")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [command, "complete", photo, "--prefix", "There is a"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("There is a ")
    assert done.stdout.count("\n") == 1
    assert SHIPPED["mini-short"].is_dir()


def test_a_short_name_that_is_not_at_hand(run, photo, monkeypatch):
    from nanovlm_hf import completion

    monkeypatch.delitem(completion.SHIPPED, "mini-long")
    code, _, errors = run("complete", photo, "--model", "mini-long")
    assert code == 1
    assert "mini-long: it is not in the package, but in checkpoints/ of its repository" in only_line(errors)
    code, _, errors = run("complete", photo, "--model", "mini")
    assert code == 1
    assert "none of mini-short" in only_line(errors)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_model_that_ships_answers_by_its_short_name(run, photo, name):
    code, lines, errors = run("complete", photo, "--model", name, "--prefix", "There is a", "--max-new-tokens", 8)
    assert code == 0, errors
    assert lines[0].startswith("There is a ")

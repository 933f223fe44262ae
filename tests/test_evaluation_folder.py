"""The folder of an evaluation: reuse and damage of its files, odd datasets, and partial failures."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import disable_progress_bars
from filelock import FileLock

from nanovlm_hf import InputError
from nanovlm_hf.evaluation.completions import complete_items
from nanovlm_hf.evaluation.fingerprints import processor_hash, weights_hash
from nanovlm_hf.evaluation.generators import NanoVLM, load_generator
from nanovlm_hf.evaluation.grounding_cache import cached_grounding
from nanovlm_hf.evaluation.items import items_of_dataset
from nanovlm_hf.evaluation.run import EvaluationSettings
from nanovlm_hf.evaluation.run import evaluate as run_evaluation

from helpers.evaluations import QUICK
from helpers.models import tiny_model, tiny_processor
from helpers.output import only_line
from helpers.toy_data import jpeg_of, square


def rewrite(data: Path, change: Callable[[list[dict]], object], split="validation") -> Path:
    """Change the rows of a split of the short descriptions."""

    def changed(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        change(rows)
        return pa.Table.from_pylist(rows, schema=table.schema)

    return rewrite_table(data, changed, split)


def rewrite_table(data: Path, change: Callable[[pa.Table], pa.Table], split: str) -> Path:
    (path,) = (data / "short").glob(f"{split}-*.parquet")
    pq.write_table(change(pq.read_table(path)), path)
    # As `nanovlm data build` does: `datasets` tells the files that it has in its cache by their names.
    name = f"{path.name[:-24]}{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.parquet"
    path.rename(path.with_name(name))
    card = data / "README.md"
    card.write_text(card.read_text().replace(path.name, name))
    return data


@pytest.fixture
def data(toy, tmp_path):
    """A copy of the toy dataset."""
    return shutil.copytree(toy / "data", tmp_path / "data")


@pytest.fixture
def evaluate(run, saved, tmp_path):
    """Evaluate the tiny model: exit code and errors; the report is in `tmp_path / "out"`."""

    def call(dataset, *options, models=(saved,), out=tmp_path / "out"):
        named = [word for model in models for word in ("--model", model)]
        code, _, errors = run("evaluate", *named, "--dataset", dataset, "--out", out, *QUICK, *options)
        assert not [line for line in errors if "unexpected" in line or "Traceback" in line], errors
        return code, errors

    return call


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def without_timings(out: Path) -> dict[str, str]:
    """All files by name, without what depends on the machine's speed and memory."""
    texts = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".jsonl"):
            pattern = r'("(?:seconds|seconds_per_completion|tokens_per_second|memory_mib)": )[0-9.e-]+'
            texts[str(path.relative_to(out))] = re.sub(pattern, r"\1_", path.read_text())
    return texts


# Identity of cached results.


def generator(change_model=None, change_processor=None, tokenizer=None):
    model, processor = tiny_model(), tiny_processor(tokenizer)
    if change_model is not None:
        change_model(model)
    if change_processor is not None:
        change_processor(processor)
    return NanoVLM("tiny", model, processor)


def test_checkpoints_that_differ_in_one_number_do_not_share_results(tokenizer):
    plain = weights_hash(generator(tokenizer=tokenizer).model)
    assert weights_hash(generator(tokenizer=tokenizer).model) == plain

    def last_number(model):
        with torch.no_grad():
            next(model.parameters()).flatten()[-1] += 1e-3

    def buffer(model):
        model.register_buffer("offset", torch.ones(1))

    assert (
        len({plain, *(weights_hash(generator(one, tokenizer=tokenizer).model) for one in (last_number, buffer))}) == 3
    )
    assert weights_hash(generator(lambda model: model.double(), tokenizer=tokenizer).model) != plain


def test_processors_and_configs_do_not_share_results(tokenizer):
    plain = generator(tokenizer=tokenizer)
    changes = [
        {"change_processor": lambda one: setattr(one.image_processor, "image_mean", [0.5, 0.5, 0.5])},
        {"change_processor": lambda one: setattr(one.image_processor, "resample", 0)},
        {"change_model": lambda model: setattr(model.config.text_config, "layer_norm_eps", 1e-3)},
    ]
    others = [generator(**change, tokenizer=tokenizer) for change in changes]
    others.append(generator(tokenizer=load_generator("mini-short").processor.tokenizer))
    hashes = [processor_hash(one) for one in (plain, *others)]
    assert len(set(hashes)) == len(hashes)
    plain.complete(square(0)[0], "A")
    plain.processor(images=[square(0)[0]] * 2, text=["A", "A red ball"], return_tensors="pt")
    assert processor_hash(plain) == hashes[0], "using the processor does not change its hash"


def move_caption(rows):
    rows[0]["captions"] = ["a green elephant"]


def move_description(rows):
    rows[1]["description"] = "Two green elephants sit on a red mountain."


def move_photo(rows):
    rows[2]["image"]["bytes"] = jpeg_of(77)


@pytest.fixture(scope="module")
def tiny(saved):
    """The tiny model and the hashes that its results are cached under."""
    model = load_generator(str(saved), max_new_tokens=4)
    return model, {"weights": weights_hash(model.model), "processor": processor_hash(model)}


@pytest.fixture
def ground(tiny, tmp_path):
    """Measure the grounding of the tiny model on 20 images: the result, and the file that it is cached in."""

    def call(dataset, out=tmp_path / "out"):
        settings = EvaluationSettings([], str(dataset), "short", out, grounding_images=20)
        return cached_grounding(tiny[0], "tiny", settings, tiny[1]), out / "grounding" / "tiny.json"

    return call


@pytest.mark.parametrize("change", [move_caption, move_description, move_photo])
def test_grounding_is_measured_again_on_other_texts_captions_and_images(ground, data, tmp_path, change):
    _, path = ground(data)
    before = json.loads(path.read_text())
    rewrite(data, change)
    ground(data)
    after = json.loads(path.read_text())
    assert {name for name in before["identity"] if before["identity"][name] != after["identity"][name]} == {"rows"}
    if change is not move_caption:
        assert after["measured"] != before["measured"]
    _, fresh = ground(data, tmp_path / "fresh")
    assert fresh.read_text() == path.read_text()


@pytest.mark.slow
def test_damaged_grounding_is_measured_again(ground, toy):
    _, path = ground(toy / "data")
    whole = path.read_text()
    contents = json.loads(whole)
    forged = contents | {"measured": contents["measured"] | {"eval_loss": 0.0}}
    for damage in ("", "{", "[]", "{}", "5", '{"identity": 5}', json.dumps(forged), whole[:-20]):
        path.write_text(damage)
        assert ground(toy / "data")[0] == contents["measured"]
        assert path.read_text() == whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy, saved):
    """The folder of a finished evaluation."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run_evaluation(
        EvaluationSettings(
            [str(saved)], str(toy / "data"), "short", out, "validation", limit=3, max_new_tokens=4, grounding_images=0
        ),
        say=lambda _: None,
    )
    return out


def line_of(path: Path, **changes) -> str:
    first, *others = path.read_text().splitlines()
    return "\n".join([json.dumps(json.loads(first) | changes), *others, ""])


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *((".json", text) for text in ("", "{", "[]", "{}", "5", '"text"', '{"weights": []}')),
        (".json", None),
        *((".jsonl", text) for text in ("[]\n", "{}\n", "5\n", "x\n", '"item_id"\n', "null\n")),
        (".jsonl", {"item_id": "77"}),
        (".jsonl", {"model": "other"}),
        (".jsonl", {"prefix": "Another beginning"}),
        (".jsonl", {"reference": None}),
        (".jsonl", {"seconds": None}),
        (".jsonl", {"seconds": float("nan")}),
        (".jsonl", {"seconds": -1}),
        (".jsonl", {"new_tokens": 1.5}),
        (".jsonl", {"new_tokens": 10**400}),
        (".jsonl", {"completion": 5}),
    ],
)
def test_damaged_or_foreign_completions_are_refused(finished, tiny, toy, tmp_path, suffix, damage):
    folder = shutil.copytree(finished / "completions", tmp_path / "completions")
    (path,) = folder.glob(f"*{suffix}")
    items = items_of_dataset(str(toy / "data"), "short", "validation", limit=3)
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage if isinstance(damage, str) else line_of(path, **damage))
    with pytest.raises(InputError, match=rf"{path.stem}\.jsonl?: ") as refused:
        complete_items(tiny[0], path.stem, items, folder)
    assert "remove" in str(refused.value) or "line 1" in str(refused.value) or "not JSON" in str(refused.value)
    (folder / f"{path.stem}.jsonl").unlink()
    rows, _ = complete_items(tiny[0], path.stem, items, folder)
    assert len(rows) == 3, "the remedy of the message"


@pytest.mark.parametrize("damage", [{"memory_mib": "x"}, {"memory_mib": None}, {"tokens_per_second": []}, {"more": 1}])
def test_a_damaged_speed_is_computed_again(evaluate, finished, toy, tmp_path, damage):
    out = shutil.copytree(finished, tmp_path / "out")
    (path,) = (out / "completions").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert evaluate(toy / "data", "--grounding-images", 0) == (0, [])
    assert without_timings(out)["completions/tiny0.jsonl"] == without_timings(finished)["completions/tiny0.jsonl"]
    assert (out / "results.json").read_text().count("tokens_per_second") == 1


def test_a_folder_of_another_evaluation_is_unchanged(evaluate, finished, toy, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for options in (("--limit", 2), ("--prefix-words", 2), ("--split", "test"), ("--max-new-tokens", 5)):
        code, errors = evaluate(toy / "data", "--grounding-images", 0, *options)
        assert code == 1
        assert re.search(r"completions differ in (items|settings): remove the file, or choose", only_line(errors))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# Odd datasets.


def damage_photos(*places):
    def change(rows):
        for place in places:
            rows[place] = rows[place] | {"image": {"bytes": b"not a photo", "path": f"{place}.jpg"}}

    return change


def set_all(**values):
    return lambda rows: [row.update(values) for row in rows]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda rows: rows.clear(),
            "short, validation.: (this split (is empty|has no rows)|cannot be loaded)",
        ),
        (set_all(description=None), "description"),
        (set_all(description=""), "description"),
        (damage_photos(*range(20)), "3 of 3 rows cannot be used|cannot be opened|not an image"),
    ],
)
def test_a_split_without_anything_to_evaluate_is_refused_in_one_line(evaluate, data, change, problem):
    code, errors = evaluate(rewrite(data, change), "--grounding-images", 0)
    assert code == 1
    assert re.search(problem, only_line(errors))


@pytest.mark.parametrize("change", [lambda rows: rows.clear(), set_all(description=None), set_all(description="")])
def test_missing_training_texts_are_reported_in_one_line(evaluate, data, change):
    code, errors = evaluate(rewrite(data, change, "train"), "--grounding-images", 0)
    assert code == 1
    assert re.search("train", only_line(errors))


def test_one_row_is_enough_without_grounding(evaluate, data, tmp_path):
    rewrite(data, lambda rows: rows.__delitem__(slice(1, None)))
    assert evaluate(data, "--grounding-images", 0) == (0, [])
    assert results(tmp_path / "out")["sets"]["in_domain"]["items"] == 1
    code, errors = evaluate(data, out=tmp_path / "other")
    assert code == 1
    assert "grounding needs two images: skip it with --grounding-images 0" in only_line(errors)


def test_captions_are_optional(evaluate, data, tmp_path):
    for split in ("train", "validation", "test"):
        rewrite_table(data, lambda table: table.drop_columns(["captions"]).replace_schema_metadata(None), split)
    code, errors = evaluate(data, "--grounding-images", 20)
    assert (code, errors) == (0, [])
    assert results(tmp_path / "out")["sets"]["in_domain"]["models"]["tiny0"]["mentions"]["precision"]["items"] == 0


def test_a_few_images_that_cannot_be_decoded_are_left_out(data, capsys):
    def many(rows):
        rows[:] = [row | {"image_id": 5000 + number} for number, row in enumerate(rows * 10)]
        damage_photos(7)(rows)

    rewrite(data, many)
    disable_progress_bars()
    assert len(items_of_dataset(str(data), "short", "validation")) == 199
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 200 rows cannot be used (image_id 5007" in line
    assert line.endswith("left out")


def test_grounding_leaves_out_images_that_cannot_be_decoded(evaluate, data, tmp_path, monkeypatch):
    monkeypatch.setattr("nanovlm_hf.evaluation.grounding.GROUPS", {4: 1})
    rewrite(data, lambda rows: rows.extend(rows * 5) or damage_photos(0)(rows))
    code, errors = evaluate(data, "--split", "test", "--grounding-images", 120)
    assert code == 0
    assert "1 of 120 rows cannot be used" in only_line(errors)
    assert results(tmp_path / "out")["grounding"]["tiny0"]["photos"] == 119


def test_a_list_of_items_may_have_duplicates(evaluate, toy, tmp_path):
    ids = [item.item_id for item in items_of_dataset(str(toy / "data"), "short", "validation", limit=2)]
    (tmp_path / "ids.txt").write_text("\n".join([*ids, ids[0]]))
    assert evaluate(toy / "data", "--items", tmp_path / "ids.txt", "--grounding-images", 0) == (0, [])
    assert results(tmp_path / "out")["sets"]["in_domain"]["items"] == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--split", "nowhere"), "nowhere"),
        (("--split", ""), "cannot be loaded"),
        (("--images", "nowhere"), "--images nowhere: not a folder"),
        (("--prefix-words", 100_000, "--limit", 100_000), None),
    ],
)
def test_odd_options(evaluate, toy, options, problem):
    code, errors = evaluate(toy / "data", "--grounding-images", 0, *options)
    assert code == (problem is not None)
    assert problem is None or problem in only_line(errors)


def test_images_of_a_folder_that_cannot_be_opened_are_left_out(evaluate, toy, tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    square(1)[0].save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"nothing")
    (folder / "empty.jpg").write_bytes(b"")
    code, errors = evaluate(toy / "data", "--images", folder, "--grounding-images", 0)
    assert code == 0
    assert [line.split(": ")[1].split("/")[-1] for line in errors] == ["bad.png", "empty.jpg"]
    assert results(tmp_path / "out")["sets"]["out_of_domain"]["items"] == 1


# Partial failures.


def test_a_model_that_fails_does_not_affect_the_others(evaluate, toy, saved, tmp_path):
    broken = shutil.copytree(saved, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    models = (broken, "nobody/nothing", saved)
    code, errors = evaluate(toy / "data", "--grounding-images", 0, models=models)
    assert code == 1
    assert "broken" in only_line(errors)
    assert "nobody/nothing" in errors[0]
    found = results(tmp_path / "out")
    assert list(found["models"]) == list(found["sets"]["in_domain"]["models"]) == ["tiny0"]
    assert found["failed"] == ["broken", "nothing"]
    assert "tiny0" in (tmp_path / "out" / "index.html").read_text()
    assert (tmp_path / "out" / "report.md").exists()
    code, errors = evaluate(toy / "data", "--grounding-images", 0, models=models[:2], out=tmp_path / "none")
    assert code == 1
    assert "broken" in only_line(errors)
    assert not (tmp_path / "none" / "results.json").exists()


def test_two_evaluations_do_not_share_a_folder(evaluate, toy, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "evaluation.lock"):
        code, errors = evaluate(toy / "data", "--grounding-images", 0)
    assert code == 1
    assert "another evaluation uses this folder" in only_line(errors)
    assert evaluate(toy / "data", "--grounding-images", 0) == (0, [])


def test_a_folder_that_cannot_be_written_is_named_in_one_line(evaluate, toy, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/nowhere"), tmp_path / ("a" * 300)):
        code, errors = evaluate(toy / "data", "--grounding-images", 0, out=out)
        assert code == 1
        assert "cannot be written" in only_line(errors)
        assert str(out) in errors[0]


@pytest.mark.parametrize("size", ["4k", "64k"])
def test_a_full_disk_is_named_in_one_line(evaluate, toy, small_disk, size):
    disk = small_disk(size)
    code, errors = evaluate(toy / "data", "--grounding-images", 20, out=disk / "out")
    assert code == 1
    assert "cannot be written (No space left on device" in only_line(errors)


# Privacy of reports, and kills.


def test_a_report_holds_no_paths(evaluate, data, saved, tmp_path, monkeypatch):
    home = tmp_path / "home" / "somebody"
    home.mkdir(parents=True)
    shutil.copytree(saved, home / "model" / "best")
    shutil.copytree(data, home / "dataset")
    (home / "album").mkdir()
    square(1)[0].save(home / "album" / "a.png")
    (home / "album" / "b.png").write_bytes(b"")
    monkeypatch.chdir(home / "album")
    models = (home / "model" / "best", home / "gone")
    code, _ = evaluate(home / "dataset", "--images", ".", "--grounding-images", 20, models=models)
    assert code == 1
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= {".json", ".jsonl", ".html", ".md", ".png"}
    for path in written:
        text = path.read_bytes().decode("utf-8", "replace")
        assert "somebody" not in text, path
        assert str(tmp_path) not in text, path
        if path.suffix != ".png":  # whose compressed bytes hold any short name by chance
            assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text), path
    settings = results(tmp_path / "out")["settings"]
    assert (settings["dataset"], settings["images"]) == ("dataset", "album")


@pytest.mark.slow
def test_a_killed_evaluation_resumes_to_the_same_results(run, toy, saved, tmp_path):
    options = ["evaluate", "--model", saved, "--dataset", toy / "data", "--split", "train", "--limit", 60]
    options += ["--max-new-tokens", 40, "--grounding-images", 20, "--out"]
    assert run(*options, tmp_path / "whole")[0] == 0
    out = tmp_path / "out"
    killed = 0
    for share in (0.05, 0.6):
        command = [sys.executable, "-m", "nanovlm_hf.cli", *map(str, options), str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and lines_of(out) < share * lines_of(tmp_path / "whole"):
            time.sleep(0.005)
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed
    code, _, errors = run(*options, out)
    assert code == 0, errors
    assert without_timings(out) == without_timings(tmp_path / "whole")
    assert {path.name for path in out.rglob("*")} == {path.name for path in (tmp_path / "whole").rglob("*")}
    assert not [path for path in out.rglob("*.partial") if os.path.getsize(path)]


def lines_of(folder: Path) -> int:
    """Return how many completions the folder of an evaluation holds."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("completions/*.jsonl"))

"""`nanovlm evaluate` end to end on the toy dataset, and the models that it can compare."""

import json
import os
import re
import shutil

import pytest
from PIL import Image

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration
from nanovlm_hf.chat.endpoint import Endpoint
from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.evaluation.completions import Row, complete_items, read_rows
from nanovlm_hf.evaluation.generators import Generated, Generator, join, load_generator, short_name
from nanovlm_hf.evaluation.item_sets import ItemSet
from nanovlm_hf.evaluation.items import (
    Item,
    fingerprint,
    items_of_dataset,
    items_of_folder,
    load_rows,
    prefix_of,
    read_ids,
)
from nanovlm_hf.evaluation.judge import CRITERIA, JudgeSettings
from nanovlm_hf.evaluation.report import write_report
from nanovlm_hf.evaluation.run import EvaluationSettings, evaluate

from helpers import tiny_baselines
from helpers.browser import CHROMIUM, browse
from helpers.models import random_image
from helpers.output import only_line
from helpers.servers import serve
from helpers.toy_data import square


@pytest.fixture(scope="module", params=["blip", "git", "kosmos2", "smolvlm"])
def baseline(request, tmp_path_factory) -> Generator:
    folder = getattr(tiny_baselines, request.param)(tmp_path_factory.mktemp(request.param))
    return load_generator(str(folder), max_new_tokens=6)


def test_baselines_continue_the_prefix(baseline):
    """Models of the baselines' classes use the image, keep the prefix, and add to it."""
    image = random_image(0, size=(224, 224))
    generated = baseline.complete(image, "there is a big")
    assert generated.text.startswith("there is a big")
    assert 1 <= generated.new_tokens <= 6
    assert baseline.complete(image, "there is a big") == generated
    assert generated.text.replace(" ", "") == f"thereisabig{generated.completion}".replace(" ", "")
    assert "there is" not in generated.completion
    seen = [baseline.inputs(one, "there is a big")["pixel_values"] for one in (image, random_image(9, size=(224, 224)))]
    assert not (seen[0] == seen[1]).all()
    assert baseline.parameters == sum(parameter.numel() for parameter in baseline.model.parameters())


def test_nanovlm_completes_a_prefix():
    generator = load_generator("mini-short", max_new_tokens=12)
    generated = generator.complete(square(0)[0], "There is a big")
    assert generated.text == join("There is a big", generated.completion)
    assert generated.new_tokens == 12
    assert "<image>" not in generated.text
    with pytest.raises(InputError, match=r"a prefix of 300\d tokens leaves no room"):
        generator.complete(square(0)[0], " dog" * 3000 + " x")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothing", "not a local folder, a Hub id"),
        ("nobody/nothing", "--model nobody/nothing: "),
    ],
)
def test_missing_models(name, problem):
    with pytest.raises(InputError, match=problem):
        load_generator(name)


def test_a_model_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_generator(str(tmp_path))


def test_short_names():
    assert short_name("microsoft/git-base") == "git-base"
    assert short_name("runs/mini_short/best") == "mini_short-best"
    assert short_name("mini-short") == "mini-short"


def test_join():
    assert join("A dog", "runs.") == "A dog runs."
    assert join("A dog", ", then.") == "A dog, then."
    assert join("A dog", "") == "A dog"


def test_prefixes():
    assert prefix_of("one two three four", 3) == "one two three"
    assert prefix_of("one two", 7) == "one"
    assert prefix_of("one", 7) == "one"


def test_items_of_a_dataset(toy):
    every = items_of_dataset(str(toy / "data"), "short", split="validation")
    few = items_of_dataset(str(toy / "data"), "short", split="validation", limit=3)
    assert [item.item_id for item in few] == [item.item_id for item in every[:3]]
    assert few[0].reference.startswith(few[0].prefix + " ")
    assert len(few[0].prefix.split()) == 5, "a text of six words"
    assert few[0].image.size == (224, 224)
    assert len(few[0].captions) == 2
    ids = [int(every[4].item_id), int(every[1].item_id)]
    chosen = items_of_dataset(str(toy / "data"), "short", split="validation", ids=ids)
    assert [item.item_id for item in chosen] == [every[4].item_id, every[1].item_id]
    with pytest.raises(InputError, match="--items: image 5 is not in the validation split"):
        items_of_dataset(str(toy / "data"), "short", split="validation", ids=[5])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_rows(str(toy / "data"), "short", "poems")


def test_items_of_a_folder(tmp_path, capsys):
    with pytest.raises(InputError, match="not a folder"):
        items_of_folder(tmp_path / "none", "A")
    with pytest.raises(InputError, match="there is no image in this folder"):
        items_of_folder(tmp_path, "A")
    square(1)[0].save(tmp_path / "b.png")
    square(2)[0].save(tmp_path / "a.jpg")
    items = items_of_folder(tmp_path, "There is a")
    assert [(item.item_id, item.prefix, item.reference) for item in items] == [
        ("a.jpg", "There is a", None),
        ("b.png", "There is a", None),
    ]
    (tmp_path / "0.png").write_bytes(b"nothing")
    (tmp_path / "c.png").write_bytes(b"")
    assert items_of_folder(tmp_path, "There is a") == items
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1].split("/")[-1] for line in lines] == ["0.png", "c.png"]
    assert items_of_folder(tmp_path, "There is a", limit=1) == items[:1], "those that can be opened count"
    assert items_of_folder(tmp_path, "There is a", limit=100) == items
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="none of its images can be opened"):
        items_of_folder(tmp_path, "There is a")


def test_an_image_whose_name_is_not_utf8_can_be_reported(tmp_path):
    square(1)[0].save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    (item,) = items_of_folder(tmp_path, "A")
    assert item.item_id == "caf\\xe9.png"
    assert fingerprint([item])


def test_id_lists(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("# the curated ones\n12\n\n7\n")
    assert read_ids(path) == [12, 7]
    for content, problem in (("12\nx7\n", "line 2 is not an image_id: 'x7'"), ("# none\n", "the list has no image_id")):
        path.write_text(content)
        with pytest.raises(InputError, match=problem):
            read_ids(path)


class Counting(Generator):
    """Completes with the number of calls, and raises at one of them."""

    def __init__(self, model, dies_at=None):
        super().__init__("counting", model, None)
        self.calls, self.dies_at = 0, dies_at

    def complete(self, image, prefix):
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return Generated(f"{prefix} {self.calls}", str(self.calls), 1)


def test_completions_are_generated_once(tmp_path, toy):
    model = NanoVLMForConditionalGeneration.from_pretrained(SHIPPED["mini-short"])
    items = items_of_dataset(str(toy / "data"), "short", split="validation", limit=5)
    with pytest.raises(KeyboardInterrupt):
        complete_items(Counting(model, dies_at=4), "counting", items, tmp_path)
    path = tmp_path / "counting.jsonl"
    assert len(read_rows(path)) == 3
    with path.open("a") as file:
        file.write('{"item_id": "half')  # a kill in the middle of a line
    second = Counting(model)
    rows, about = complete_items(second, "counting", items, tmp_path)
    assert second.calls == 2
    assert [row.completion for row in rows] == ["1", "2", "3", "1", "2"]
    assert about["memory_mib"] > 50
    assert about["parameters"] == load_generator("mini-short").parameters
    third = Counting(model)
    assert complete_items(third, "counting", items, tmp_path) == (rows, about)
    assert third.calls == 0
    with path.open("ab") as file:
        file.write('{"item_id": "caf\u00e9'.encode()[:-1])  # a kill in the middle of a character
    assert complete_items(third, "counting", items, tmp_path) == (rows, about)
    for content, problem in (("[]", "not a file"), ('{"memory_mib": "x"}', "differ in model"), ("{", "not JSON")):
        (tmp_path / "counting.json").write_text(content)
        with pytest.raises(InputError, match=rf"counting\.jsonl?: .*{problem}"):
            complete_items(third, "counting", items, tmp_path)
    assert "transformers_version" not in about["settings"]
    earlier = about | {"settings": about["settings"] | {"transformers_version": "4.57.0"}}
    (tmp_path / "counting.json").write_text(json.dumps(earlier))  # as earlier versions of this package wrote it
    assert complete_items(third, "counting", items, tmp_path)[0] == rows
    (tmp_path / "counting.json").write_text(json.dumps(about))
    third.settings = third.settings | {"max_new_tokens": 3}
    with pytest.raises(InputError, match="these completions differ in settings: remove the file"):
        complete_items(third, "counting", items, tmp_path)
    with pytest.raises(InputError, match="these completions differ in items"):
        complete_items(Counting(model), "counting", items[:4], tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory, toy, saved):
    """A report of two models with a judge and out-of-domain images."""
    folder = tmp_path_factory.mktemp("evaluation")
    drawings = folder / "drawings"
    drawings.mkdir()
    for number in range(2):
        square(number)[0].rotate(30).save(drawings / f"{number}.png")
    baseline = tiny_baselines.git(folder / "git-tiny")
    with serve("chat_server.py", folder / "server") as server:
        settings = EvaluationSettings(
            models=[str(shutil.copytree(saved, folder / "mini-short")), str(baseline)],
            dataset=str(toy / "data"),
            variant="short",
            out=folder / "report",
            split="validation",
            limit=4,
            images=drawings,
            prefix="There is a",
            max_new_tokens=12,
            grounding_images=12,
            judge=JudgeSettings("judge-1"),
            endpoint=Endpoint("judge-1", base_url=f"{server.url}/v1"),
            judge_sees_image=True,
        )
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("OPENAI_API_KEY", "sk-test-secret")
            first = evaluate(settings)
            requests = len(server.entries())
            assert evaluate(settings) == first
            assert len(server.entries()) == requests == 12, "completions, grounding and grades are reused"
    return folder / "report"


def test_the_results(report):
    folder = report
    results = json.loads((folder / "results.json").read_text())
    assert list(results["models"]) == ["mini-short", "git-tiny"]
    assert list(results["grounding"]) == ["mini-short"]
    assert results["grounding"]["mini-short"]["photos"] == 12
    for name, number in (("in_domain", 4), ("out_of_domain", 2)):
        measured = results["sets"][name]
        assert measured["items"] == number
        for model in ("mini-short", "git-tiny"):
            own = measured["models"][model]
            assert own["seconds_per_completion"] > 0
            assert len(own["originality"]["rows"]) == number
            assert 0 <= own["coherence"]["known_words"] <= 1
            assert measured["judge"]["models"][model]["missing"] == 0
    lines = results["sets"]["in_domain"]["judge"]["lines"]
    assert len(lines) == 8
    graded = results["sets"]["in_domain"]["judge"]["models"]["mini-short"]["total"]["mean"]
    assert graded == pytest.approx(sum(line["total"] for line in lines if line["model"] == "mini-short") / 4)
    written = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".html", ".md")]
    everything = "".join(path.read_text() for path in written)
    assert "sk-test-secret" not in everything
    assert str(folder.parent) not in everything, "paths are not published"


def test_the_pages_state_the_results(report):
    folder = report
    results = json.loads((folder / "results.json").read_text())
    text = (folder / "report.md").read_text()
    total = results["sets"]["in_domain"]["judge"]["models"]["mini-short"]["total"]["mean"]
    row = next(line for line in text.splitlines() if line.startswith("| mini-short |"))
    assert f"| {total:.2f} [" in row
    assert "| Kosmos-2 in the paper (1.3B) | 8.73 | 7.15 | 9.15 | 8.15 | 6.68 | 39.86 | - |" in text
    assert "another judge and other items" in text
    assert f"{results['grounding']['mini-short']['eval_loss']:.3f}" in text
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        assert Image.open(folder / name).size[0] > 500
    page = (folder / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "the page is self-contained"
    rows = read_rows(folder / "completions" / "mini-short.jsonl")
    for row in rows:
        assert row.completion.replace("'", "&#39;") in page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_in_a_browser(report, tmp_path):
    folder = report
    for name, options in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        shot = tmp_path / f"{name}.png"
        browse((folder / "index.html").as_uri(), f"--screenshot={shot}", "--window-size=1200,2400", *options)
        image = Image.open(shot).convert("L")
        corner = image.getpixel((5, 5))
        assert corner > 200 if name == "light" else corner < 60
        assert image.getextrema()[1] - image.getextrema()[0] > 150
    page = browse((folder / "index.html").as_uri(), "--dump-dom").stdout
    assert page.count("<article>") == 6
    assert "Out-of-domain" in page


@pytest.mark.slow
def test_a_judge_that_is_down_does_not_prevent_the_report(run, toy, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    options = ("--split", "validation", "--limit", 2, "--max-new-tokens", 4, "--grounding-images", 0)
    with serve("chat_server.py", tmp_path / "server") as server:
        code, _, errors = run(
            *("evaluate", "--model", "mini-short", "--dataset", toy / "data", "--out", tmp_path / "out", *options),
            *("--judge", "gpt-4o", "--judge-base-url", f"{server.url}/v1"),
        )
    assert code == 1
    assert "rejected by" in errors[-1]
    assert "sk-wrong" not in "".join(errors)
    assert (tmp_path / "out" / "index.html").exists()
    assert "judge" not in json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["in_domain"]


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        ((), 2, "--model, --dataset and --out are required"),
        (("--variant", "poem"), 2, "--variant poem: choose short or long"),
        (("--judge", "gpt-4o"), 2, "OPENAI_API_KEY is not set"),
        (("--judge", "mine", "--max-cost", 1), 2, "--max-cost: the price of mine is not known"),
        (("--dataset", "nowhere"), 1, "--dataset nowhere (short, test): cannot be loaded"),
        (("--items", "nowhere.txt"), 1, "nowhere.txt"),
        (("--model", "mini-short", "--model", "mini-short"), 1, "two models have the short name mini-short"),
    ],
)
def test_wrong_usage(run, toy, tmp_path, monkeypatch, options, code, problem):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    given = ("--model", "mini-short", "--dataset", toy / "data", "--out", tmp_path / "out") if options else ()
    got, _, errors = run("evaluate", *given, *options)
    assert got == code
    assert problem in only_line(errors)


HOSTILE = "<script>alert(1)</script> | *x* [a](http://e.org) ![i](x) `c` $x_{y$ \n# h\n\n<img src=x> \x1b[2J\u2028_y_"


def test_foreign_text_is_inert_in_the_reports(tmp_path):
    """Names, settings, prefixes, completions and replies of a judge are escaped, in Markdown as in HTML."""
    interval = {"mean": 1.0, "low": 1.0, "high": 1.0, "items": 1}
    none = {"mean": None, "low": None, "high": None, "items": 0}
    measured = {
        "parameters": 10,
        "seconds_per_completion": 1.0,
        "tokens_per_second": 1.0,
        "memory_mib": 1,
        "coherence": {"words": 1.0, "repetition_rate": 0, "end_rate": 0, "empty_rate": 0, "known_words": 0},
        "originality": {
            **dict.fromkeys(("rouge1_reference", "rouge1_nearest", "rouge1_nearest_whole", "distinct_1"), 0.1),
            **dict.fromkeys(("rouge1_nearest_share_below_half", "rouge1_nearest_whole_share_below_half"), 0.1),
            **{"distinct_2": 0.1, "longest_copy_words": 1.0},
            "rows": [{"rouge1_nearest": 0.1, "rouge1_nearest_whole": 0.1}],
        },
        "mentions": {"precision": none, "recall": none, "rows": [{"unseen": [HOSTILE]}]},
    }
    line = {"item_id": HOSTILE, "model": HOSTILE, "scores": None, "total": None, "missing": HOSTILE, "flagged": HOSTILE}
    judge = {
        **{"judge": HOSTILE, "dates": [HOSTILE], "prompt_sha256": "x", "parameters": {"stop": HOSTILE}, "repeats": 1},
        **{"paper_prompt": False, "texts_delimited": True, "sees_the_photo": True},
        "models": {HOSTILE: {"scores": dict.fromkeys(CRITERIA, interval), "total": interval, "missing": 1}},
        **{"missing_reasons": {HOSTILE: 1}, "flagged": [line], "lines": [line]},
    }
    grades = {"item_id": HOSTILE, "model": HOSTILE, "source": "model", "scores": dict.fromkeys(CRITERIA, 1)}
    means = {"model": HOSTILE, "source": "model", "missing": 0}
    grader = {
        **{"grader": "<img src=x> | *x*", "date": "2026-01-31", "kind": "text", "sheet": "abc"},
        **{"texts": 1, "missing": 0},
        "models": [means | {"scores": dict.fromkeys((*CRITERIA, "total"), interval)}],
        "flagged": [{"item_id": HOSTILE, "model": HOSTILE, "total": 5, "flagged": HOSTILE}],
        "lines": [grades],
    }
    results = {
        "graders": [grader],
        "settings": {"dataset": HOSTILE, "variant": "short", "split": HOSTILE, "prefix": HOSTILE},
        "models": {HOSTILE: {"model": HOSTILE}},
        "grounding": {},
        "sets": {"in_domain": {"models": {HOSTILE: measured}, "judge": judge}},
    }
    item = Item(HOSTILE, square(0)[0], HOSTILE, HOSTILE)
    row = Row(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    write_report(tmp_path, results, [ItemSet("in_domain", [item], tmp_path, {HOSTILE: [row]})])
    text = (tmp_path / "report.md").read_text()
    for part in ("<script", "<img", "\x1b", "\u2028", "](http", "![i]", "`c`", "*x*"):
        assert part not in text
    assert text.count("&lt;script&gt;") > 8
    assert "Texts to check" in text
    assert "\n# h" not in text
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    assert len(tables) == 7
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1, "every row has the header's cells"
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page
    assert "<img src=x>" not in page
    assert "Texts to check" in page


def test_unknown_fields_of_rows_are_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"item_id": "1", "model": "m", "prefix": "a", "text": "a b", "completion": "b", "more": 1}\n\n')
    assert read_rows(path) == [Row("1", "m", "a", "a b", "b")]

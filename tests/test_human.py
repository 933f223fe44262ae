"""The rating form in a real browser, and statistics of raters' files."""

import json
import math
import re
import subprocess

import numpy as np
import pytest

from nanovlm_hf import InputError
from nanovlm_hf.errors import UsageError
from nanovlm_hf.evaluation.completions import Row
from nanovlm_hf.evaluation.human import krippendorff_alpha, score_ratings, write_sheet
from nanovlm_hf.evaluation.judge import CRITERIA
from nanovlm_hf.files import write_json

from helpers.browser import CHROMIUM, browse
from helpers.output import only_line
from helpers.toy_data import square

ROWS = [
    Row(
        str(item),
        model,
        "There is a",
        f"There is a dog, {item} <b> & '{model[0]}'.",
        f"dog, {item} <b> & '{model[0]}'.",
    )
    for item in range(4)
    for model in ("mini-secret", "base-secret")
]


@pytest.fixture
def sheet(tmp_path):
    key = write_sheet(ROWS, {"0": square(0)[0]}, tmp_path / "sheet.html")
    return tmp_path / "sheet.html", key


def test_the_form_is_blind_and_shuffled(sheet):
    page, key = sheet
    text = page.read_text()
    assert "secret" not in text
    assert "\\u003cb\\u003e" in text, "completions are text, not markup"
    content = json.loads(key.read_text())
    order = [(item["item_id"], item["model"]) for item in content["items"]]
    assert sorted(order) == sorted((row.item_id, row.model) for row in ROWS)
    assert order != [(row.item_id, row.model) for row in ROWS]
    assert content["sheet"] in text


def test_the_key_of_another_form_is_kept(sheet, tmp_path):
    page, key = sheet
    before = key.read_text()
    write_sheet(ROWS, {}, page)
    assert key.read_text() == before, "the same form"
    with pytest.raises(UsageError, match=r"sheet\.key\.json belongs to another sheet"):
        write_sheet(ROWS[:4], {}, page)
    assert key.read_text() == before


def ratings_of(key, tmp_path, name, rate):
    content = json.loads(key.read_text())
    ratings = {
        str(place): {criterion: value for criterion in CRITERIA if (value := rate(place, criterion)) is not None}
        for place in range(len(content["items"]))
    }
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"sheet": content["sheet"], "rater": name, "ratings": ratings}))
    return path


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_form_in_a_browser(sheet, tmp_path):
    """Keys rate, and `human-score` reads the saved file."""
    page, key = sheet
    script = """
    const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    window.addEventListener("load", () => {
      for (let n = 0; n < items.length; n++) { for (const key of ["7", "x", "0", "9", "3"]) press(key); press("n") }
      press("p"); press("5");
      document.body.dataset.state = JSON.stringify(state);
      URL.createObjectURL = blob => { blob.text().then(text => document.body.dataset.saved = text); return "#" };
      document.getElementById("save").click();
    });
    """
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text().replace("show();\n</script>", "show();\n" + script + "</script>"))
    dom = browse(driven.as_uri(), "--dump-dom").stdout
    saved = re.search(r'data-saved="(.*?)"', dom, re.DOTALL)[1].replace("&quot;", '"')
    assert f"{len(ROWS)} of {len(ROWS)} rated" in dom
    (tmp_path / "rater.json").write_text(saved)
    result = score_ratings(key, [tmp_path / "rater.json"])
    means = [result["models"]["mini-secret"][name]["mean"] for name in CRITERIA]
    assert means[1:] == [10, 0, 9, 3]
    assert 5 <= means[0] <= 7
    assert result["alpha"] == dict.fromkeys(CRITERIA)
    shot = tmp_path / "sheet.png"
    browse(page.as_uri(), f"--screenshot={shot}", "--window-size=900,900")
    assert shot.stat().st_size > 20_000


def test_alpha_equals_that_of_a_published_example():
    """Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), section D: four observers, twelve units."""
    nan = math.nan
    data = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
            [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
        ]
    )
    assert krippendorff_alpha(data) == pytest.approx(0.849, abs=0.0005)
    assert krippendorff_alpha(data[:1]) is None
    assert krippendorff_alpha(np.full((2, 5), 3.0)) is None


def test_several_raters_and_a_judge(sheet, run, tmp_path):
    _, key = sheet
    whose = [item["model"] for item in json.loads(key.read_text())["items"]]

    def first(place, criterion):
        return 8 if whose[place].startswith("base") else 4

    def second(place, criterion):
        return None if place == 0 and criterion == "plot" else first(place, criterion) + (place % 2)

    files = [ratings_of(key, tmp_path, "ann", first), ratings_of(key, tmp_path, "bob", second)]
    lines = [
        {"item_id": row.item_id, "model": row.model, "scores": dict.fromkeys(CRITERIA, 9 if "base" in row.model else 2)}
        for row in ROWS[:-1]
    ]
    write_json(tmp_path / "judge.json", {"lines": [*lines, {"item_id": "3", "model": "base-secret", "scores": None}]})
    options = [text for path in files for text in ("--ratings", path)]
    code, said, errors = run(
        "evaluate",
        "human-score",
        "--key",
        key,
        *options,
        "--judge",
        tmp_path / "judge.json",
        "--out",
        tmp_path / "o.json",
    )
    assert code == 0, errors
    result = json.loads((tmp_path / "o.json").read_text())
    base = result["models"]["base-secret"]
    assert base["grammar"]["mean"] == pytest.approx(
        8 + 0.5 * np.mean([p % 2 for p, w in enumerate(whose) if w[0] == "b"])
    )
    assert base["total"]["mean"] > 39
    assert result["models"]["mini-secret"]["plot"]["items"] == 4
    assert 0.7 < result["alpha"]["grammar"] < 1
    assert result["judge"]["grammar"]["items"] == 7
    assert result["judge"]["grammar"]["pearson"] > 0.95
    assert 0.8 < result["judge"]["grammar"]["spearman"] <= 1
    assert len(said) == 2 + 1 + 5
    assert said[2].startswith("alpha between 2 raters: grammar 0.")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content | {"sheet": "other"}, "belong to another sheet"),
        (lambda content: content | {"ratings": {"0": {"plot": 11}}}, "item 0, plot: 11 is not a rating from 0 to 10"),
        (lambda content: content | {"ratings": {"99": {"plot": 1}}}, "item 99, plot"),
        (lambda content: content | {"ratings": {"0": {"wit": 1}}}, "item 0, wit"),
        (lambda content: content | {"ratings": {"0": {"plot": True}}}, "item 0, plot: True is not a rating"),
        (lambda content: content | {"ratings": {"0": {"plot": 7.5}}}, "item 0, plot: 7.5 is not a rating"),
        (lambda content: content | {"ratings": {"0": {"plot": math.nan}}}, "item 0, plot: nan is not a rating"),
        (lambda content: content | {"ratings": {"0": {"plot": 10**100}}}, "item 0, plot: 1000"),
        (lambda content: content | {"ratings": {"00": {"plot": 1}}}, "item 00, plot"),
        (lambda content: content | {"ratings": {"\u0660": {"plot": 1}}}, "item \u0660, plot"),
        (lambda content: content | {"ratings": {"9" * 5000: {"plot": 1}}}, "item 999"),
        (lambda content: content | {"ratings": {"\x1b[2J\n": {"plot": 1}}}, "item \ufffd[2J , plot"),
        (lambda content: content | {"ratings": [1]}, "ratings: Input should be a valid dictionary"),
        (lambda content: content | {"ratings": {"0": 7}}, "ratings: 0: Input should be a valid dictionary"),
        (lambda content: content | {"ratings": {}}, "the file has no ratings"),
        (lambda content: content | {"ratings": {"0": {}}}, "the file has no ratings"),
        (lambda content: [], "belong to another sheet"),
    ],
)
def test_invalid_ratings(sheet, run, tmp_path, change, problem):
    _, key = sheet
    path = ratings_of(key, tmp_path, "ann", lambda place, criterion: 5)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    code, _, errors = run("evaluate", "human-score", "--key", key, "--ratings", path)
    assert code == 1
    assert problem in only_line(errors)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda key: [], "Input should be a valid dictionary"),
        (lambda key: {}, "sheet: Field required"),
        (lambda key: key | {"sheet": 3}, "sheet: Input should be a valid string"),
        (lambda key: key | {"items": []}, "items: List should have at least 1 item"),
        (lambda key: key | {"items": [7]}, "items.0: Input should be a valid dictionary"),
        (
            lambda key: key | {"items": [{"item_id": 1, "model": "m"}]},
            "items.0.item_id: Input should be",
        ),
        (lambda key: key | {"items": [{"item_id": "1"}]}, "items.0.model: Field required"),
        (lambda key: key | {"items": key["items"][:1] * 2}, "appears twice"),
    ],
)
def test_invalid_keys(sheet, run, tmp_path, change, problem):
    _, key = sheet
    path = ratings_of(key, tmp_path, "ann", lambda place, criterion: 5)
    key.write_text(json.dumps(change(json.loads(key.read_text()))))
    code, _, errors = run("evaluate", "human-score", "--key", key, "--ratings", path)
    assert code == 1
    assert f"sheet.key.json: {problem}" in only_line(errors) or problem == "appears twice"
    assert problem in only_line(errors)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "the file has no grades of a judge"),
        ({}, "the file has no grades of a judge"),
        ({"lines": []}, "the file has no grades of a judge"),
        ({"sets": {"in_domain": []}}, "the file has no grades of a judge"),
        ({"sets": {"in_domain": {"judge": {"lines": 7}}}}, "lines: Input should be a valid list"),
        ({"lines": [7]}, "lines: 0: Input should be a valid dictionary"),
        ({"lines": [{"model": "m", "scores": None}]}, "lines: 0.item_id: Field required"),
        ({"lines": [{"item_id": "1", "model": "m", "scores": [1]}]}, "lines: 0.scores: Input should be a valid dict"),
        ({"lines": [{"item_id": "1", "model": "m", "scores": {"plot": 11}}]}, "lines: 0.scores.plot: Input should be"),
        ({"lines": [{"item_id": "1", "model": "m", "scores": {"plot": math.nan}}]}, "lines: 0.scores.plot: Input"),
        ({"lines": [{"item_id": "1", "model": "m", "scores": {"plot": "9"}}]}, "lines: 0.scores.plot: Input should"),
        ({"lines": [{"item_id": "1", "model": "m", "scores": {}}] * 2}, "item 1 of m appears twice"),
    ],
)
def test_invalid_grades_of_a_judge(sheet, run, tmp_path, content, problem):
    _, key = sheet
    path = ratings_of(key, tmp_path, "ann", lambda place, criterion: 5)
    (tmp_path / "judge.json").write_text(json.dumps(content))
    code, _, errors = run(
        "evaluate", "human-score", "--key", key, "--ratings", path, "--judge", tmp_path / "judge.json"
    )
    assert code == 1
    assert f"judge.json: {problem}" in only_line(errors)


def test_only_common_criteria_and_items_are_compared(sheet, run, tmp_path):
    _, key = sheet
    path = ratings_of(key, tmp_path, "ann", lambda place, criterion: place)
    lines = [{"item_id": row.item_id, "model": row.model, "scores": {"plot": int(row.item_id)}} for row in ROWS]
    write_json(tmp_path / "judge.json", {"lines": [*lines, {"item_id": "x", "model": "y", "scores": None}]})
    code, said, _ = run("evaluate", "human-score", "--key", key, "--ratings", path, "--judge", tmp_path / "judge.json")
    assert code == 0
    assert "judge, grammar: Pearson -, Spearman - over 0 texts" in said
    assert said[-1].startswith("judge, plot: Pearson 0.") or said[-1].startswith("judge, plot: Pearson -0.")


def test_a_file_of_ratings_given_twice_is_refused(sheet, run, tmp_path):
    _, key = sheet
    path = ratings_of(key, tmp_path, "ann", lambda place, criterion: place)
    code, _, errors = run("evaluate", "human-score", "--key", key, "--ratings", path, "--ratings", path)
    assert code == 1
    assert "--ratings: a file is given twice" in only_line(errors)


def test_a_sheet_of_one_text_and_names_with_control_characters(run, tmp_path):
    line = {"item_id": "1\x1b[2J", "model": "m\n\x07|<b>", "prefix": "A", "text": "A dog.", "completion": "dog."}
    (tmp_path / "c.jsonl").write_text(json.dumps(line) + "\n")
    options = ("--completions", tmp_path / "c.jsonl", "--out", tmp_path / "s.html")
    assert run("evaluate", "human-sheet", *options)[0] == 0
    path = ratings_of(tmp_path / "s.key.json", tmp_path, "ann", lambda place, criterion: 5)
    code, said, errors = run("evaluate", "human-score", "--key", tmp_path / "s.key.json", "--ratings", path)
    assert (code, errors) == (0, [])
    assert said[0].startswith("m \ufffd|<b>: grammar 5.00 [5.00, 5.00]")
    code, _, errors = run("evaluate", "human-sheet", *options, "--completions", tmp_path / "c.jsonl")
    assert code == 1
    assert "item 1\ufffd[2J of m \ufffd|<b> appears twice" in only_line(errors)
    code, _, errors = run("evaluate", "human-sheet", *options, "--dataset", tmp_path)
    assert code == 1
    assert "the images of these completions are in no dataset" in only_line(errors)


def test_ratings_must_be_json(sheet, tmp_path):
    (tmp_path / "ratings.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        score_ratings(sheet[1], [tmp_path / "ratings.json"])


def test_the_command_shows_the_images(run, toy, tmp_path):
    from nanovlm_hf.evaluation.items import items_of_dataset

    items = items_of_dataset(str(toy / "data"), "short", "validation", limit=3)
    lines = [
        {"item_id": item.item_id, "model": model, "prefix": "A", "text": "A dog.", "completion": "dog."}
        for item in items
        for model in ("one", "two")
    ]
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "sheet.html"
    options = ("--completions", path, "--out", out, "--dataset", toy / "data", "--split", "validation", "--limit", 2)
    code, said, errors = run("evaluate", "human-sheet", *options)
    assert code == 0, errors
    assert said[0].startswith(f"{out}: 4 texts; ")
    assert out.read_text().count("data:image/webp;base64,") == 4
    assert run("evaluate", "human-sheet", "--completions", path, "--out", tmp_path / "a.txt")[0] == 2
    assert subprocess.run(["grep", "-c", "two", out], capture_output=True, text=True).stdout.strip() == "0"

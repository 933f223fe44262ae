"""`nanovlm evaluate` end to end on the toy dataset, and the models that it can compare."""

import json
import re
import shutil
import subprocess

import pytest
import tiny_baselines
from conftest import only_line, picture
from PIL import Image
from servers import serve
from toy_data import square

from nanovlm_hf import InputError, NanoVLMForConditionalGeneration
from nanovlm_hf.checkpoints import SHIPPED
from nanovlm_hf.evaluation.completions import Row, complete_items, read_rows
from nanovlm_hf.evaluation.generators import Generator, join, load_generator, short_name
from nanovlm_hf.evaluation.items import items_of_dataset, items_of_folder, load_rows, prefix_of, read_ids

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module", params=["blip", "git", "kosmos2", "smolvlm"])
def baseline(request, tmp_path_factory) -> Generator:
    folder = getattr(tiny_baselines, request.param)(tmp_path_factory.mktemp(request.param))
    return load_generator(str(folder), max_new_tokens=6)


def test_baselines_go_on_from_the_prefix(baseline):
    """Models of the baselines' own classes: they see the photo, keep the prefix, and add to it."""
    image = picture(0, size=(224, 224))
    made = baseline.complete(image, "there is a big")
    assert made.text.startswith("there is a big")
    assert 1 <= made.new_tokens <= 6
    assert baseline.complete(image, "there is a big") == made
    assert made.text.replace(" ", "") == f"thereisabig{made.completion}".replace(" ", "")
    assert "there is" not in made.completion
    seen = [baseline.inputs(one, "there is a big")["pixel_values"] for one in (image, picture(9, size=(224, 224)))]
    assert not (seen[0] == seen[1]).all()
    assert baseline.parameters == sum(parameter.numel() for parameter in baseline.model.parameters())


def test_our_own_model():
    generator = load_generator("mini-short", max_new_tokens=12)
    made = generator.complete(square(0)[0], "There is a big")
    assert made.text == join("There is a big", made.completion)
    assert made.new_tokens == 12
    assert "<image>" not in made.text
    with pytest.raises(InputError, match=r"a prefix of 300\d tokens leaves no room"):
        generator.complete(square(0)[0], " dog" * 3000 + " x")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothing", "this is no folder, no Hub id"),
        ("nobody/nothing", "--model nobody/nothing: "),
    ],
)
def test_models_that_are_none(name, problem):
    with pytest.raises(InputError, match=problem):
        load_generator(name)


def test_a_model_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_generator(str(tmp_path))


def test_names_for_tables():
    assert short_name("microsoft/git-base") == "git-base"
    assert short_name("runs/mini_short/best") == "mini_short-best"
    assert short_name("mini-short") == "mini-short"


def test_joining():
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
    with pytest.raises(InputError, match="--items: photo 5 is not in the validation split"):
        items_of_dataset(str(toy / "data"), "short", split="validation", ids=[5])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_rows(str(toy / "data"), "short", "poems")


def test_items_of_a_folder(tmp_path):
    with pytest.raises(InputError, match="this is no folder"):
        items_of_folder(tmp_path / "none", "A")
    with pytest.raises(InputError, match="there is no photo in this folder"):
        items_of_folder(tmp_path, "A")
    square(1)[0].save(tmp_path / "b.png")
    square(2)[0].save(tmp_path / "a.jpg")
    items = items_of_folder(tmp_path, "There is a")
    assert [(item.item_id, item.prefix, item.reference) for item in items] == [
        ("a.jpg", "There is a", None),
        ("b.png", "There is a", None),
    ]
    (tmp_path / "c.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"c\.png: is no picture"):
        items_of_folder(tmp_path, "There is a")


def test_lists_of_ids(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("# the curated ones\n12\n\n7\n")
    assert read_ids(path) == [12, 7]
    for content, problem in (("12\nx7\n", "line 2 is no image_id: 'x7'"), ("# none\n", "there is no image_id in it")):
        path.write_text(content)
        with pytest.raises(InputError, match=problem):
            read_ids(path)


class Counting(Generator):
    """Says its own count, and dies where it is told to."""

    def __init__(self, model, dies_at=None):
        super().__init__("counting", model, None)
        self.calls, self.dies_at = 0, dies_at

    def complete(self, image, prefix):
        from nanovlm_hf.evaluation.generators import Generated

        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return Generated(f"{prefix} {self.calls}", str(self.calls), 1)


def test_completions_are_made_once(tmp_path, toy):
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
    third.settings = third.settings | {"max_new_tokens": 3}
    with pytest.raises(InputError, match="these completions are of other settings: remove the file"):
        complete_items(third, "counting", items, tmp_path)
    with pytest.raises(InputError, match="these completions are of other items"):
        complete_items(Counting(model), "counting", items[:4], tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory, toy):
    """A report of two models, a judge, and photos out of the domain."""
    folder = tmp_path_factory.mktemp("evaluation")
    drawings = folder / "drawings"
    drawings.mkdir()
    for number in range(2):
        square(number)[0].rotate(30).save(drawings / f"{number}.png")
    baseline = tiny_baselines.git(folder / "git-tiny")
    with serve("chat_server.py", folder / "server") as server:
        command = ["nanovlm", "evaluate", "--model", "mini-short", "--model", baseline, "--dataset", toy / "data"]
        command += ["--split", "validation", "--limit", 4, "--out", folder / "report", "--images", drawings]
        command += ["--max-new-tokens", 12, "--judge", "judge-1", "--judge-base-url", f"{server.url}/v1"]
        command += ["--judge-sees-photo", "--grounding-photos", 12]
        environment = {"OPENAI_API_KEY": "sk-test-secret"}
        done = _nanovlm(command[1:], environment)
        assert done.returncode == 0, done.stderr[-2000:]
        asked = len(server.entries())
        again = _nanovlm(command[1:], environment)
        assert again.returncode == 0, again.stderr[-2000:]
        assert len(server.entries()) == asked == 12, "completions, grounding and grades are taken from the folder"
    return folder / "report"


def _nanovlm(arguments, environment):
    import os
    import sys

    return subprocess.run(
        [sys.executable, "-m", "nanovlm_hf.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


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
    assert str(folder.parent) not in everything, "nobody learns where the folders are"


def test_the_pages_say_what_was_measured(report):
    folder = report
    results = json.loads((folder / "results.json").read_text())
    text = (folder / "report.md").read_text()
    total = results["sets"]["in_domain"]["judge"]["models"]["mini-short"]["total"]["mean"]
    row = next(line for line in text.splitlines() if line.startswith("| mini-short |"))
    assert f"| {total:.2f} [" in row
    assert "| Kosmos-2, the paper's (1.3B) | 8.73 | 7.15 | 9.15 | 8.15 | 6.68 | 39.86 | - |" in text
    assert "another judge, other items" in text
    assert f"{results['grounding']['mini-short']['eval_loss']:.3f}" in text
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        assert Image.open(folder / name).size[0] > 500
    page = (folder / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "nothing stands beside the page"
    rows = read_rows(folder / "completions" / "mini-short.jsonl")
    for row in rows:
        assert row.completion.replace("'", "&#39;") in page


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
    assert "Out of the domain" in page


def browse(address, *options):
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        *options,
        address,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_a_judge_that_is_down_costs_nothing_else(run, toy, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    options = ("--split", "validation", "--limit", 2, "--max-new-tokens", 4, "--grounding-photos", 0)
    with serve("chat_server.py", tmp_path / "server") as server:
        code, _, errors = run(
            *("evaluate", "--model", "mini-short", "--dataset", toy / "data", "--out", tmp_path / "out", *options),
            *("--judge", "gpt-4o", "--judge-base-url", f"{server.url}/v1"),
        )
    assert code == 1
    assert "does not accept it (401)" in errors[-1]
    assert "sk-wrong" not in "".join(errors)
    assert (tmp_path / "out" / "index.html").exists()
    assert "judge" not in json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["in_domain"]


@pytest.mark.parametrize(
    ("options", "code", "problem"),
    [
        ((), 2, "--model, --dataset and --out are needed"),
        (("--variant", "poem"), 2, "--variant poem: it is short or long"),
        (("--judge", "gpt-4o"), 2, "OPENAI_API_KEY is not set"),
        (("--judge", "mine", "--max-cost", 1), 2, "--max-cost: the price of mine is not known"),
        (("--dataset", "nowhere"), 1, "--dataset nowhere (short, test): cannot be loaded"),
        (("--items", "nowhere.txt"), 1, "nowhere.txt"),
        (("--model", "mini-short", "--model", "mini-short"), 1, "two models are called mini-short"),
    ],
)
def test_wrong_use(run, toy, tmp_path, monkeypatch, options, code, problem):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    given = ("--model", "mini-short", "--dataset", toy / "data", "--out", tmp_path / "out") if options else ()
    got, _, errors = run("evaluate", *given, *options)
    assert got == code
    assert problem in only_line(errors)


def test_rows_that_others_wrote(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"item_id": "1", "model": "m", "prefix": "a", "text": "a b", "completion": "b", "more": 1}\n\n')
    assert read_rows(path) == [Row("1", "m", "a", "a b", "b")]

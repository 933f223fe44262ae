"""Grading completions against a real HTTP server that misbehaves."""

import json
import re
from dataclasses import asdict

import pytest
from conftest import only_line
from PIL import Image
from servers import serve

from nanovlm_hf.chat.client import Endpoint
from nanovlm_hf.chat.prices import estimate_tokens
from nanovlm_hf.chat.replies import ReplyStore
from nanovlm_hf.chat.terminal import asker
from nanovlm_hf.evaluation.calibration import paper_outputs
from nanovlm_hf.evaluation.completions import Row, read_rows
from nanovlm_hf.evaluation.judge import CRITERIA, Judge, JudgeSettings, paper_prompt, parse_grades

pytestmark = pytest.mark.usefixtures("api_key")

GOOD = {"grammar": 8, "creativity": 7, "consistency": 9, "meaningfulness": 6, "plot": 0}


def rows_of(number, model="mini"):
    return [
        Row(str(place), model, "There is a", f"There is a dog, number {place}.", f"dog, number {place}.")
        for place in range(number)
    ]


def write_completions(path, rows):
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def judge(run, server, tmp_path):
    def call(completions, *options, url=server.url):
        return run(
            *("evaluate", "judge", "--completions", completions, "--out", tmp_path / "out"),
            *("--base-url", f"{url}/v1", *options),
        )

    return call


def reply(text, finish_reason="stop", refusal=None):
    return {"text": text, "finish_reason": finish_reason, "refusal": refusal}


def test_grades_are_read():
    assert parse_grades(reply(json.dumps(GOOD))) == GOOD
    assert parse_grades(reply(json.dumps(GOOD | {"plot": 4.0, "why": "nice"})))["plot"] == 4


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (reply("8 out of 10"), "no JSON"),
        (reply("[1, 2]"), "no grades"),
        (reply(json.dumps(GOOD), finish_reason="length"), "cut short"),
        (reply(None, refusal="I cannot"), "refused"),
        (reply(json.dumps(GOOD | {"plot": 11})), "plot is out of range: 11"),
        (reply(json.dumps(GOOD | {"plot": -1})), "plot is out of range: -1"),
        (reply(json.dumps(GOOD | {"plot": 7.5})), "plot is no whole number: 7.5"),
        (reply(json.dumps(GOOD | {"plot": True})), "plot is no whole number: True"),
        (reply(json.dumps(GOOD | {"plot": "7"})), "plot is no whole number: '7'"),
        (reply(json.dumps(GOOD | {"plot": None})), "plot is no whole number: None"),
        (reply('{"grammar": NaN}'), "grammar is no whole number"),
    ],
)
def test_what_is_no_grade(given, problem):
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        parse_grades(given)


def test_the_papers_prompt_and_what_is_sent(tmp_path):
    assert paper_prompt().startswith("In the following exercise, the student is given a beginning of a text.")
    assert paper_prompt().endswith("each out of 10 with the text's beginning and completed text.")
    with ReplyStore(tmp_path) as store:
        request = next(map(Judge(rows_of(1), JudgeSettings("m"), store)._request, [*_missing(store)]))
    (message,) = request.messages
    assert message["content"].startswith(paper_prompt())
    assert "Text's beginning: There is a\n\nCompleted text: There is a dog, number 0." in message["content"]
    schema = request.parameters["response_format"]["json_schema"]["schema"]
    assert schema["required"] == list(CRITERIA) == list(GOOD)
    assert schema["properties"]["plot"] == {"type": "integer", "minimum": 0, "maximum": 10}


def _missing(store):
    judge = Judge(rows_of(1), JudgeSettings("m"), store)
    judge.read()
    return judge.missing()


def test_grades_of_two_models_with_repeats(judge, server, tmp_path):
    path = write_completions(tmp_path / "a.jsonl", rows_of(6) + rows_of(6, "base"))
    before = len(server.entries())
    code, lines, errors = judge(path, "--repeats", 2, "--model", "judge-1", "--temperature", 0.5)
    assert code == 0, errors
    assert lines[0].split() == ["model", "total", *CRITERIA]
    assert [line.split()[0] for line in lines[1:]] == ["mini", "base"]
    # Both models said the same: each text is one question, asked twice.
    assert len(server.entries()) - before == 12
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert result["judge"] == "judge-1"
    assert result["judge_model"] == ["judge-1"]
    assert result["parameters"] == {"temperature": 0.5}
    assert result["paper_prompt"] is True
    assert len(result["prompt_sha256"]) == 16
    assert result["dates"][0] <= result["dates"][1]
    assert result["calibration"] is None
    for model in ("mini", "base"):
        summary = result["models"][model]
        own = [line for line in result["lines"] if line["model"] == model]
        assert [line["graded"] for line in own] == [2] * 6
        assert summary["total"]["mean"] == pytest.approx(sum(line["total"] for line in own) / 6)
        assert summary["total"]["low"] <= summary["total"]["mean"] <= summary["total"]["high"]
        assert summary["total"]["mean"] == pytest.approx(sum(summary["scores"][name]["mean"] for name in CRITERIA))
        assert summary["missing"] == 0
    assert judge(path, "--repeats", 2, "--model", "judge-1", "--temperature", 0.5)[1] == lines
    assert len(server.entries()) - before == 12, "no grade is paid for twice"


def test_faults_are_asked_again_and_never_become_scores(judge, tmp_path):
    path = write_completions(tmp_path / "a.jsonl", rows_of(60))
    with serve("chat_server.py", tmp_path / "server", "--faults", "0.5") as stormy:
        code, _, errors = judge(path, "--timeout", 1, "--concurrency", 32, url=stormy.url)
        statuses = {entry["status"] for entry in stormy.entries()}
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    missing = [line for line in result["lines"] if line["scores"] is None]
    replies = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    assert {"emoji", "german", "length", "empty", "refusal"} & statuses
    assert result["models"]["mini"]["missing"] == len(missing) < 10
    assert all(line["missing"] for line in missing)
    assert len(replies) > 60, "replies that are no grades are kept, and others asked for"
    for line in result["lines"]:
        if line["scores"] is not None:
            assert all(0 <= value <= 10 for value in line["scores"].values())
    refused = any("400" in line["missing"] for line in missing)
    assert code == (1 if refused else 0), errors


def test_a_judge_without_structure_gives_no_scores(judge, run, server, tmp_path, monkeypatch):
    """A server that ignores the schema and chats: all is missing, and nothing is invented."""
    monkeypatch.setattr("nanovlm_hf.evaluation.judge.SCHEMA", {"type": "text"})
    path = write_completions(tmp_path / "a.jsonl", rows_of(3))
    code, lines, _ = judge(path)
    assert code == 0
    assert lines[1].split() == ["mini", *["-"] * 6]
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert [line["missing"] for line in result["lines"]] == ["no JSON"] * 3
    assert len((tmp_path / "out" / "replies.jsonl").read_text().splitlines()) == 9, "three tries each"


def test_the_cost_is_estimated_and_bounded(judge, run, tmp_path):
    path = write_completions(tmp_path / "a.jsonl", rows_of(20))
    code, lines, _ = judge(path, "--dry-run")
    assert code == 0
    assert lines[0].startswith("20 calls of gpt-4o at ")
    assert lines[2].startswith("about $0.0")
    code, _, errors = judge(path, "--max-cost", 0.01)
    assert code == 1
    assert "--max-cost 0.01 is reached: run again with more, and it goes on from here" in errors[-1]
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert 0 < result["models"]["mini"]["missing"] < 20
    assert judge(path)[0] == 0


def test_grades_through_the_batch_api(judge, tmp_path):
    path = write_completions(tmp_path / "a.jsonl", rows_of(5))
    code, lines, errors = judge(path, "--batch", "--poll-seconds", 0.01)
    assert code == 0, errors
    live = judge(write_completions(tmp_path / "b.jsonl", rows_of(5)))
    assert live[1] == lines, "the same grades, taken from the folder"
    assert len((tmp_path / "out" / "replies.jsonl").read_text().splitlines()) == 5


def test_an_endpoint_that_refuses(judge, tmp_path):
    path = write_completions(tmp_path / "a.jsonl", rows_of(2))
    code, _, errors = judge(path, "--model", "no-such-model")
    assert code == 1
    assert "--model no-such-model: " in errors[-1]


def test_the_judge_may_see_the_photo(server, tmp_path):
    rows = rows_of(2)
    images = {row.item_id: Image.new("RGB", (224, 224), (200, 30, 30)) for row in rows}
    endpoint = Endpoint("m", base_url=f"{server.url}/v1")
    with ReplyStore(tmp_path) as store:
        judge = Judge(rows, JudgeSettings("m"), store, images)
        judge.run(asker(endpoint, store))
        assert judge.summary()["sees_the_photo"] is True
        assert judge.summary()["models"]["mini"]["missing"] == 0
        messages = judge._messages(rows[0])
    assert server.entries()[-1]["picture"] is True
    assert messages[0]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert estimate_tokens(messages) < 600, "a picture is counted as one, not as its letters"


def test_the_papers_own_words(judge, tmp_path):
    rows = read_rows(paper_outputs())
    assert len(rows) == 65
    models = ["NanoVLM-mini", "NanoVLM-base", "NanoVLM-large", "BLIP-base", "GIT", "Kosmos-2"]
    assert list(dict.fromkeys(row.model for row in rows)) == models
    assert len({row.item_id for row in rows}) == 11
    for row in rows:
        assert row.text.endswith(row.completion)
    code, lines, _ = judge("paper")
    assert code == 0
    assert [line.split()[0] for line in lines[1:-1]] == models
    assert lines[-1].startswith("from the paper's judge on 6 texts: ")
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert result["calibration"]["items"] == 6
    assert result["calibration"]["mean_absolute_difference"] >= abs(result["calibration"]["mean_difference"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "there is no completion in it"),
        ("{", "line 1 is no completion"),
        ('{"item_id": "1"}', "line 1 is no completion"),
        ('{"item_id": 1, "model": "m", "prefix": "a", "text": "a b", "completion": "b"}', "line 1: item_id is no text"),
    ],
)
def test_completions_that_are_none(judge, tmp_path, content, problem):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    code, _, errors = judge(path)
    assert code == 1
    assert problem in only_line(errors)


def test_no_key_is_said_first(run, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, errors = run("evaluate", "judge", "--completions", "paper", "--out", tmp_path / "out")
    assert code == 2
    assert "OPENAI_API_KEY is not set" in only_line(errors)
    assert not (tmp_path / "out").exists()

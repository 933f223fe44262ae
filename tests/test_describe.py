"""The describer against a real HTTP server that misbehaves, down to `kill -9` in the middle of a run."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import only_line
from servers import serve

from nanovlm_hf import InputError
from nanovlm_hf.chat.replies import ChatRequest, ReplyStore

pytestmark = pytest.mark.usefixtures("api_key")

REPLY = {"text": "A.", "finish_reason": "stop", "refusal": None, "usage": None, "model": "m", "id": "1"}


def write_captions(path, photos, first=1):
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(first, first + photos)]
    annotations = [
        {
            "id": 5 * row["id"] + k,
            "image_id": row["id"],
            "caption": f"photo {row['id']} shows a dog and a boy with {k} balls",
        }
        for row in images
        for k in range(5)
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def captions(tmp_path):
    return write_captions(tmp_path / "captions.json", photos=20)


@pytest.fixture
def describe(run, server, captions, tmp_path):
    def call(*options, base_url=server.url + "/v1"):
        return run(
            "data", "describe", "--captions", captions, "--out", tmp_path / "out", "--base-url", base_url, *options
        )

    return call


def test_both_variants_of_every_photo(describe, tmp_path):
    code, lines, _ = describe("--variant", "both")
    assert code == 0
    assert lines == ["short: 20 described, 0 not", "long: 20 described, 0 not"]
    texts = rows(tmp_path / "out" / "descriptions.jsonl")
    assert [row["image_id"] for row in texts] == list(range(1, 21))
    assert all(20 <= len(row["short"].split()) <= 32 and 50 <= len(row["long"].split()) <= 85 for row in texts)
    replies = rows(tmp_path / "out" / "replies.jsonl")
    assert len(replies) == 40
    assert set(replies[0]) == {
        *("fingerprint", "attempt", "image_id", "variant", "text", "finish_reason", "refusal", "usage", "model", "id"),
        "time",
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["variants"]["short"]["accepted"] == 20
    assert report["variants"]["short"]["share_outside_child_vocabulary"] < 0.05


def test_a_second_run_asks_nothing_and_a_new_prompt_asks_again(describe, server, tmp_path):
    describe("--variant", "short")
    asked = len(server.entries())
    before = (tmp_path / "out" / "descriptions.jsonl").read_bytes()
    assert describe("--variant", "short")[0] == 0
    assert len(server.entries()) == asked
    assert (tmp_path / "out" / "descriptions.jsonl").read_bytes() == before
    (tmp_path / "prompt.txt").write_text("Say something about it.")
    assert describe("--variant", "short", "--prompt-short", tmp_path / "prompt.txt")[0] == 0
    assert len(server.entries()) == asked + 20
    assert len(rows(tmp_path / "out" / "replies.jsonl")) == 40, "what was paid for is kept"


def test_more_photos_ask_for_those_alone(describe, server, captions):
    describe("--variant", "short")
    asked = len(server.entries())
    write_captions(captions, photos=25)
    assert describe("--variant", "short")[1] == ["short: 25 described, 0 not"]
    assert len(server.entries()) == asked + 5


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("sk-wrong", (), "OPENAI_API_KEY: .* does not accept it"),
        ("sk-poor", (), "the account has no credit left"),
        ("sk-test-secret", ("--model", "no-such-model"), "--model no-such-model: .* does not know it"),
    ],
)
def test_what_no_patience_mends_stops_at_once(describe, server, monkeypatch, key, options, message):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    began = time.monotonic()
    code, _, errors = describe(*options)
    assert code == 1
    assert time.monotonic() - began < 10
    (line,) = [error for error in errors if error.startswith("nanovlm: ")]
    assert re.search(message, line)
    assert key not in "".join(errors)


def test_an_endpoint_that_is_not_there(describe):
    code, _, errors = describe("--tries", 2, base_url="http://127.0.0.1:9/v1")
    assert code == 1
    assert "requests in a row had no reply" in errors[-1]
    assert "Traceback" not in "".join(errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variant", "tiny"), "--variant tiny: it is short, long or both"),
        (("--words-short", "many"), "--words-short many"),
        (("--num-shards", 2, "--shard-index", 2), "--shard-index 2: with --num-shards 2 it is 0 to 1"),
        (("--max-cost", 1, "--model", "mine"), "--max-cost: the price of mine is not known"),
        (("--base-url", "localhost:8000"), "it must begin with http"),
    ],
)
def test_wrong_use(describe, options, message):
    code, _, errors = describe(*options)
    assert code == 2
    assert message in only_line(errors)


def test_openai_needs_a_key(run, captions, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, errors = run("data", "describe", "--captions", captions, "--out", tmp_path / "out")
    assert code == 2
    assert "OPENAI_API_KEY is not set" in only_line(errors)


def test_dry_run_asks_nobody(describe, server):
    asked = len(server.entries())
    code, lines, _ = describe("--dry-run", "--variant", "short", "--model", "gpt-4o")
    assert code == 0
    assert lines[0].startswith("20 calls of gpt-4o")
    # 20 prompts of about 190 tokens and replies of about 30: (20 * 190 * 2.5 + 20 * 30 * 10) / 1e6 dollars.
    assert lines[2] == "about $0.02"
    assert len(server.entries()) == asked


def test_max_cost_is_never_passed(describe, tmp_path):
    # A reply costs 0.0011 dollars here (200 tokens in at 4, 30 out at 10): nine of them 0.0099.
    code, _, errors = describe("--variant", "short", "--price", 4, 10, "--max-cost", 0.01, "--concurrency", 8)
    assert code == 1
    assert "--max-cost 0.01 is reached" in errors[-1]
    usage = [row["usage"] for row in rows(tmp_path / "out" / "replies.jsonl")]
    cost = sum(4 * one["prompt_tokens"] + 10 * one["completion_tokens"] for one in usage) / 1e6
    assert 0.006 < cost <= 0.01
    rejected = rows(tmp_path / "out" / "rejected.jsonl")
    assert {reason for row in rejected for reason in row["reasons"]} == {"not_asked"}
    assert len(usage) + len(rejected) == 20
    # With more, it goes on.
    assert describe("--variant", "short", "--price", 4, 10, "--max-cost", 1)[:2] == (0, ["short: 20 described, 0 not"])


def test_captions_that_are_no_english_or_not_there(describe, captions, tmp_path):
    content = json.loads(captions.read_text())
    for row in content["annotations"]:
        if row["image_id"] == 3:
            row["caption"] = "  "
        if row["image_id"] == 4:
            row["caption"] = "Ein kleiner Junge spielt mit seinem Hund im Garten hinter dem Haus."
    captions.write_text(json.dumps(content))
    assert describe("--variant", "short")[1] == ["short: 18 described, 2 not (no_captions 1, captions_language 1)"]
    found = {row["image_id"]: row["reasons"] for row in rows(tmp_path / "out" / "rejected.jsonl")}
    assert found == {3: ["no_captions"], 4: ["captions_language"]}


def test_texts_that_exist_already_pass_the_same_gates(run, captions, tmp_path):
    texts = tmp_path / "texts.jsonl"
    good = "Photo {} has a {} dog that runs over the green grass. It has a ball and is very happy {} times today."
    lines = [{"image_id": number, "short": good.format(number, "brown", "many")} for number in range(1, 4)]
    lines[0]["short"] = "Wow, " + lines[0]["short"]
    lines[1]["short"] = lines[1]["short"] + "\u2028 So it jumps."  # a line end of Unicode, but none of JSON Lines
    texts.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    code, printed, errors = run(
        "data",
        "describe",
        "--captions",
        captions,
        "--descriptions",
        texts,
        "--variant",
        "short",
        "--out",
        tmp_path / "o",
    )
    assert (code, errors) == (0, [])
    assert printed == ["short: 2 described, 18 not (no_text 17, opening 1)"]
    texts.write_text(json.dumps({"image_id": 77, "short": "A dog."}))
    code, _, errors = run("data", "describe", "--captions", captions, "--descriptions", texts, "--out", tmp_path / "o")
    assert code == 1
    assert "1 of its image_ids have no captions, first 77" in only_line(errors)


def test_shards_make_what_one_machine_makes(run, server, captions, tmp_path):
    for shard in range(3):
        options = ("--num-shards", 3, "--shard-index", shard, "--out", tmp_path / f"shard{shard}")
        run(
            "data", "describe", "--captions", captions, "--variant", "short", "--base-url", server.url + "/v1", *options
        )
    run(
        "data",
        "describe",
        "--captions",
        captions,
        "--variant",
        "short",
        "--base-url",
        server.url + "/v1",
        "--out",
        tmp_path / "one",
    )
    merged = [row for shard in range(3) for row in rows(tmp_path / f"shard{shard}" / "descriptions.jsonl")]
    assert sorted(merged, key=lambda row: row["image_id"]) == rows(tmp_path / "one" / "descriptions.jsonl")


def test_two_runs_on_one_folder(describe, tmp_path):
    with ReplyStore(tmp_path / "out"):
        code, _, errors = describe()
    assert code == 1
    assert "another run works on this folder" in only_line(errors)
    assert describe()[0] == 0


def test_a_reply_cut_off_by_a_kill_is_asked_again(describe, server, tmp_path):
    describe("--variant", "short")
    replies = tmp_path / "out" / "replies.jsonl"
    whole = replies.read_bytes()
    replies.write_bytes(whole[:-40])
    asked = len(server.entries())
    assert describe("--variant", "short")[1] == ["short: 20 described, 0 not"]
    assert len(server.entries()) == asked + 1
    assert len(rows(replies)) == 20
    replies.write_bytes(b"nonsense\n" + whole)
    code, _, errors = describe("--variant", "short")
    assert code == 1
    assert "replies.jsonl: line 1 is no reply" in only_line(errors)


def fill(store):
    for number in range(10_000):
        store.add(ChatRequest(f"{number:032x}", 1, []), REPLY)


def test_a_full_disk_loses_nothing(small_disk):
    disk = small_disk("64k")
    with ReplyStore(disk) as store, pytest.raises(OSError, match="No space left"):
        fill(store)
    with ReplyStore(disk) as store:
        assert 100 < len(store) < 1000
        assert store.get(f"{len(store) - 1:032x}-1")["text"] == "A."
        assert store.path.read_bytes().endswith(b"}\n")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(OSError, match="Read-only"):
        ReplyStore(disk)


def test_a_store_remembers_across_openings(tmp_path):
    with ReplyStore(tmp_path) as store:
        store.add(
            ChatRequest("a", 1, [], about={"image_id": 3}),
            REPLY | {"usage": {"prompt_tokens": 7, "completion_tokens": 2}},
        )
        store.add(ChatRequest("a", 1, []), REPLY | {"text": "never written"})
        store.add(
            ChatRequest("a", 2, []), REPLY | {"usage": {"prompt_tokens": 8, "completion_tokens": 4}, "batch": True}
        )
        assert (store.prompt_tokens, store.completion_tokens) == (11, 4)
    with ReplyStore(tmp_path) as store:
        assert len(store) == 2
        assert [store.get(f"a-{attempt}")["text"] for attempt in (1, 2)] == ["A.", "A."]
        assert store.get("a-1")["image_id"] == 3
        assert store.get("b-1") is None
        assert (store.prompt_tokens, store.completion_tokens) == (11, 4), "a batch costs half"
        with pytest.raises(InputError, match="another run"):
            ReplyStore(tmp_path)


def test_the_batch_api(describe, server, tmp_path):
    batch = ("--variant", "short", "--batch", "--poll-seconds", 0.02, "--model", "gpt-4o")
    code, lines, errors = describe(*batch)
    assert (code, lines) == (0, ["short: 20 described, 0 not"])
    assert any("20 requests are at" in line for line in errors)
    replies = rows(tmp_path / "out" / "replies.jsonl")
    assert len(replies) == 20
    assert all(row["batch"] for row in replies)
    asked = len(server.entries())
    assert describe(*batch)[0] == 0
    assert len(server.entries()) == asked, "nothing is sent twice"


def test_a_batch_that_an_earlier_run_sent_is_fetched_not_sent_again(describe, server, tmp_path, monkeypatch):
    from nanovlm_hf.chat import batch

    # The run is killed while it waits, at the latest and then at the earliest moment: before the batch's id is noted.
    for note_is_lost in (False, True):
        folder = tmp_path / f"out-{note_is_lost}"
        options = ("--variant", "short", "--batch", "--poll-seconds", 0.02, "--out", folder)
        options += ("--temperature", 0.5 + note_is_lost)  # other requests than those of the first time
        with monkeypatch.context() as patch:
            patch.setattr(batch.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
            assert describe(*options)[0] == 130
        assert not (folder / "descriptions.jsonl").exists()
        if note_is_lost:
            (folder / "batch" / "00001.json").unlink()
        batches = sum(entry["status"].startswith("batch") for entry in server.entries())
        assert describe(*options)[1] == ["short: 20 described, 0 not"]
        assert sum(entry["status"].startswith("batch") for entry in server.entries()) == batches


def test_a_batch_with_faults(run, tmp_path):
    captions = write_captions(tmp_path / "captions.json", 300)
    with serve("chat_server.py", tmp_path / "server", "--faults", "0.3") as server:
        options = ("--captions", captions, "--out", tmp_path / "out", "--base-url", server.url + "/v1")
        options += ("--variant", "short", "--batch", "--poll-seconds", 0.02)
        run("data", "describe", *options)
    described = [row["image_id"] for row in rows(tmp_path / "out" / "descriptions.jsonl")]
    rejected = rows(tmp_path / "out" / "rejected.jsonl")
    assert sorted(described + [row["image_id"] for row in rejected]) == list(range(1, 301))
    assert len(described) > 270
    assert {reason for row in rejected for reason in row["reasons"]} <= {"refusal", "words", "language", "no_reply"}
    problems = {row["problem"] for row in rejected if row["reasons"] == ["no_reply"]}
    assert problems == {"in the batch: This prompt is not accepted"}


def test_a_batch_that_is_refused(describe):
    code, _, errors = describe("--batch", "--poll-seconds", 0.02, "--model", "no-such-model")
    assert code == 1
    assert "the endpoint refuses 00001.jsonl (The model does not exist)" in errors[-1]


def test_an_endpoint_without_batches(describe, tmp_path):
    with serve("chat_server.py", tmp_path / "server", "--no-batches") as server:
        code, _, errors = describe("--batch", base_url=server.url + "/v1")
    assert code == 1
    assert "has no Batch API (404)" in errors[-1]


def test_max_cost_of_a_batch(describe, tmp_path):
    code, _, errors = describe(
        "--variant", "short", "--batch", "--poll-seconds", 0.02, "--price", 4, 10, "--max-cost", 0.01
    )
    assert code == 1
    assert "--max-cost 0.01 is reached" in errors[-1]
    assert 3 < len(rows(tmp_path / "out" / "replies.jsonl")) < 20


PHOTOS = 1000
CONCURRENCY = 32


def command(server, captions, out):
    options = f"--variant short --base-url {server.url}/v1 --concurrency {CONCURRENCY} --timeout 2".split()
    described = ["data", "describe", "--captions", captions, "--out", out]
    return [sys.executable, "-m", "nanovlm_hf.cli", *described, *options]


def account_for(folder):
    """Every photo has one description or one line that says why not."""
    described = [row["image_id"] for row in rows(folder / "descriptions.jsonl")]
    rejected = [row["image_id"] for row in rows(folder / "rejected.jsonl")]
    assert sorted(described + rejected) == list(range(1, PHOTOS + 1))
    return described, rejected


@pytest.mark.slow
def test_a_thousand_photos_a_fifth_of_them_faulty_and_five_kills(tmp_path):
    captions = write_captions(tmp_path / "captions.json", PHOTOS)
    with serve("chat_server.py", tmp_path / "calm", "--faults", "0.2") as server:
        done = subprocess.run(command(server, captions, tmp_path / "calm-out"), capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        statuses = Counter(entry["status"] for entry in server.entries())
        assert sum(count for status, count in statuses.items() if status != "good") > 0.15 * PHOTOS
        assert {"429", "500", "hang", "reset", "malformed", "html", "length", "empty", "refusal"} <= set(statuses)
        told_to_wait = {entry["photo"]: entry["time"] for entry in server.entries() if entry["status"] == "429"}
        for entry in server.entries():  # Retry-After was 0.2 seconds
            waited = entry["time"] - told_to_wait.get(entry["photo"], -1.0)
            assert waited <= 0 or waited >= 0.2
    described, rejected = account_for(tmp_path / "calm-out")
    assert len(described) > 0.95 * PHOTOS
    reasons = {reason for row in rows(tmp_path / "calm-out" / "rejected.jsonl") for reason in row["reasons"]}
    assert reasons <= {"refusal", "words", "language", "no_reply", "near_duplicate"}
    assert rejected

    # The same with kills, on a server that remembers nothing of the first run.
    moments = random.Random(0)
    with serve("chat_server.py", tmp_path / "stormy", "--faults", "0.2", "--latency", "0.02") as server:
        for _ in range(5):
            process = subprocess.Popen(command(server, captions, tmp_path / "stormy-out"), stderr=subprocess.DEVNULL)
            target = len(server.entries()) + moments.randint(20, 180)
            while len(server.entries()) < target and process.poll() is None:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        killed_at = len(rows(tmp_path / "stormy-out" / "replies.jsonl"))
        assert 100 < killed_at < PHOTOS, "the kills have to come in the middle"
        subprocess.run(command(server, captions, tmp_path / "stormy-out"), capture_output=True)
        entries = server.entries()
    for name in ("descriptions.jsonl", "rejected.jsonl"):
        assert (tmp_path / "stormy-out" / name).read_bytes() == (tmp_path / "calm-out" / name).read_bytes()
    account_for(tmp_path / "stormy-out")
    replies = rows(tmp_path / "stormy-out" / "replies.jsonl")
    assert len({(row["fingerprint"], row["attempt"]) for row in replies}) == len(replies), "a reply is stored once"
    unread = {"429", "429-later", "500", "hang", "reset", "malformed", "html", "empty-choices", "bad-request"}
    answered = sum(entry["status"] not in unread for entry in entries)
    assert answered - len(replies) <= 5 * CONCURRENCY, "only what was under way at a kill is asked again"

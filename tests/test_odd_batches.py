"""The Batch API with failed, expired and malformed batches, and with damaged files in the folder."""

import json
import tracemalloc
from collections import Counter

import pytest

from helpers.captions import rows, write_captions
from helpers.marks import mostly_slow
from helpers.output import only_line

pytestmark = pytest.mark.usefixtures("api_key")


@pytest.fixture
def describe(run, server, tmp_path):
    def call(name, *options, photos=20):
        captions = write_captions(tmp_path / "captions.json", photos)
        url = f"{server.url}/as/{name}/v1" if name else f"{server.url}/v1"
        named = ("--captions", captions, "--out", tmp_path / "out", "--base-url", url, "--variant", "short")
        code, lines, errors = run("data", "describe", *named, "--batch", "--poll-seconds", 0.01, *options)
        assert "Traceback" not in "".join(errors)
        assert "unexpected" not in "".join(errors)
        return code, lines, [error for error in errors if error.startswith("nanovlm: ")]

    return call


def batches(server):
    return sum(entry["status"].startswith("batch") for entry in server.entries())


def test_a_failed_batch_is_sent_again_by_the_next_run(describe, server, tmp_path):
    before = batches(server)
    code, lines, errors = describe("fails")
    assert code == 1
    assert "the endpoint refuses 00001.jsonl (Enqueued token limit reached for ***)" in only_line(errors)
    assert lines == ["short: 0 described, 20 not (not_asked 20)"]
    assert batches(server) == before + 1
    assert describe("fails")[:2] == (0, ["short: 20 described, 0 not"])
    assert batches(server) == before + 2
    assert describe("fails")[0] == 0
    assert batches(server) == before + 2


@pytest.mark.parametrize("name", ["expires", "fails-all-lines"])
def test_a_batch_without_replies_is_not_confused_with_its_successor(describe, server, name):
    before = batches(server)
    assert describe(name)[:2] == (0, ["short: 20 described, 0 not"])
    assert batches(server) == before + 2


def test_duplicate_missing_and_foreign_replies(describe, tmp_path):
    code, lines, errors = describe("answers-oddly")
    assert code == 1
    assert lines == ["short: 18 described, 2 not (no_reply 2)"]
    assert "run again to retry them" in only_line(errors)
    replies = rows(tmp_path / "out" / "replies.jsonl")
    assert len(replies) == 18 == len({row["fingerprint"] for row in replies})
    assert describe("")[1] == ["short: 20 described, 0 not"]


def test_refusals_in_a_batch_are_final(describe, server, tmp_path):
    assert describe("refuses-some")[:2] == (0, ["short: 14 described, 6 not (refused_by_endpoint 6)"])
    before = batches(server)
    assert describe("refuses-some")[:2] == (0, ["short: 14 described, 6 not (refused_by_endpoint 6)"])
    assert batches(server) == before
    assert all(row["final"] for row in rows(tmp_path / "out" / "refused.jsonl"))


def test_an_unknown_parameter_is_replaced(describe, server):
    before = batches(server)
    assert describe("mistral")[:2] == (0, ["short: 20 described, 0 not"])
    assert batches(server) == before + 2


def test_lines_of_a_batch_are_bounded(describe, tmp_path):
    code, lines, _ = describe("long-lines", photos=5)
    assert (code, lines) == (1, ["short: 4 described, 1 not (no_reply 1)"])


def test_a_file_of_a_batch_is_bounded(describe, tmp_path):
    tracemalloc.start()
    code, _, errors = describe("bomb", photos=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == 1
    assert "it is larger than 64 MiB: nothing is lost" in only_line(errors)
    assert peak < 60 * 2**20
    assert sorted(path.name for path in (tmp_path / "out" / "batch").iterdir()) == ["00001.json", "00001.jsonl"]


def test_the_search_for_a_batch_is_bounded(describe, server):
    before = Counter(entry["status"] for entry in server.entries())["list"]
    assert describe("odd-but-good")[0] == 0  # its pages have no end
    assert Counter(entry["status"] for entry in server.entries())["list"] - before <= 10


DAMAGED_NOTES = (
    *("", "{", "[]", "null", "7", '{"batch_id": 7}', '{"batch_id": "../../files"}', '{"batch_id": "a b"}'),
    *(
        '{"fetched": "yes"}',
        '{"fetched": 1}',
        '{"batch_id": ["batch_0"]}',
        "[" * 100_000,
        "\ufffd",
        '{"fetched": null}',
    ),
)


@pytest.mark.parametrize("note", mostly_slow(DAMAGED_NOTES))
def test_a_damaged_state_is_reported_and_its_batch_found_again(describe, server, tmp_path, note):
    assert describe("", "--temperature", 0.1 + DAMAGED_NOTES.index(note) / 100)[0] == 0
    path = tmp_path / "out" / "batch" / "00001.json"
    path.write_text(note)
    before = batches(server)
    for more in ((), ("--max-cost", 1)):
        code, lines, errors = describe("", "--temperature", 0.1 + DAMAGED_NOTES.index(note) / 100, *more)
        assert code in (0, 1)
        if code:
            assert "00001.json: " in only_line(errors)
            assert errors[0].endswith("remove the file; the batch is found again by its content")
        assert lines == ["short: 20 described, 0 not"]
    path.unlink()
    assert describe("", "--temperature", 0.1 + DAMAGED_NOTES.index(note) / 100)[0] == 0
    assert batches(server) == before, "found again, not sent again"


@pytest.mark.parametrize(
    "line",
    mostly_slow(
        [
            *("", "{", "[]", "null", "{}", '{"custom_id": 7, "body": {}}', '{"custom_id": "a-1", "body": []}'),
            *('{"custom_id": "a-b", "body": {"model": "m", "messages": []}}', "[" * 100_000),
            *(
                f'{{"custom_id": "a-1", "body": {{"model": "m", "messages": {messages}}}}}'
                for messages in ("7", "[7]", '[{"content": 7}]', '[{"content": [{"type": "text"}]}]')
            ),
        ]
    ),
)
def test_a_damaged_job_is_reported(describe, tmp_path, line):
    (tmp_path / "out" / "batch").mkdir(parents=True)
    (tmp_path / "out" / "batch" / "notes.jsonl").write_text("of another program")
    path = tmp_path / "out" / "batch" / "00007.jsonl"
    path.write_text(line and line + "\n")
    code, lines, errors = describe("", photos=2)
    assert code == 1
    assert "00007.jsonl" in only_line(errors)
    assert "remove" in errors[0]
    assert lines == ["short: 0 described, 2 not (not_asked 2)"]
    path.unlink()
    assert describe("", photos=2)[0] == 0


def test_requests_of_a_pending_batch_are_not_sent_one_by_one(describe, run, server, tmp_path):
    describe("")
    (tmp_path / "out" / "batch" / "00001.json").write_text(json.dumps({"batch_id": "batch_lost"}))
    (tmp_path / "out" / "replies.jsonl").unlink()
    before = len(server.entries())
    named = ("--captions", tmp_path / "captions.json", "--out", tmp_path / "out", "--variant", "short")
    code, _, errors = run("data", "describe", *named, "--base-url", f"{server.url}/v1")
    assert code == 1
    assert "00001.jsonl: the replies of this batch have not been fetched: add --batch" in errors[-1]
    assert len(server.entries()) == before
    (tmp_path / "out" / "batch" / "00001.jsonl").unlink()
    assert run("data", "describe", *named, "--base-url", f"{server.url}/v1")[0] == 0


def test_a_lost_batch_is_reported(describe, tmp_path):
    describe("", "--temperature", 1.5)
    note = tmp_path / "out" / "batch" / "00001.json"
    note.write_text(json.dumps({"batch_id": "batch_lost"}))
    (tmp_path / "out" / "replies.jsonl").unlink()
    code, _, errors = describe("", "--temperature", 1.5)
    assert code == 1
    assert "does not know the batch batch_lost: remove the file" in only_line(errors)

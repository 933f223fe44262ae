"""A batch that was paid for is neither lost nor paid for again, and none is sent that nobody wants any more."""

import json
import os
import time

import pytest

from nanovlm_hf.chat.batch import ask_all_in_batches
from nanovlm_hf.chat.endpoint import Endpoint, EndpointError
from nanovlm_hf.chat.prices import Price
from nanovlm_hf.chat.replies import ChatRequest, ReplyStore, fingerprint_of

from helpers.batch_server import batch_server

pytestmark = pytest.mark.usefixtures("api_key")


@pytest.fixture(scope="module")
def running():
    with batch_server() as found:
        yield found


@pytest.fixture
def server(running, monkeypatch):
    """The server, without the requests and the faults of other tests."""
    running[0].__init__()
    monkeypatch.setattr("nanovlm_hf.chat.batch_api.LONGEST_PAUSE", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    return running[0]


@pytest.fixture
def ask(running, server, tmp_path):
    """Run once: the outcome and the number of stored replies."""

    def call(model="m", number=4, **options):
        endpoint = Endpoint(model, running[1], **options)
        messages = [[{"role": "user", "content": f"Describe photo {photo}."}] for photo in range(number)]
        parameters = {"max_completion_tokens": 100}
        requests = [ChatRequest(fingerprint_of(model, parameters, one), 1, one, parameters) for one in messages]
        with ReplyStore(tmp_path / "out") as store:
            outcome = ask_all_in_batches(endpoint, requests, store, poll_seconds=0.0)
            return outcome, sum(request.key in store for request in requests)

    return call


def remove_note(tmp_path):
    (tmp_path / "out" / "batch" / "00001.json").unlink()


@pytest.mark.parametrize("fault", ["POST files", "GET batches"])
@pytest.mark.parametrize("max_cost", [0.0001, 1.0, None])
def test_a_job_that_was_not_sent_follows_the_wishes_of_the_next_run(ask, server, tmp_path, fault, max_cost):
    server.answers[fault] = [401]
    assert "rejected" in str(ask("gpt-4o")[0].error)
    outcome, replies = ask("m", price=Price(1.0, 1.0), max_cost=max_cost)
    models = [line["body"]["model"] for lines in server.created for line in lines]
    assert models == ["m"] * replies
    assert replies == {0.0001: 1, 1.0: 4, None: 4}[max_cost]
    assert (outcome.stopped is None) == (replies == 4)
    assert outcome.error is None


def test_the_requests_of_a_job_that_was_not_sent_are_sent_once(ask, server, tmp_path):
    server.answers["POST files"] = [401]
    ask()
    assert ask()[1] == 4
    assert [len(lines) for lines in server.created] == [4]
    assert sorted(path.name for path in (tmp_path / "out" / "batch").iterdir()) == ["00001.json", "00001.jsonl"]


@pytest.mark.parametrize("answer", [500, 503, 408, 429, None, b"{", b"[]", b'{"id": 7}'])
@pytest.mark.parametrize("number", [1, 3])
def test_a_batch_whose_creation_has_no_response_is_created_once(ask, server, answer, number):
    server.answers["POST batches"] = [answer] * number
    outcome, replies = ask()
    assert (outcome.error, replies, len(server.created)) == (None, 4, 1)


@pytest.mark.parametrize(
    ("status", "file_id"),
    [
        *((status, None) for status in ("completed", "expired", "cancelled", "failed", "COMPLETED", "succeeded")),
        *(("completed", file_id) for file_id in ("", 7, ["out-batch_0"], {"id": "out-batch_0"}, "..")),
    ],
)
def test_replies_without_a_file_are_not_given_up(ask, server, tmp_path, status, file_id):
    server.fields = {"status": status, "output_file_id": file_id, "request_counts": {"completed": "4"}}
    outcome, replies = ask()
    assert isinstance(outcome.error, EndpointError)
    assert "batch/00001.json: the batch batch_0 is " in str(outcome.error)
    assert "its 4 replies have no file (output_file_id): run again later" in str(outcome.error)
    assert (replies, len(server.created)) == (0, 1)
    assert ask()[1] == 0
    server.fields = {}
    assert ask()[1] == 4
    assert len(server.created) == 1


def test_a_file_that_comes_late_is_waited_for(ask, server, monkeypatch):
    server.fields = {"output_file_id": None}
    monkeypatch.setattr(time, "sleep", lambda seconds: server.fields.clear())
    assert ask() == (ask()[0], 4)
    assert len(server.created) == 1


@pytest.mark.parametrize("answer", [404, 410, 400, b"", b"\n\n"])
def test_a_lost_file_is_named_and_can_be_replaced(ask, server, tmp_path, answer):
    server.answers["content"] = [answer] * 3
    for _ in range(2):
        error = str(ask()[0].error)
        assert "batch/00001.json: the output file out-batch_0 of the batch batch_0 is " in error
        assert error.endswith(": remove the file to send the requests again")
    remove_note(tmp_path)
    outcome, replies = ask()
    assert (outcome.error, replies, len(server.created)) == (None, 4, 2)
    assert ask()[1] == 4
    assert len(server.created) == 2


def test_a_batch_that_was_never_reported_as_lost_is_not_replaced(ask, server, tmp_path):
    """The run was killed before it noted the batch: its user has not asked for the requests to be sent again."""
    server.fields = {"status": "sleeping"}
    ask()
    remove_note(tmp_path)
    (tmp_path / "out" / "batch" / "00001.lost").unlink()
    assert "remove the file to send the requests again" in str(ask()[0].error)
    assert len(server.created) == 1
    server.fields = {}
    assert ask()[1] == 4
    assert len(server.created) == 1


@pytest.mark.parametrize("fields", [{"output_file_id": None}, {"status": "sleeping"}])
def test_a_batch_that_cannot_be_fetched_can_be_replaced(ask, server, tmp_path, fields):
    server.fields = fields
    assert ask()[0].error is not None
    remove_note(tmp_path)
    server.after_create = server.fields.clear
    assert ask()[1] == 4
    assert len(server.created) == 2


@pytest.mark.parametrize(
    "status", ["COMPLETED", "Completed", " completed", "succeeded", "SUCCESS", "done", "canceled", "CANCELLED", "error"]
)
def test_statuses_of_other_servers_end_a_batch(ask, server, status):
    server.fields = {"status": status}
    outcome, replies = ask()
    assert (outcome.error, replies, server.polls) == (None, 4, 1)


@pytest.mark.parametrize("status", ["sleeping", "", "x" * 100, "\x1b[31m"])
def test_an_unknown_status_is_not_polled_for_ever(ask, server, status):
    server.fields = {"status": status}
    error = str(ask()[0].error)
    assert "00001.json: the batch batch_0 has the unknown status " in error
    assert error.isprintable()
    assert server.polls <= 30
    server.fields = {}
    assert ask()[1] == 4
    assert len(server.created) == 1


@pytest.mark.parametrize("status", ["In-Progress", "QUEUED", "running"])
def test_known_words_for_waiting_are_waited_for(ask, server, status, monkeypatch):
    server.fields = {"status": status}
    monkeypatch.setattr(time, "sleep", lambda seconds: server.polls > 50 and server.fields.clear())
    assert ask()[1] == 4


@pytest.mark.parametrize("code", [200, "200", None, 201, 200.0, "ok", [], True])
def test_a_paid_reply_is_taken_whatever_its_status_code(ask, server, code):
    server.row = lambda row: row | {"response": row["response"] | {"status_code": code}}
    assert ask()[1] == 4


@pytest.mark.parametrize("code", [400, "400", 500, "500"])
def test_the_status_of_a_refusal_in_a_batch_is_read(ask, server, code):
    body = {"error": {"message": "Too long"}}
    server.row = lambda row: row | {"response": {"status_code": code, "body": body}}
    outcome, replies = ask()
    assert replies == 0
    assert "Too long" in str(outcome.error or outcome.unanswered)


@pytest.mark.parametrize("path", ["POST files", "POST batches", "GET batches", "batches"])
def test_the_timeout_and_the_tries_hold_for_every_call(ask, server, path):
    server.answers[path] = [1.0] * 2
    began = time.monotonic()
    outcome, _ = ask(timeout=0.1, tries=2)
    assert time.monotonic() - began < 1.5
    assert path == "POST batches" or "nothing is lost" in str(outcome.error)
    server.answers.clear()
    assert ask()[1] == 4
    assert len(server.created) == 1


@pytest.mark.parametrize("name", ["00001.jsonl", "00001.json"])
def test_a_pipe_in_the_folder_is_reported(ask, server, tmp_path, name):
    assert ask()[1] == 4
    path = tmp_path / "out" / "batch" / name
    path.with_suffix(".json").write_text(json.dumps({}))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{name}: not a regular file"):
        ask()

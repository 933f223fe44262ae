"""Replies that are paid for count towards the maximum cost, even if nobody can read them or believe their counts."""

import os

import pytest

from nanovlm_hf import InputError
from nanovlm_hf.chat.answers import read_answer, read_completion
from nanovlm_hf.chat.client import ask_all
from nanovlm_hf.chat.endpoint import Endpoint
from nanovlm_hf.chat.prices import Price
from nanovlm_hf.chat.replies import ChatRequest, ReplyStore
from nanovlm_hf.data.describe import Describer, DescribeSettings, packaged_prompt
from nanovlm_hf.data.sources import ImageRecord
from nanovlm_hf.evaluation.judge import Judge, JudgeSettings

from helpers.batch_server import TEXT, batch_server, completion
from helpers.gradings import rows_of

pytestmark = pytest.mark.usefixtures("api_key")
PROMPT = "Describe the photo in the words of a small child. " * 20  # 1,000 characters, about 250 tokens
PRICE = Price(1000.0, 1000.0)  # 1/1000 dollar a token


@pytest.fixture(scope="module")
def running():
    with batch_server() as found:
        yield found


@pytest.fixture
def ask(running, tmp_path, monkeypatch):
    """Send requests whose replies are a function's: the outcome, the number of attempts, and the cost in the store."""

    def call(answer, number=20, max_cost=2.0, **options):
        state, url = running
        attempts = []
        monkeypatch.setattr("nanovlm_hf.chat.client.LONGEST_PAUSE", 0.01)
        state.__init__()
        state.reply = lambda *request: attempts.append(request) or answer(len(attempts))
        state.answers["chat"] = options.pop("delays", [])
        endpoint = Endpoint("m", url, price=PRICE, max_cost=max_cost, concurrency=1, **options)
        messages = [{"role": "user", "content": PROMPT}]
        requests = [ChatRequest(f"{one:032x}", 1, messages, {"max_completion_tokens": 100}) for one in range(number)]
        with ReplyStore(tmp_path / "out") as store:
            outcome = ask_all(endpoint, requests, store)
            return outcome, len(attempts), PRICE.cost(store.prompt_tokens, store.completion_tokens), len(store)

    return call


USAGE = {"prompt_tokens": 300, "completion_tokens": 50}
UNREADABLE = [b"", b"{", b"[]", b'{"choices": [{"message": {"content": {"text": "A dog."}}}]}']
UNREADABLE += [{"choices": 7, "usage": USAGE}, {"choices": [None]}, {"choices": [{"message": {"content": 7}}]}]


@pytest.mark.parametrize("body", UNREADABLE)
def test_unreadable_replies_count_and_are_not_asked_for_again_and_again(ask, body):
    outcome, attempts, cost, stored = ask(lambda number: (200, body), max_cost=100.0)
    assert outcome.error is not None, "five requests in a row without a reply"
    assert (attempts, stored) == (10, 0)
    assert cost == pytest.approx(3.5 if isinstance(body, dict) and "usage" in body else 10 * 0.358, rel=0.05)
    _, attempts, later, _ = ask(lambda number: (200, body), max_cost=cost)
    assert (attempts, later) == (0, cost), "a later run counts the same"


@pytest.mark.parametrize("body", UNREADABLE)
def test_the_maximum_cost_holds_for_unreadable_replies(ask, body):
    _, attempts, cost, _ = ask(lambda number: (200, body), max_cost=1.2)
    assert 1 <= attempts <= 3
    assert cost <= 1.2


@pytest.mark.parametrize("usage", [{"prompt_tokens": 1, "completion_tokens": 1}, {"prompt_tokens": 20}, {}])
def test_untrue_counts_do_not_lift_the_maximum_cost(ask, usage):
    outcome, attempts, cost, stored = ask(lambda number: (200, completion(**usage)))
    assert outcome.stopped is not None
    assert attempts == stored
    assert attempts * (len(PROMPT) + len(TEXT)) / 4000 <= cost <= 2.0


def test_plausible_counts_are_kept(ask):
    usage = {"prompt_tokens": 180, "completion_tokens": 20}  # fewer than the estimates, as tokenizers differ
    assert ask(lambda number: (200, completion(**usage)), number=3)[2] == pytest.approx(0.6)


def test_a_request_without_reply_is_not_sent_again_in_the_next_round(running, tmp_path, monkeypatch):
    state, url = running
    monkeypatch.setattr("nanovlm_hf.chat.client.LONGEST_PAUSE", 0.01)
    state.__init__()
    sent = []
    state.reply = lambda *request: sent.append(request) or (200, b"{")
    settings = DescribeSettings("m", {"short": packaged_prompt("short")}, attempts=3)
    with ReplyStore(tmp_path / "out") as store:
        describer = Describer([ImageRecord(1, "1.jpg", "coco", None, ["a dog runs"])], settings, store)
        describer.run(lambda requests, _: ask_all(Endpoint("m", url, concurrency=1, tries=6), requests, store))
        assert len(sent) == 2
        assert "run again to retry them" in describer.incomplete_reason(tmp_path)


def test_a_grading_without_reply_is_not_sent_again_in_the_next_round(running, tmp_path, monkeypatch):
    state, url = running
    monkeypatch.setattr("nanovlm_hf.chat.client.LONGEST_PAUSE", 0.01)
    state.__init__()
    sent = []
    state.reply = lambda *request: sent.append(request) or (200, b"{")
    with ReplyStore(tmp_path / "out") as store:
        judge = Judge(rows_of(1), JudgeSettings("m"), store)
        judge.run(lambda requests, _: ask_all(Endpoint("m", url, concurrency=1, tries=6), requests, store))
        assert len(sent) == 2
        assert "run again to request them" in judge.incomplete_reason()


def test_timeouts_count_but_refused_connections_do_not(ask, running, tmp_path):
    _, attempts, cost, _ = ask(lambda number: (200, completion()), number=1, delays=[0.6] * 2, timeout=0.2, tries=2)
    assert (attempts, cost) == (2, pytest.approx(0.708, rel=0.05))
    assert ask(lambda number: (200, completion()), number=1, delays=[0.6] * 6, timeout=0.2, tries=6)[1] == 2
    endpoint = Endpoint("m", "http://127.0.0.1:9/v1", tries=1)
    with ReplyStore(tmp_path / "other") as store:
        ask_all(endpoint, [ChatRequest("f" * 32, 1, [{"role": "user", "content": PROMPT}])], store)
        assert store.prompt_tokens == 0


def test_a_dropped_connection_counts(ask):
    assert ask(lambda number: (200, completion()), number=1, delays=[None], tries=1)[2] > 0.3


@pytest.mark.parametrize("name", ["replies.jsonl", "refused.jsonl", "unread.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_file_of_the_store_that_is_not_regular_is_reported(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: this is .*not a"):
        ReplyStore(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "refusal", "refusal": "I cannot help."}],
        [{"type": "text", "text": ""}, {"type": "refusal", "refusal": "I cannot help."}],
        [{"type": "refusal", "text": "I cannot help."}],
        [{"type": "refusal"}],
        [{"type": "refusal", "refusal": 7}],
    ],
)
def test_a_refusal_among_the_parts_of_a_reply_is_a_refusal(content):
    reply = read_completion({"choices": [{"message": {"content": content}}]})
    assert reply.text == ""
    assert reply.refusal


def test_the_counts_of_an_unreadable_reply_are_kept():
    with pytest.raises(InputError) as caught:
        read_answer(200, b'{"usage": {"prompt_tokens": "300", "completion_tokens": -1}}', {})
    assert caught.value.usage.model_dump() == {"prompt_tokens": 300, "completion_tokens": None, "estimated": False}

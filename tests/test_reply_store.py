"""Replies with any content can be stored and read again, and folders of older versions stay readable."""

import errno
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovlm_hf import InputError
from nanovlm_hf.chat.answers import read_answer
from nanovlm_hf.chat.api_errors import ApiError, parse_error_body, seconds_to_wait
from nanovlm_hf.chat.replies import ChatRequest, ReplyStore

MESSAGES = [{"role": "user", "content": "Describe a dog." * 10}]
REQUEST = ChatRequest("f" * 32, 1, MESSAGES, {"max_completion_tokens": 100}, {"image_id": 1})

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(categories=None) | st.sampled_from("\ud83d\udc00\x00\u2028\u0085\r\n\x1b")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
names = ("text", "finish_reason", "refusal", "usage", "model", "id", "batch", "time", "fingerprint", "attempt", "x")
usages = st.dictionaries(st.sampled_from(("prompt_tokens", "completion_tokens", "estimated")), anything)
replies = st.dictionaries(st.sampled_from(names), anything | usages, max_size=11)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(replies, min_size=1, max_size=4))
def test_any_reply_is_stored_and_read_again(tmp_path_factory, stored):
    folder = tmp_path_factory.mktemp("store")
    requests = [ChatRequest("f" * 32, number, MESSAGES, {}, {"image_id": 1}) for number in range(1, len(stored) + 1)]
    with ReplyStore(folder) as store:
        for request, reply in zip(requests, stored, strict=True):
            store.add(request, reply)
        written = [store.get(request.key) for request in requests]
        tokens = store.prompt_tokens, store.completion_tokens
    with ReplyStore(folder) as store:
        assert len(store) == len(stored)
        assert [store.get(request.key) for request in requests] == written
        assert (store.prompt_tokens, store.completion_tokens) == tokens
    assert min(tokens) >= 0
    for reply, row in zip(stored, written, strict=True):
        assert row["fingerprint"] == "f" * 32
        row["text"].encode()
        assert row["usage"]["prompt_tokens"] > 0
        if isinstance(reply.get("text"), str):
            assert len(row["text"]) <= len(reply["text"])
            assert row["text"] == reply["text"] or not reply["text"].isascii()


bodies = anything | st.dictionaries(st.sampled_from(("error", "choices", "message", "detail")), anything)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([200, 400, 422, 429, 500]), bodies)
def test_any_response_is_a_reply_or_a_printable_error(status, body):
    try:
        said = read_answer(status, json.dumps(body).encode(errors="replace"), {}).text
        assert status == 200
    except (ApiError, InputError) as problem:
        said = str(problem)
    said.encode()
    assert status == 200 or not {"\n", "\r", "\x1b", "\x00", "\u2028"} & set(said)


def test_a_deeply_nested_reply_is_stored():
    deep = []
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(InputError):
        read_answer(200, b'{"choices": [{"message": {"content": ' + b"[" * 400 + b"]" * 400 + b"}}]}", {})
    assert str(parse_error_body(400, deep)) == "400: no reason given"


def old_row(**fields):
    row = {"fingerprint": "f" * 32, "attempt": 1, "image_id": 1, "text": "A dog.", "finish_reason": "stop"}
    row |= {"refusal": None, "usage": None, "model": "m", "id": "1", "time": "2026-01-01T00:00:00Z"}
    return json.dumps(row | fields) + "\n"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A dog."}]}, "A dog."),
        ({"text": ["A ", "dog."]}, "A dog."),
        ({"text": None}, ""),
        ({"usage": {"prompt_tokens": "7", "completion_tokens": "x"}}, "A dog."),
        ({"usage": [1, 2]}, "A dog."),
        ({"usage": {"prompt_tokens": -5, "completion_tokens": float("nan")}}, "A dog."),
        ({"model": ["m"], "id": {}, "finish_reason": 3, "refusal": [], "time": 3}, "A dog."),
    ],
)
def test_rows_of_older_versions_are_read(tmp_path, fields, text):
    (tmp_path / "replies.jsonl").write_text(old_row(**fields))
    with ReplyStore(tmp_path) as store:
        reply = store.get(REQUEST.key)
        assert reply["text"] == text
        assert isinstance(reply["time"], str)
        assert store.completion_tokens >= 0 <= store.prompt_tokens


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", "null", "7", '"a"', "{}", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff"),
        *(old_row(**field).strip() for field in ({"fingerprint": 3}, {"attempt": None}, {"attempt": "1"})),
        *(old_row(**field).strip() for field in ({"text": {"a": 1}}, {"text": 7}, {"text": [3]}, {"attempt": True})),
        *("\xff", '{"fingerprint": "a", "attempt": 1}'),
    ],
)
@pytest.mark.parametrize("name", ["replies.jsonl", "refused.jsonl"])
def test_a_damaged_line_is_reported(tmp_path, line, name):
    (tmp_path / name).write_bytes((line + "\n").encode("latin-1" if line == "\xff" else "utf-8"))
    with pytest.raises(InputError, match=f"{name}: line 1 is not a reply: remove the line"):
        ReplyStore(tmp_path)
    (tmp_path / name).write_text("")
    with ReplyStore(tmp_path) as store:  # the lock was let go
        assert len(store) == 0


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_disk_error_names_the_file_and_leaves_it_unchanged(tmp_path, monkeypatch, failing):
    def fail(*arguments):
        raise OSError(errno.EIO, "I/O error")

    with ReplyStore(tmp_path) as store:
        store.add(REQUEST, {"text": "A dog."})
        before = store.path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, fail)
            with pytest.raises(OSError, match="I/O error") as caught:
                store.add(ChatRequest("e" * 32, 1, MESSAGES, {}, {"image_id": 2}), {"text": "A cat."})
        assert caught.value.filename == str(store.path)
        assert store.path.read_bytes() == before
        store.add(ChatRequest("d" * 32, 1, MESSAGES, {}, {"image_id": 3}), {"text": "A cow."})
    with ReplyStore(tmp_path) as store:
        assert [store.get(f"{letter * 32}-1")["text"] for letter in "fd"] == ["A dog.", "A cow."]
        assert len(store) == 2


def test_a_file_saved_by_an_editor_is_read(tmp_path):
    rows = [old_row(attempt=number).strip() for number in (1, 2, 3)]
    path = tmp_path / "replies.jsonl"
    path.write_bytes("\ufeff".encode() + "\r\n\n".join(rows).encode())
    with ReplyStore(tmp_path) as store:
        assert [store.get(f"{'f' * 32}-{number}")["text"] for number in (1, 2, 3)] == ["A dog."] * 3
        store.add(ChatRequest("f" * 32, 4, MESSAGES), {"text": "B."})
    with ReplyStore(tmp_path) as store:
        assert [store.get(f"{'f' * 32}-{number}")["text"] for number in (1, 4)] == ["A dog.", "B."]


def test_refusals_persist_and_suspicions_are_not_final(tmp_path):
    error = parse_error_body(400, {"error": {"message": "Bad sk-0123456789 \x1b[31m"}})
    with ReplyStore(tmp_path) as store:
        store.refuse(REQUEST, error, final=False)
        assert REQUEST.key not in store
        assert store.suspected(REQUEST.key)
        assert store.refusal(REQUEST.key)["final"] is False
    with ReplyStore(tmp_path) as store:
        assert store.suspected(REQUEST.key)
        store.refuse(REQUEST, error, final=True)
        store.refuse(REQUEST, error, final=True)
    assert len((tmp_path / "refused.jsonl").read_text().splitlines()) == 2
    with ReplyStore(tmp_path) as store:
        assert REQUEST.key in store
        row = store.refusal(REQUEST.key)
        assert row["problem"] == "400: Bad *** \ufffd[31m"
        assert row["image_id"] == 1
        assert store.get(REQUEST.key) is None
        assert len(store) == 0


@pytest.mark.parametrize(
    ("body", "message", "refuses"),
    [
        ({"error": {"message": "no", "param": "x"}}, "no", True),
        ({"error": "no"}, "no", True),
        ({"message": "no"}, "no", True),
        ({"detail": "no"}, "no", True),
        ([{"error": {"message": "no"}}], "no", True),
        ({"error": {"message": {"detail": [{"loc": ["body", "x"], "msg": "no"}]}}}, "body.x: no", True),
        ({"errors": [{"message": "no"}]}, "no", True),
        ("<html><h1>no</h1></html>", "<html><h1>no</h1></html>", True),
        ({}, "no reason given", True),
        (None, "no reason given", True),
        ({"error": {"code": "insufficient_quota", "message": "no"}}, "no", False),
    ],
)
def test_the_message_of_an_error_is_found(body, message, refuses):
    error = parse_error_body(400, body)
    assert error.message == message
    assert error.refuses == refuses


def test_which_errors_are_final():
    final = {status for status in range(300, 600) if parse_error_body(status, "no").refuses}
    assert final == set(range(400, 500)) - {401, 402, 403, 404, 408, 409, 425, 429}
    assert parse_error_body(403, {"error": {"code": "content_filter"}}).refuses
    assert parse_error_body(403, {"error": {"message": "flagged by moderation"}}).content_filter


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        ("-3", 0.0),
        ("nan", None),
        ("soon", None),
        (None, None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 99 Oct 99999 07:28:00 GMT", None),
    ],
)
def test_retry_after(value, seconds):
    assert seconds_to_wait(value) == seconds

"""Untrusted file names, reading of untrusted files, and scrubbing of messages."""

import json
import os
import subprocess
import sys

import pytest

from nanovlm_hf import InputError
from nanovlm_hf.errors import report, scrub
from nanovlm_hf.files import (
    atomic_write,
    inside,
    locked,
    parse_json,
    parse_yaml,
    read_json,
    read_jsonl,
    read_text,
    validate,
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    (folder / "a.jpg").write_text("a")
    (folder / "below" / "b.jpg").write_text("b")
    (folder / "out.jpg").symlink_to(tmp_path / "secret.txt")
    (folder / "chain.jpg").symlink_to("out.jpg")
    (folder / "up").symlink_to(tmp_path)
    (folder / "in.jpg").symlink_to("a.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "fifo.jpg")
    return folder


def test_a_number_in_base_60_takes_no_time():
    assert parse_yaml("a: 1:30", "a.yaml") == {"a": 90}
    with pytest.raises(InputError, match="a number in base 60 of more than 100 digits, line 1"):
        parse_yaml("a: 1" + ":1" * 400_000, "a.yaml")


@pytest.mark.parametrize("name", ["a.jpg", "below/b.jpg", "below/../a.jpg", "in.jpg"])
def test_names_inside_a_folder_are_resolved(folder, name):
    assert inside(folder, name).read_text() in ("a", "b")
    assert inside(os.path.relpath(folder), name) == inside(folder, name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../secret.txt", "leads out of this folder"),
        ("below/../../secret.txt", "leads out of this folder"),
        ("out.jpg", "leads out of this folder"),
        ("chain.jpg", "leads out of this folder"),
        ("up/secret.txt", "leads out of this folder"),
        ("/etc/passwd", "leads out of this folder"),
        ("fifo.jpg", "not a regular file"),
        ("below", "not a regular file"),
        (".", "not a regular file"),
        ("", "not a file name"),
        ("a\0.jpg", "not a file name"),
        (None, "not a file name"),
        (7, "not a file name"),
        ("loop.jpg", "cannot be opened|no such file"),
        ("missing.jpg", "no such file"),
        ("x" * 5000, "cannot be opened"),
    ],
)
def test_names_outside_a_folder_are_rejected(folder, name, problem):
    with pytest.raises(InputError, match=problem) as refused:
        inside(folder, name)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_absolute_name_is_rejected_even_inside_the_folder(folder):
    with pytest.raises(InputError, match="must be relative"):
        inside(folder, str(folder / "a.jpg"))


def test_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "one.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_json(path) == {"a": 1}


def test_json_lines_are_split_at_line_feeds_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "one\u2028two"}, {"text": "three\u0085four"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert list(read_jsonl(path)) == [(1, rows[0]), (3, rows[1])]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "not JSON"),
    ],
)
def test_invalid_json_is_reported_in_one_line(tmp_path, content, problem):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as refused:
        read_json(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_lone_surrogates_become_replacement_characters(tmp_path):
    content = parse_json('{"a": ["half \\ud83d", "whole \\ud83d\\ude00"], "\\udc00": 1}', "here")
    assert content == {"a": ["half \ufffd", "whole \U0001f600"], "\ufffd": 1}
    with atomic_write(tmp_path / "a.json") as file:
        file.write(json.dumps(content, ensure_ascii=False))
    assert read_json(tmp_path / "a.json") == content


def test_reading_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="not a regular file"):
        read_text(tmp_path / "fifo")


def test_validation_error_names_the_field():
    assert validate({"a": [1]}, dict[str, list[int]], "file") == {"a": [1]}
    with pytest.raises(InputError, match=r"^file: a\.1: Input should be a valid integer"):
        validate({"a": [1, "x"]}, dict[str, list[int]], "file")


def test_atomic_write_does_not_follow_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / "out.json.partial").symlink_to(victim)
    with atomic_write(tmp_path / "out.json") as file:
        file.write("new")
    assert (victim.read_text(), (tmp_path / "out.json").read_text()) == ("keep", "new")


def test_foreign_messages_are_scrubbed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "my-own-key-1234")
    said = scrub(
        "bad key my-own-key-1234, sk-abcdefghijkl, hf_abcdefghijkl\nBearer abc.def.ghi at "
        "https://user:pass@host/v1 \x1b]0;title\x07 \u202eevil \ud83d" + "x" * 1000
    )
    for secret in ("my-own", "sk-abc", "hf_abc", "abc.def", "user", "pass", "\x1b", "\x07", "\u202e", "\n"):
        assert secret not in said
    assert "https://***@host/v1" in said
    assert len(said) == 300
    said.encode()


@pytest.mark.parametrize("error", [KeyError("field"), RecursionError("deep"), MemoryError(), ZeroDivisionError("x")])
def test_any_error_is_reported_in_one_line(capsys, monkeypatch, error):
    monkeypatch.delenv("NANOVLM_DEBUG", raising=False)
    assert report("nanovlm", error) == 1
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("NANOVLM_DEBUG", "1")
    try:
        raise error
    except Exception as raised:
        report("nanovlm", raised)
    assert "Traceback" in capsys.readouterr().err


def test_full_disk_error_names_the_file(small_disk):
    path = small_disk("1m") / "record.yaml"
    path.write_text("before")
    with pytest.raises(OSError, match="No space left on device") as caught, atomic_write(path) as file:
        file.write("x" * (2 << 20))
    assert str(path) in str(caught.value)
    assert path.read_text() == "before"


@pytest.mark.slow
def test_lock_waits_or_raises(tmp_path, capsys):
    with locked(tmp_path / "lock", "busy") as held:
        assert held
        with pytest.raises(InputError, match=r"^busy$"), locked(tmp_path / "lock", "busy"):
            pass
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with locked(tmp_path / "lock", "waiting for another", wait=True) as held:
        assert held
        assert holder.wait() == 7
    assert capsys.readouterr().err == "waiting for another\n"


HOLDER = """
import os, sys, time
from nanovlm_hf.files import locked
with locked(sys.argv[1], "busy"):
    print(flush=True)
    time.sleep(1)
    os._exit(7)
"""


@pytest.mark.parametrize(
    "content",
    ['{"a": 1, "b": 2, "a": 3}', '[{"b": {"a": 1, "a": 1}}]', '{"a": {}, "a": {"a": 1}}', '{"a": 1, "\\u0061": 2}'],
)
def test_a_name_twice_in_an_object_is_refused_in_files(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    for read in (read_json, lambda path: list(read_jsonl(path))):
        with pytest.raises(InputError, match=r"x\.json: (line 1: )?a: it appears twice: remove one"):
            read(path)
    parse_json(content, "a reply")  # replies that were paid for are read

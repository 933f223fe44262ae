"""`nanovlm data describe` and the judge against endpoints that each deviate from a good one in one way."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter

import pytest

from nanovlm_hf.chat.endpoint import Endpoint

from helpers.captions import rows, write_captions
from helpers.chat_server import TRANSIENT
from helpers.gradings import rows_of, write_completions
from helpers.marks import mostly_slow
from helpers.output import only_line
from helpers.servers import serve

pytestmark = pytest.mark.usefixtures("api_key")

KEY = "sk-test-secret"
PHOTOS = 30


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("nanovlm_hf.chat.client.LONGEST_PAUSE", 0.1)


@pytest.fixture
def describe(run, server, tmp_path):
    """Return a function that runs `nanovlm data describe`: exit code, output, errors."""

    def call(name, *options, photos=PHOTOS, url=server.url):
        captions = write_captions(tmp_path / "captions.json", photos)
        url = f"{url}/as/{name}/v1" if name else f"{url}/v1"
        named = ("--captions", captions, "--out", tmp_path / "out", "--base-url", url, "--variant", "short")
        code, lines, errors = run("data", "describe", *named, *options)
        assert "Traceback" not in "".join(errors)
        assert "unexpected" not in "".join(errors)
        return code, lines, [error for error in errors if error.startswith("nanovlm: ")]

    return call


@pytest.fixture
def judge(run, server, tmp_path):
    def call(name, *options, texts=PHOTOS):
        path = write_completions(tmp_path / "texts.jsonl", rows_of(texts))
        url = f"{server.url}/as/{name}/v1" if name else f"{server.url}/v1"
        named = ("--completions", path, "--out", tmp_path / "judged", "--base-url", url)
        code, lines, errors = run("evaluate", "judge", *named, *options)
        assert "Traceback" not in "".join(errors)
        assert "unexpected" not in "".join(errors)
        return code, lines, [error for error in errors if error.startswith("nanovlm: ")]

    return call


def reasons_of(folder):
    return Counter(reason for row in rows(folder / "rejected.jsonl") for reason in row["reasons"])


def asked(server, name):
    return [entry for entry in server.entries() if entry["status"] == name]


READABLE = (
    *("no-usage", "null-usage", "negative-usage", "zero-usage", "text-usage", "list-usage", "number-usage"),
    *("true-usage", "nan-usage", "huge-usage", "parts", "texts", "odd-names", "odd-finish", "gzip", "redirect"),
)
UNREADABLE = (
    *("object-content", "number-content", "null-choice", "text-choices", "object-choices", "null-message"),
    *("text-message", "error", "error-in-choice", "list", "null", "empty", "html", "sse", "cut", "deep", "digits"),
    *("latin-1", "redirects"),
)


@pytest.mark.parametrize("name", mostly_slow(READABLE))
def test_replies_in_other_formats_are_read(describe, judge, tmp_path, name):
    assert describe(name, photos=3)[:2] == (0, ["short: 3 described, 0 not"])
    replies = (tmp_path / "out" / "replies.jsonl").read_bytes()
    assert "think" not in replies.decode()
    assert judge(name, texts=3)[0] == 0
    for row in rows(tmp_path / "out" / "replies.jsonl"):
        assert all(type(row["usage"][field]) is int for field in ("prompt_tokens", "completion_tokens"))
        assert 100 < row["usage"]["prompt_tokens"] < 1000
        assert 10 < row["usage"]["completion_tokens"] < 100
    # The folder remains usable.
    assert describe("", photos=4)[:2] == (0, ["short: 4 described, 0 not"])
    assert (tmp_path / "out" / "replies.jsonl").read_bytes().startswith(replies)


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_slow(UNREADABLE))
def test_unreadable_replies_are_not_stored(describe, judge, tmp_path, name):
    code, _, errors = describe(name, "--tries", 1, photos=2)
    assert code == 1
    assert "no_reply" in only_line(errors)
    assert (tmp_path / "out" / "replies.jsonl").read_bytes() == b""
    problems = [row["problem"] for row in rows(tmp_path / "out" / "rejected.jsonl")]
    assert all(problem.isprintable() and len(problem) <= 200 for problem in problems)
    if name in ("error", "error-in-choice", "html"):
        assert "busy" in problems[0].lower()
    code, _, errors = judge(name, "--timeout", 5, texts=1)
    assert code == 1
    assert "1 grades are missing" in only_line(errors)
    assert json.loads((tmp_path / "judged" / "judge.json").read_text())["lines"][0]["missing"]
    assert describe("", photos=2)[0] == judge("", texts=1)[0] == 0


def test_a_lone_surrogate_fails_its_gate_alone(describe, tmp_path):
    code, lines, _ = describe("surrogate", photos=3)
    assert (code, lines) == (1, ["short: 0 described, 3 not (non_ascii 3)"])
    assert len(rows(tmp_path / "out" / "replies.jsonl")) == 9
    assert "\ufffd" in rows(tmp_path / "out" / "replies.jsonl")[0]["text"]


@pytest.mark.parametrize("name", ["endless", "endless-refusal", "bomb"])
def test_an_endless_body_is_cut_off(describe, name):
    describe("", photos=1)  # imports and connections
    tracemalloc.start()
    code, _, errors = describe(name, "--tries", 1, "--temperature", 0.1, photos=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert code == 1
    assert "no_reply" in only_line(errors)
    assert peak < 40 * 2**20


@pytest.mark.slow
def test_a_slow_reply_is_cut_off_at_the_timeout(describe, tmp_path):
    began = time.monotonic()
    code, _, _ = describe("drip", "--timeout", 1, "--tries", 2, photos=2)
    assert code == 1
    assert time.monotonic() - began < 60
    assert [row["problem"] for row in rows(tmp_path / "out" / "rejected.jsonl")] == [
        "no reply in 1 s: raise --timeout for a slow model"
    ] * 2


def test_a_rate_limit_with_status_200_is_respected(describe, server):
    assert describe("limited-inside", "--tries", 1, photos=3)[1] == ["short: 3 described, 0 not"]
    assert len(asked(server, "limited-inside")) == 6


@pytest.mark.slow
def test_the_wait_that_an_endpoint_requests_is_bounded(describe, monkeypatch, tmp_path):
    monkeypatch.setattr("nanovlm_hf.chat.client.RATE_LIMIT_PATIENCE", 2.0)
    began = time.monotonic()
    code, _, _ = describe("long-waits", "--tries", 2, photos=2)
    assert code == 1
    assert time.monotonic() - began < 60
    assert reasons_of(tmp_path / "out") == {"no_reply": 2}


def test_refused_prompts_do_not_affect_others(describe, server, tmp_path):
    code, lines, errors = describe("refuse-some")
    assert (code, lines, errors) == (0, ["short: 25 described, 5 not (refusal 5)"], [])
    rejected = rows(tmp_path / "out" / "rejected.jsonl")
    assert [row["image_id"] for row in rejected] == [1, 2, 3, 4, 5]
    assert rejected[0]["problem"] == "400: The prompt of photo 1 was filtered"
    refused = rows(tmp_path / "out" / "refused.jsonl")
    assert {(row["image_id"], row["status"], row["reason"], row["final"]) for row in refused} == {
        (number, 400, "refusal", True) for number in range(1, 6)
    }
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    before = len(server.entries())
    assert describe("refuse-some")[:2] == (0, lines)
    assert len(server.entries()) == before, "refused requests are not sent again"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    # Without its line, a request is sent again.
    (tmp_path / "out" / "refused.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refused[1:]))
    assert describe("")[1] == ["short: 26 described, 4 not (refusal 4)"]


def test_refused_completions_do_not_affect_others(judge, server, tmp_path):
    assert judge("refuse-some", "--concurrency", 8)[0] == 0
    result = json.loads((tmp_path / "judged" / "judge.json").read_text())
    assert result["models"]["mini"]["missing"] == 6  # numbers 0 to 5
    missing = [line["missing"] for line in result["lines"] if line["scores"] is None]
    assert missing[1] == "refusal (400: The prompt of photo 1 was filtered)"
    before = len(server.entries())
    assert judge("refuse-some")[0] == 0
    assert len(server.entries()) == before


@pytest.mark.parametrize(
    "name", mostly_slow(["refuse-all", "filter-all", "detail", "text-detail", "plain", "escapes"], every=3)
)
def test_a_run_ends_if_every_request_is_refused(describe, judge, server, tmp_path, name):
    code, _, errors = describe(name, photos=200)
    assert code == 1
    assert "refuses every request" in only_line(errors)
    assert errors[0].isprintable()
    said = {"detail": "body.messages.0: field required", "plain": "your request is not wanted"}
    assert said.get(name, "") in errors[0]
    assert 10 <= len(asked(server, name)) < 30
    assert sum(reasons_of(tmp_path / "out").values()) == 200
    assert json.loads((tmp_path / "out" / "report.json").read_text())["variants"]["short"]["accepted"] == 0
    assert "refuses every request" in only_line(judge(name)[2])
    # All requests are sent again when the setting has been corrected.
    assert describe("", photos=200)[1] == ["short: 200 described, 0 not"]


def test_refusals_of_the_first_prompts_do_not_block_later_runs(describe, tmp_path):
    assert describe("refuse-first", "--concurrency", 1)[0] == 1
    assert describe("refuse-first", "--concurrency", 1)[:2] == (
        0,
        ["short: 18 described, 12 not (refused_by_endpoint 12)"],
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-credit", "no credit left (402)"),
        ("billing", "no credit left (400)"),
        ("forbidden", "OPENAI_API_KEY: not allowed to use gpt-4o"),
        ("unknown-model", '--model gpt-4o: not available at .* (404: model "m" not found'),
        ("not-found", "--base-url .* this address does not serve chat completions"),
        ("echo-404", "not available at"),
    ],
)
def test_errors_of_every_request_end_the_run_at_once(describe, judge, server, tmp_path, name, said):
    code, lines, errors = describe(name, photos=200)
    assert code == 1
    assert re.search(re.escape(said).replace(r"\.\*", ".*"), only_line(errors))
    assert KEY not in errors[0]
    assert len(asked(server, name)) <= 20
    assert lines[0].startswith("short: 0 described, 200 not")
    assert judge(name)[0] == 1
    assert (tmp_path / "judged" / "judge.json").exists()


def test_a_missing_v1_is_reported(run, server, tmp_path):
    captions = write_captions(tmp_path / "captions.json", 3)
    options = ("--captions", captions, "--out", tmp_path / "out")
    code, _, errors = run("data", "describe", *options, "--base-url", server.url)
    assert code == 1
    assert "is /v1 missing at the end?" in errors[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "said"), [("down-after-ten", "5 requests in a row"), ("key-revoked", "(401)")])
def test_replies_in_flight_are_stored_when_a_run_gives_up(describe, tmp_path, name, said):
    code, _, errors = describe(name, "--tries", 1, "--concurrency", 15)
    assert code == 1
    assert said in only_line(errors)
    assert KEY not in errors[0]
    replies = rows(tmp_path / "out" / "replies.jsonl")
    assert len(replies) == 10
    assert len(rows(tmp_path / "out" / "descriptions.jsonl")) == 10
    assert json.loads((tmp_path / "out" / "report.json").read_text())["variants"]["short"]["accepted"] == 10
    assert describe("")[1] == ["short: 30 described, 0 not"]
    assert len(rows(tmp_path / "out" / "replies.jsonl")) == 30


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_waits_for_requests_in_flight(describe, server, tmp_path, number, code):
    before = len(asked(server, "slow"))

    def interrupt():
        while len(asked(server, "slow")) < before + 25:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    done, _, errors = describe("slow", "--concurrency", 10, photos=100)
    assert done == code
    assert only_line(errors) == "nanovlm: stopped"
    answered = len(asked(server, "slow")) - before
    assert 20 <= len(rows(tmp_path / "out" / "descriptions.jsonl")) == answered < 100
    assert reasons_of(tmp_path / "out") == {"not_asked": 100 - answered}
    assert describe("", photos=100)[1] == ["short: 100 described, 0 not"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "command"), [(signal.SIGINT, 130, "describe"), (signal.SIGTERM, 143, "judge")]
)
def test_an_interrupted_run_writes_paid_replies(server, tmp_path, number, code, command):
    url = f"{server.url}/as/slow/v1"
    out = tmp_path / "out"
    if command == "describe":
        source = ("data", "describe", "--captions", write_captions(tmp_path / "captions.json", 200))
    else:
        source = ("evaluate", "judge", "--completions", write_completions(tmp_path / "a.jsonl", rows_of(200)))
    options = ("--out", out, "--base-url", url, "--concurrency", 10)
    before = len(asked(server, "slow"))
    process = subprocess.Popen(
        [sys.executable, "-m", "nanovlm_hf.cli", *map(str, (*source, *options))],
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(asked(server, "slow")) < before + 25:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "nanovlm: stopped"
    answered = len(asked(server, "slow")) - before
    replies = rows(out / "replies.jsonl")
    assert 20 <= len(replies) == answered < 200, "requests under way are waited for"
    if command == "describe":
        assert len(rows(out / "descriptions.jsonl")) == answered // 2
        assert len(rows(out / "descriptions.jsonl")) + len(rows(out / "rejected.jsonl")) == 400 - answered // 2
    else:
        assert json.loads((out / "judge.json").read_text())["models"]["mini"]["missing"] == 200 - answered


@pytest.mark.parametrize(
    "name", ["no-usage", "negative-usage", "zero-usage", "list-usage", "nan-usage", "huge-usage", "true-usage"]
)
def test_the_cost_is_bounded_without_reported_tokens(describe, server, tmp_path, name):
    code, _, errors = describe(name, "--max-cost", 0.01, photos=300)
    assert code == 1
    assert "--max-cost 0.01 is reached" in only_line(errors)
    replies = rows(tmp_path / "out" / "replies.jsonl")
    assert 5 <= len(replies) <= 20
    usage = [row["usage"] for row in replies]
    assert all(one["estimated"] for one in usage)
    assert 0.006 < sum(2.5 * one["prompt_tokens"] + 10 * one["completion_tokens"] for one in usage) / 1e6 <= 0.01
    # A later run counts the same.
    before = len(server.entries())
    assert describe(name, "--max-cost", 0.01, photos=300)[0] == 1
    assert len(server.entries()) == before
    assert describe("", "--max-cost", 0.02, photos=300)[0] == 1


def test_an_estimated_cost_is_reported_once(run, server, tmp_path):
    captions = write_captions(tmp_path / "captions.json", 10)
    url = f"{server.url}/as/no-usage/v1"
    _, _, errors = run("data", "describe", "--captions", captions, "--out", tmp_path / "out", "--base-url", url)
    assert sum("does not count all tokens" in error for error in errors) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["echo-400", "echo-500", "echo-404"])
def test_a_key_in_a_response_is_neither_stored_nor_shown(run, server, tmp_path, name):
    captions = write_captions(tmp_path / "captions.json", 4)
    texts = write_completions(tmp_path / "texts.jsonl", rows_of(4))
    options = ("--base-url", f"{server.url}/as/{name}/v1", "--out", tmp_path / "out")
    printed = run("data", "describe", "--captions", captions, "--tries", 1, *options)
    printed += run("evaluate", "judge", "--completions", texts, *options)
    assert KEY not in repr(printed)
    for path in (tmp_path / "out").iterdir():
        assert KEY not in path.read_text()


def test_escapes_of_an_endpoint_do_not_reach_the_terminal(describe, tmp_path):
    _, _, errors = describe("escapes", photos=2)
    line = only_line(errors)
    assert line.isprintable()
    assert all(row["problem"].isprintable() for row in rows(tmp_path / "out" / "rejected.jsonl"))


@pytest.mark.parametrize("name", ["mistral", "no-temperature", "no-schema"])
def test_an_unknown_parameter_is_removed_or_replaced(run, server, tmp_path, name):
    captions = write_captions(tmp_path / "captions.json", 20)
    texts = write_completions(tmp_path / "texts.jsonl", rows_of(20))
    before = len(asked(server, name))
    options = ("--base-url", f"{server.url}/as/{name}/v1", "--temperature", 0.5, "--concurrency", 4)
    described = ("data", "describe", "--captions", captions, "--out", tmp_path / "out", *options)
    code, lines, errors = run(*described, "--variant", "short")
    assert (code, lines) == (0, ["short: 20 described, 0 not"])
    told = [error for error in errors if "the endpoint does not support" in error]
    sent = [entry["sent"] for entry in asked(server, name)[before:]]
    good = [one for one in sent if len(one) == len(sent[-1]) and one.keys() == sent[-1].keys()]
    assert len(good) == 20
    if name == "no-schema":
        assert not told
    else:
        assert len(told) == 1
        assert len(sent) <= 24, "no more than those under way are sent twice"
    if name == "mistral":
        assert good[0] == {"model": "gpt-4o", "temperature": 0.5, "max_tokens": 120}
    if name == "no-temperature":
        assert good[0] == {"model": "gpt-4o", "max_completion_tokens": 120}
    # The folder belongs to the request as it was asked for.
    assert run(*described, "--variant", "short")[0] == 0
    assert len(asked(server, name)) == before + len(sent)
    code, _, errors = run("evaluate", "judge", "--completions", texts, "--out", tmp_path / "judged", *options)
    last = asked(server, name)[-1]["sent"]
    assert ("response_format" in last) == (name != "no-schema")
    assert len([error for error in errors if "the endpoint does not support" in error]) == 1


def test_a_value_out_of_range_is_not_removed(describe, server):
    code, _, errors = describe("hot", "--temperature", 5)
    assert code == 1
    assert "less than or equal to 2" in only_line(errors)
    assert all("temperature" in entry["sent"] for entry in asked(server, "hot"))


def test_a_model_that_exhausts_the_limit_by_reasoning_is_stopped(describe, judge, server, tmp_path):
    before = len(asked(server, "thinking"))
    code, _, errors = describe("thinking", photos=300)
    assert code == 1
    assert "raise --max-completion-tokens" in only_line(errors)
    assert 20 <= len(asked(server, "thinking")) - before <= 40
    replies = rows(tmp_path / "out" / "replies.jsonl")
    assert len(replies) == len(asked(server, "thinking")) - before, "state is kept"
    assert describe("", "--max-completion-tokens", 200, photos=300)[0] == 0
    code, _, errors = judge("thinking")
    assert code == 1
    assert "raise --max-completion-tokens" in only_line(errors)
    assert judge("", "--max-completion-tokens", 2000)[0] == 0


def test_a_text_that_reached_the_limit_is_not_retried(describe, judge, server, tmp_path):
    before = len(asked(server, "thinking"))
    for _ in range(2):
        code, _, errors = describe("thinking", photos=5)
        assert code == 1
        assert "no description was accepted: raise --max-completion-tokens" in only_line(errors)
        assert len(asked(server, "thinking")) - before == 5
    code, _, errors = judge("thinking", texts=3)
    assert code == 1
    assert "none of 3 completions is graded" in only_line(errors)
    assert len(asked(server, "thinking")) - before == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--concurrency", 0), "--concurrency"),
        (("--concurrency", -3), "--concurrency"),
        (("--concurrency", 10**9), "--concurrency 1000000000: must be between 1 and 1000"),
        (("--concurrency", "many"), "--concurrency"),
        (("--timeout", "nan"), "--timeout"),
        (("--timeout", "inf"), "--timeout"),
        (("--timeout", -1), "--timeout"),
        (("--max-cost", "nan"), "--max-cost"),
        (("--max-cost", -1), "--max-cost"),
        (("--price", -1, 2), "--price -1 2"),
        (("--price", 0, 2), "--price 0 2"),
        (("--price", 1, "nan"), "--price 1 nan"),
        (("--price", "inf", 2), "--price inf 2"),
        (("--temperature", "nan"), "--temperature"),
        (("--temperature", "inf"), "--temperature inf"),
        (("--poll-seconds", "nan"), "--poll-seconds"),
        (("--base-url", "http://"), "--base-url http://: not a valid URL"),
        (("--base-url", "http://[::1"), "--base-url"),
        (("--base-url", "http://a:99999/v1"), "--base-url"),
        (("--base-url", "http://a b/v1"), "--base-url"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_impossible_values_are_wrong_usage(run, tmp_path, options, said, dry_run):
    captions = write_captions(tmp_path / "captions.json", 2)
    texts = write_completions(tmp_path / "texts.jsonl", rows_of(2))
    more = ("--dry-run",) if dry_run else ()
    for command in (("data", "describe", "--captions", captions), ("evaluate", "judge", "--completions", texts)):
        code, _, errors = run(*command, "--out", tmp_path / "out", *options, *more)
        assert code == 2
        assert said in only_line(errors)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", ["http://user:hunter2@a/v1", "user:hunter2@a/v1", "http://user:hun/ter2@a/v1"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_password_in_the_address_is_refused_and_not_shown(run, tmp_path, monkeypatch, url, dry_run):
    captions = write_captions(tmp_path / "captions.json", 2)
    more = ("--dry-run",) if dry_run else ()
    code, _, errors = run("data", "describe", "--captions", captions, "--out", tmp_path, "--base-url", url, *more)
    assert code == 2
    assert "ter2" not in only_line(errors)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    code, _, errors = run("evaluate", "judge", "--completions", "paper", "--out", tmp_path, *more)
    assert code == 2
    assert "ter2" not in only_line(errors)


def test_a_key_in_the_query_of_the_address_is_not_shown(run, server, tmp_path):
    captions = write_captions(tmp_path / "captions.json", 2)
    url = f"{server.url}/v1?key=hunter2"
    _, lines, errors = run(
        "data", "describe", "--captions", captions, "--out", tmp_path, "--base-url", url, "--dry-run"
    )
    assert lines
    assert "hunter2" not in repr((lines, errors))
    assert Endpoint("m", base_url=url).address == f"{server.url}/v1"


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-\x1b[31m", "sk-\u00e9"])
def test_an_impossible_key_is_refused_at_once(describe, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    code, _, errors = describe("")
    assert code == 2
    assert "OPENAI_API_KEY" in only_line(errors)
    assert "sk-" not in errors[0]


PROMPTS = 1000


def account_for(folder):
    described = [row["image_id"] for row in rows(folder / "descriptions.jsonl")]
    rejected = rows(folder / "rejected.jsonl")
    assert sorted(described + [row["image_id"] for row in rejected]) == list(range(1, PROMPTS + 1))
    assert all(row["reasons"] for row in rejected)
    return {row["image_id"]: row["reasons"] for row in rejected}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "kills"), [("describe", 3), ("judge", 2)])
def test_kills_faults_and_refused_prompts(run, tmp_path, command, kills):
    import random

    seed = int(os.environ.get("NANOVLM_CHAOS_SEED", random.SystemRandom().randint(0, 10**6)))
    print(f"NANOVLM_CHAOS_SEED={seed}")
    moments = random.Random(seed)
    out = tmp_path / "out"
    if command == "describe":
        captions = write_captions(tmp_path / "captions.json", PROMPTS)
        source = ("data", "describe", "--variant", "short", "--captions", captions)
    else:
        source = ("evaluate", "judge", "--completions", write_completions(tmp_path / "a.jsonl", rows_of(PROMPTS)))
    with serve(
        "chat_server.py", tmp_path / "server", "--faults", "0.2", "--latency", "0.02", "--refused", "6"
    ) as server:
        options = ("--base-url", f"{server.url}/v1", "--concurrency", "32", "--timeout", "2", "--out", out)
        call = [sys.executable, "-m", "nanovlm_hf.cli", *map(str, (*source, *options))]
        for _ in range(kills):
            process = subprocess.Popen(call, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            target = len(server.entries()) + moments.randint(20, 250)
            while len(server.entries()) < target and process.poll() is None:
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        done = subprocess.run(call, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        entries = server.entries()
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        code, _, errors = run(*source, *options)
        assert code == 0, errors
        assert len(server.entries()) == len(entries), "nothing is asked again"
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    if command == "describe":
        reasons = account_for(out)
        assert all(reasons[number] == ["refused_by_endpoint"] for number in range(1, 7))
        assert len(reasons) < 0.05 * PROMPTS
    else:
        lines = json.loads(files["judge.json"])["lines"]
        assert len(lines) == PROMPTS
        assert all(line["scores"] is not None or line["missing"] for line in lines)
        assert sum(line["scores"] is None for line in lines) < 0.05 * PROMPTS
    replies = rows(out / "replies.jsonl")
    assert len({(row["fingerprint"], row["attempt"]) for row in replies}) == len(replies)
    answered = sum(entry["status"] not in (*TRANSIENT, "bad-request") for entry in entries)
    assert answered - len(replies) <= kills * 32, "only what was under way at a kill is asked again"

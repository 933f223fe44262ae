"""Mutated files for `nanovlm push --dry-run` and `nanovlm evaluate`: one line or success, never a traceback or a hang.

The seed is fixed; `NANOVLM_FUZZ_SEED` and `NANOVLM_FUZZ_CASES` try others.
"""

import json
import os
import random
import shutil
import signal

import pytest
from test_publishable import dry_run, whole_checkpoint  # noqa: F401

from helpers.evaluations import QUICK

SEED = int(os.environ.get("NANOVLM_FUZZ_SEED", "0"))
CASES = int(os.environ.get("NANOVLM_FUZZ_CASES", "60"))
SECONDS = 60  # that one case may take
VALUES = [
    *(None, True, 0, -1, 1.5, 10**30, float("nan"), float("inf"), "", "text", "\ud83d", "\0", "\u2028", "a" * 10_000),
    *([], {}, [[]], {"a": {}}, [None], "../../etc/passwd", "<image>", [[[[[[[[]]]]]]]]),
]
PIECES = [*'{}[]":,', "\n", "---\n", "- ", "&a ", "*a", "!!python/object:x ", "\0", "\x85", "\t", "e999", r"\ud800"]

pytestmark = pytest.mark.slow


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Change a file in one to three places, as bytes or, if it is JSON, as values."""
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            try:
                content = json.dumps(mutate_value(json.loads(content), rng)).encode()
                continue
            except ValueError:
                pass
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice([0, 1, 5, 100]))
        new = rng.choice(
            [b"", content[start:end] * 2, bytes([rng.randrange(256)]), rng.choice(PIECES).encode("utf-8", "replace")]
        )
        content = content[:start] if rng.random() < 0.1 else content[:start] + new + content[end:]
    return content


def mutate_value(value, rng):
    """Replace or remove one value somewhere in a JSON document."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(list(keys))
        if rng.random() < 0.15:
            value.pop(key)
        else:
            value[key] = mutate_value(value[key], rng)
        return value
    return rng.choice(VALUES)


@pytest.fixture
def limited():
    """Fail a case that takes too long."""

    def stop(*_):
        raise TimeoutError("this case does not end")

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def check(code, errors, case):
    assert code in (0, 1, 2), case
    assert code == 0 or len(errors) == 1, (case, errors)
    for line in errors:
        assert line.startswith("nanovlm: "), (case, line)
        assert not [word for word in ("unexpected", "Traceback", "does not end") if word in line], (case, line)


FILES = ["README.md", "metrics.json", "metrics.jsonl", "evaluation.json", "training_args.yaml", "config.json"]
FILES += ["generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"]


def test_mutated_checkpoints_are_pushed_or_refused_in_one_line(run, whole_checkpoint, tmp_path, limited):  # noqa: F811
    from nanovlm_hf.checkpoints import SHIPPED

    rng = random.Random(SEED)
    evaluation = (SHIPPED["mini-short"] / "evaluation.json").read_bytes()
    for case in range(CASES):
        folder = shutil.copytree(whole_checkpoint, tmp_path / "tiny")
        name = rng.choice(FILES)
        original = evaluation if name == "evaluation.json" else (folder / name).read_bytes()
        (folder / name).write_bytes(mutate(original, rng))
        limited()
        code, _, errors = dry_run(run, folder) if case % 2 else run("push", folder, "org/tiny", "--dry-run")
        check(code, errors, (case, name, (folder / name).read_bytes()[:300]))
        shutil.rmtree(folder)


def test_mutated_caches_are_done_again_or_refused_in_one_line(run, toy, saved, tmp_path, limited):
    from nanovlm_hf.evaluation.run import EvaluationSettings
    from nanovlm_hf.evaluation.run import evaluate as whole

    out = tmp_path / "whole"
    settings = {"split": "validation", "limit": 3, "max_new_tokens": 4, "grounding_images": 20}
    whole(EvaluationSettings([str(saved)], str(toy / "data"), "short", out, **settings), say=lambda _: None)
    expected = json.loads((out / "results.json").read_text())["grounding"]
    rng = random.Random(SEED)
    for case in range(CASES // 3):
        folder = shutil.copytree(out, tmp_path / "out")
        path = rng.choice(sorted([*(folder / "completions").iterdir(), *(folder / "grounding").iterdir()]))
        path.write_bytes(mutate(path.read_bytes(), rng))
        limited()
        code, _, errors = run(
            *("evaluate", "--model", saved, "--dataset", toy / "data", "--out", folder, *QUICK),
            *("--grounding-images", 20),
        )
        check(code, errors, (case, path.name, path.read_bytes()[:300]))
        if code == 0:
            assert json.loads((folder / "results.json").read_text())["grounding"] == expected, case
        shutil.rmtree(folder)

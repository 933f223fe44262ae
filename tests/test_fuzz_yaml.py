"""Mutated YAML configs are read, or refused in one line."""

import os
import random

import pytest

from nanovlm_hf import InputError
from nanovlm_hf.training.arguments import NAMES, read_arguments

from helpers.runs import ROOT

SEED = int(os.environ.get("NANOVLM_FUZZ_SEED", "0"))
CASES = int(os.environ.get("NANOVLM_FUZZ_CASES", "1000"))
VALUES = [
    ".nan", ".inf", "-.inf", "nan", "-1", "0", "1e400", "9" * 30, "9" * 5000, "0x" + "f" * 4500, "1_0", "010", "1:30",
    "true", "no", "~", "''", '"\\0"', '"\\ud800"', "[]", "[[]]", "{}", "[1, 2]", "{a: [b]}", "*a", "&a 1", "&a [*a]",
    "!!python/object/apply:os.system [ls]", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!timestamp x", "!!int x",
    "!!float x", "!!bool x", "!!null x", "!!str 1", "2020-01-01", "2020-13-45", "|", ">", "- 1", "? a", "@", "`", "%",
    "\t", "# x", "--overwrite", "short", "auto", "\u2028", "\x85", "😀", "é" * 300, "<<", "!!merge x", "1.0e",
    "0b2", "=",
]  # fmt: skip
LINES = ["<<: {seed: 1}", "---", "...", "%YAML 9.9", "? [a]", "- x", "a: &a [x]", "b: *a", "{", "]", "\t", ": ", "seed"]


def mutated(rng: random.Random, lines: list[str]) -> bytes:
    lines = list(lines)
    for _ in range(rng.randint(1, 4)):
        place, kind = rng.randrange(len(lines) + 1), rng.randrange(5)
        if kind == 0:
            lines.insert(place, f"{rng.choice(NAMES)}: {rng.choice(VALUES)}")
        elif kind == 1:
            lines.insert(place, rng.choice(LINES))
        elif kind == 2 and lines:
            del lines[min(place, len(lines) - 1)]
        elif kind == 3 and lines:
            lines.insert(place, rng.choice(lines))
        elif lines:
            place = min(place, len(lines) - 1)
            lines[place] = f"{lines[place].split(':')[0]}: {rng.choice(VALUES)}"
    content = bytearray("\n".join(lines).encode())
    for _ in range(rng.choice([0, 0, 0, 1, 3, 20])):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


@pytest.mark.slow
def test_mutated_configs_are_read_or_refused(tmp_path):
    rng = random.Random(SEED)
    configs = [path.read_text().splitlines() for path in sorted((ROOT / "training" / "configs").glob("*.yaml"))]
    path = tmp_path / "config.yaml"
    read = 0
    for number in range(CASES):
        content = mutated(rng, rng.choice(configs))
        path.write_bytes(content)
        message = None
        try:
            read_arguments(["--config", str(path)])
            read += 1
        except InputError as error:
            message = str(error)
        except BaseException as error:
            raise AssertionError(f"seed {SEED}, case {number}: {content!r}") from error
        assert message is None or ("\n" not in message and len(message) < 1000), (SEED, number, content)
    assert 0.02 * CASES < read < 0.95 * CASES, "some are valid, some are not"

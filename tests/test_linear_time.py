"""The time that is spent on foreign text grows with its length, not with its square."""

import contextlib
import itertools
import random
import time

import pytest

from nanovlm_hf.chat.api_errors import plain_text
from nanovlm_hf.chat.markup import has_markup, unwrapped, without_reasoning
from nanovlm_hf.chat.untrusted import instruction_in
from nanovlm_hf.data import quality
from nanovlm_hf.data.related import is_related
from nanovlm_hf.errors import holds_secret, scrub
from nanovlm_hf.evaluation.coherence import ends
from nanovlm_hf.evaluation.grades import read_grades
from nanovlm_hf.evaluation.judge import CRITERIA
from nanovlm_hf.evaluation.object_hallucination import _WORD
from nanovlm_hf.evaluation.originality import rouge_tokens
from nanovlm_hf.evaluation.templates import markdown
from nanovlm_hf.hub.publishable import _HOME
from nanovlm_hf.words import words

LENGTH = 3000
NUMBER = 25  # of texts for a function
BEGINNINGS = (
    *("", "a", "x\n", "A man rides.", "user", "note", "score", "hey ", "give ", "(", "(1", "-1words", "#", "# a", "1"),
    *("```\n", "```py", "yes", "Sure!", "here", "**", "<think>", "</think", "<s>", "<a>", "analysis", "grammar", "://"),
    *("Bearer ", "sk-", "C:\\", "i'm ", '{"grammar": "8'),
)
UNITS = (
    *(
        "\n",
        "\t",
        " ",
        "\n\t",
        " \n",
        "\r\n",
        "\u2028",
        "a",
        "-a",
        "a ",
        "-",
        "!",
        ".",
        ". ",
        "!a",
        "1",
        "1 ",
        "(",
        "'",
    ),
    *('"', "_", "*", "`", "#", "# ", "<", "{", ":", "/", "\\", "a:", "://", "word ", "user ", "of ", "<think>", "</s>"),
)
KNOWN = [("a", "\n"), ("x\n", "\t"), ("a", "-a"), ("A man rides.", "!"), ("user", " "), ("# a", "\t"), ("yes", "-")]
OTHERS = random.Random(0).sample(list(itertools.product(BEGINNINGS, UNITS)), NUMBER)


def grades(text):
    with contextlib.suppress(ValueError):
        read_grades(text, CRITERIA, 10)


def seconds(function, text):
    begin = time.process_time()
    function(text)
    return time.process_time() - begin


@pytest.mark.parametrize(
    "function",
    [
        *(
            has_markup,
            unwrapped,
            without_reasoning,
            instruction_in,
            quality.clean,
            quality.count_sentences,
            words,
            ends,
        ),
        *(holds_secret, scrub, plain_text, markdown, rouge_tokens, grades, _WORD.findall, _HOME.search),
        pytest.param(quality._OPENING.match, id="opening"),
        pytest.param(quality._REFUSAL.match, id="refusal"),
        pytest.param(lambda text: is_related(text, ["x" + text]), id="is_related"),
    ],
    ids=lambda function: getattr(function, "__name__", None),
)
def test_twice_the_text_takes_twice_the_time(function):
    for beginning, unit in KNOWN + OTHERS:
        end = '"}' if "{" in beginning else "x"
        text = beginning + unit * (LENGTH // len(unit)) + end
        taken = seconds(function, text)
        if taken > 0.01:  # below, the time is mostly that of the measurement
            taken = min(seconds(function, text) for _ in range(3))
            twice = min(seconds(function, beginning + 2 * unit * (LENGTH // len(unit)) + end) for _ in range(3))
            assert twice < 3 * taken, (beginning, unit, end)


@pytest.mark.parametrize("function", [has_markup, unwrapped, without_reasoning, instruction_in, quality.clean])
@pytest.mark.parametrize("unit", ["\n", " a", "!", "-a"])
def test_a_reply_of_megabytes_takes_no_longer(function, unit):
    assert seconds(function, "A dog" + unit * (2**21 // len(unit)) + "x") < 1


@pytest.mark.parametrize("text", ["a" + "\n" * 16_000 + "x", "a" + "-a" * 6000, "A man rides." + "!" * 16_000 + "x"])
def test_the_gates_end(text):
    reply = {"text": text, "finish_reason": "stop", "refusal": None}
    assert seconds(lambda _: quality.problems(reply, quality.LengthRange((1, 99), (1, 9))), text) < 2


def test_a_reply_that_is_too_long_fails_the_gate_of_words():
    reply = {"text": "A dog runs. " * 2**18, "finish_reason": "stop", "refusal": None}
    assert quality.problems(reply, quality.LengthRange((1, 10**6), (1, 10**6))) == ["words"]

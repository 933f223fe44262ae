"""What chat models put around a description, and what remains of it."""

import time

import pytest

from nanovlm_hf.chat.markup import has_markup, unwrapped, without_reasoning
from nanovlm_hf.data import quality
from nanovlm_hf.variants import VARIANTS, LengthRange

TEXT = "A little dog runs over the green grass. It has a red ball in its mouth and is very happy today."
ACCEPTED = VARIANTS["short"].accepted


def reply(text, finish_reason="stop"):
    return {"text": text, "finish_reason": finish_reason, "refusal": None}


@pytest.mark.parametrize(
    "reasoning",
    [
        "<think>\n\n</think>\n\n{}",
        "<think>The user wants <b>20 words</b>: a dog. Wait.</think>{}",
        "<THINK>Hm.</THINK> {}",
        "Okay, they ask for a dog.\n</think>\n\n{}",
        "<thinking>a</thinking>\n<reasoning>b</reasoning>\n{}",
        "<think>first <think>second</think> third</think>{}",
        "[THINK]It has to be short.[/THINK]{}",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
        "analysisWe need 20 words.assistantfinal{}",
        "<|im_start|>assistant\n<think></think>{}",
    ],
)
def test_reasoning_before_the_answer_is_taken_off(reasoning):
    assert quality.clean(reasoning.format(TEXT)) == TEXT
    assert quality.problems(reply(reasoning.format(TEXT)), ACCEPTED) == []


@pytest.mark.parametrize(
    "wrapping",
    [
        "Sure! Here's a short description:\n\n{}",
        "Sure, here you go:\n{}",
        "Certainly! Here is the description: {}",
        "Here\u2019s a simple description based on the captions:\n\n\u201c{}\u201d",
        "**Short description:** {}",
        "**Short description**: {}",
        "**Short description: {}**",
        "**Short Description**\n\n{}",
        "Description: {}",
        "## Description\n{}",
        "ShortDesc: {}",
        "# {}",
        "**{}**",
        "*{}*",
        "_{}_",
        "```\n{}\n```",
        "```text\n{}\n```",
        "`{}`",
        '"{}"',
        "'{}'",
        "<description>{}</description>",
        "{} (22 words)",
        "{}\n\n(Word count: 22)",
        "{}\n\n**Word count:** 22",
        "{}\n\n---\n*Word count: 22*",
        "{} [2 sentences, 22 words]",
        "{} *(20-25 words)*",
        "{}<|im_end|>",
        "{}</s>",
        "{} <|endoftext|>",
        "{}<end_of_turn>\n",
        "{}<|eot_id|>",
        "<s>{}</s>",
        '<think>\n</think>\n\nSure! Here\'s a short description:\n\n**"{}"**\n\n(22 words)<|im_end|>',
    ],
)
def test_harmless_wrappings_are_taken_off(wrapping):
    assert quality.clean(wrapping.format(TEXT)) == TEXT
    assert quality.problems(reply(wrapping.format(TEXT)), ACCEPTED) == []


@pytest.mark.parametrize(
    "left",
    [
        "Sure! {}",
        "Of course, {}",
        "Certainly. {}",
        "Here is my best try: {}",
        "# A Day in the Park\n\n{}",
        "**A Day in the Park**\n\n{}",
        "1. {}",
        "- {}",
        "> {}",
        "{}\n2. It barks.",
        "{} <br>",
        "{}<|im_end|>\n<|im_start|>user",
        "A dog. <think>Too short?</think> {}",
        "<think>This never ends. {}",
        "[A dog](x) {}",
        "{} See https://example.org.",
        "{} See example.com for more.",
        "{} (22 words) Good.",
        '{{"short": "{}"}}',
        "{} `dog`",
        "{} print('dog')",
        "A *dog*. {}",
        "Based on the captions, {}",
        "{} Let me know if you want it longer!",
        "{}\n\nNote: I kept it simple.",
        "{}\n\n(Note: I kept it simple.)",
        "{} - 22 words",
        "Short: {}\nLong: A dog.",
        "Here\u2019s your short description!\n\n{}",
        "<|begin_of_thought|>Hm.<|end_of_thought|>{}",
        "| dog | {} |",
    ],
)
def test_what_remains_of_markup_is_rejected(left):
    assert "markup" in quality.problems(reply(left.format(TEXT)), LengthRange((1, 99), (1, 99)))


@pytest.mark.parametrize(
    "text",
    [
        "Here is a big brown dog. It runs over the grass with a ball in its mouth, and a boy runs too.",
        "Here it is, the big red bus that takes us to town. It has 2 floors and a lot of shiny windows.",
        "House #5 has a green door. A cat sits in front of it and waits, and its tail goes round and round.",
        "The sign has a lot of words on it. A man reads it to his son, and the boy has only 3 words to say.",
        "I hear it in my head: puff, puff, puff! The black train goes up the hill and the boy waves to it.",
        "'Run!' says the boy to the dog. It runs to him as fast as it can and then it says 'woof'",
        "A boy looks at 10. It is on the door, and his friend lives there. They play with a ball all day.",
    ],
)
def test_descriptions_of_children_are_left_as_they_are(text):
    assert quality.clean(text) == text
    assert quality.problems(reply(text), ACCEPTED) == []


def test_a_reply_that_is_cut_off_is_truncated_whatever_else_it_lacks():
    for text in ("", "  ", "<think>The user wants", "A little"):
        assert quality.problems(reply(text, "length"), ACCEPTED) == ["truncated"]
    assert quality.problems(reply("<think>Nothing to say.</think>"), ACCEPTED) == ["empty"]


@pytest.mark.parametrize("character", ["\x1b[31m", "\0", "\a", "\x7f", "\b", "\u202e", "\u2066", "\u200f", "\x9b"])
def test_control_characters_never_pass(character):
    assert "non_ascii" in quality.problems(reply(TEXT.replace("red", f"{character}red")), ACCEPTED)


@pytest.mark.parametrize(
    "text",
    ["<think>" * 3000, " " * 19_999, "(" * 19_999, "*" * 19_999, "here " * 3999, "<|a|>" * 3999, "analysis" * 2400],
)
def test_no_reply_takes_long(text):
    began = time.process_time()
    has_markup(unwrapped(without_reasoning(text)))
    assert time.process_time() - began < 5

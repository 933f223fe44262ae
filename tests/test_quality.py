import pytest

from nanovlm_hf import InputError
from nanovlm_hf.data import quality
from nanovlm_hf.data.describe import messages_of, packaged_prompt

GOOD = "A little dog runs over the green grass. It has a red ball in its mouth and is very happy today."
BAND = quality.ACCEPTED["short"]


def reply(text, finish_reason="stop", refusal=None):
    return {"text": text, "finish_reason": finish_reason, "refusal": refusal}


def test_a_good_text_passes():
    assert quality.problems(reply(GOOD), BAND) == []


@pytest.mark.parametrize(
    ("bad", "gates"),
    [
        (reply(""), ["empty"]),
        (reply("  \n"), ["empty"]),
        (reply(GOOD, "length"), ["truncated"]),
        (reply(GOOD, "content_filter"), ["refusal"]),
        (reply("", refusal="No."), ["refusal"]),
        (reply("I'm sorry, but I can't help with that."), ["refusal"]),
        (reply("I’m sorry, but I cannot create a description of these captions for you today."), ["refusal"]),
        (reply("As an AI language model I have no eyes."), ["refusal"]),
        (reply("I cannot assist with that."), ["refusal"]),
        (reply("A dog runs over the grass."), ["words"]),
        (reply(GOOD + " " + GOOD), ["words"]),
        (reply(GOOD.replace(".", ". Fun. Fun. ")), ["sentences"]),
        (reply("Oh, " + GOOD), ["opening"]),
        (reply('"Wow! ' + GOOD), ["opening"]),
        (reply("Look at the dog! " + GOOD), ["opening"]),
        (reply(GOOD + " 😀"), ["non_ascii"]),
        (
            reply("Der kleine Junge spielt mit dem Hund im Garten. Die Sonne scheint und alle sind heute sehr froh."),
            ["language"],
        ),
    ],
)
def test_each_gate_holds_back_what_it_is_for(bad, gates):
    assert quality.problems(bad, BAND) == gates


@pytest.mark.parametrize(
    "text",
    [
        "Looking up, a little girl sees a kite in the sky. She is so sorry that she cannot fly up to it.",
        "I can do a roll on the grass, but I cannot do what the two men do with their feet in the air.",
        "I can't help but smile when the small brown puppy jumps into the water and shakes its ears.",
        "Ohio is on the big sign, and a woman stands next to it with a bag in her left hand.",
    ],
)
def test_children_may_say_what_only_sounds_like_a_fault(text):
    assert quality.problems(reply(text), BAND) == []


def test_typewriter_signs_and_quotation_marks():
    assert quality.clean(" “It’s a dog — a big one…”\n") == "It's a dog - a big one..."
    assert quality.clean('"A dog says "woof" loudly"') == '"A dog says "woof" loudly"'


def test_counting():
    assert quality.words("The dog's t-shirt isn't 10 years old!") == [
        "The",
        "dog's",
        "t-shirt",
        "isn't",
        "10",
        "years",
        "old",
    ]
    assert quality.count_sentences("He runs. She jumps!! Why?") == 3
    assert quality.count_sentences('He says "run!" and then they') == 2
    assert quality.count_sentences("A dog in the park") == 1
    assert quality.count_sentences("") == 0


def test_near_duplicates():
    seen = quality.NearDuplicates()
    assert seen.add(GOOD)
    assert not seen.add(GOOD)
    assert not seen.add(GOOD.replace("happy today", "happy now"))
    assert seen.add("Two women sit at a table with a cake. They wait for their friends and then they sing a song.")


@pytest.mark.parametrize("word", "dog Dogs running happier stopped baker slowly smiled mother's 7".split())
def test_easy_words(word):
    assert quality.is_easy(word)


@pytest.mark.parametrize("word", ["parliament", "photosynthesis", "zxcv", "skateboarder"])
def test_words_outside_a_childs_vocabulary(word):
    assert not quality.is_easy(word)


def test_ranges():
    assert quality.parse_range("--words-short", "15-32") == (15, 32)
    for wrong in ("15", "32-15", "a-b", "15 to 32"):
        with pytest.raises(InputError, match="write it as LEAST-MOST"):
            quality.parse_range("--words-short", wrong)


def test_the_prompts_are_the_papers_word_for_word():
    """Prompts 1 and 2 of figure 2, typing slips included; a change here changes every dataset made from now on."""
    assert packaged_prompt("short") == (
        "You are a 4-5 year-old kid who has to write a short description using very simple english words. Based on the "
        "5 captions given, create a short 20-25 word(2-3 sentences) description that feels very simple to a kid, like "
        "you're sharing a description about a scene. Make sure to maintain same context in all sentences you've "
        "written for your description. Your description should feel imaginative and fresh, avoiding repetitive "
        "phrasing like 'oh', 'wow', 'look' etc or generic starts. Keep your tone fresh and let your curiosity shine."
    )
    assert packaged_prompt("long") == (
        "You are a 4-5 year-old kid who has to write a long description using very simple english words. Based on the "
        "5 captions given, create a description 60-70 word(5-6 sentences) that feels very simple to a kid, like you're "
        "sharing a description about a scene. Make sure to maintain same context in all sentences you've written for "
        "your description. Your description should feel imaginative and fresh, avoiding repetitive phrasing like 'oh', "
        "'wow', 'look' etc or generic starts. Keep your tone fresh and let your curiosity shine."
    )
    assert messages_of("PROMPT", ["a dog", "one dog runs"]) == [
        {"role": "user", "content": "PROMPT\n\nCaptions:\n1. a dog\n2. one dog runs"}
    ]

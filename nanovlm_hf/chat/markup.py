"""Removal of what chat models add to a requested text: reasoning, a preamble, Markdown, end markers."""

from __future__ import annotations

import re

MAX_CHARACTERS = 20_000  # longer replies are left unchanged; no requested text is nearly as long

_TAG = r"(?:think|thinking|thought|thoughts|reasoning|reason|reflection|analysis|scratchpad|seed:think)"
_OPENING = rf"(?:<{_TAG}(?:\s[^<>]{{0,80}})?>|\[{_TAG}\]|\u25c1{_TAG}\u25b7)"
_CLOSING = rf"(?:</{_TAG}\s*>|\[/{_TAG}\]|\u25c1/{_TAG}\u25b7)"
_REASONING = re.compile(rf"\s*{_OPENING}.*?{_CLOSING}", re.IGNORECASE | re.DOTALL)
_LONE_CLOSING = re.compile(_CLOSING, re.IGNORECASE)
_ANY_OPENING = re.compile(_OPENING, re.IGNORECASE)
# Channels of gpt-oss; servers that remove the special tokens leave the names of the channels.
_FINAL_CHANNEL = "<|channel|>final<|message|>"
_BARE_CHANNELS = re.compile(r"\s*analysis.*?assistantfinal", re.DOTALL)

# Special tokens of chat templates.
_TOKEN = r"(?:<\|[\w-]{1,30}\|>|<\uff5c[^<>]{1,40}\uff5c>|</?s>|<(?:eos|bos|end_of_turn)>|\[/INST\])"
_TOKENS_BEFORE = re.compile(rf"(?:\s*(?:{_TOKEN}|<start_of_turn>))+\s*(?:(?:assistant|model)\s*\n)?", re.IGNORECASE)
_TOKENS_AFTER = re.compile(rf"(?:\s*{_TOKEN})+\s*\Z", re.IGNORECASE)

# Repetitions are bounded, or what follows cannot begin inside them: the time grows with the length, not its square.
_FENCE = re.compile(r"```\w{0,20}[ \t]*")  # its first line
_ELEMENT = re.compile(r"<(\w{1,20})>([^<>]*)</\1>")
_AROUND = ("***", "**", "*", "___", "__", "_", "```", "``", "`", '"', "'")
_YES = r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|got it|alright|all right|no problem|yes|great)"
_NAME = r"(?:description|desc|caption|paragraph|sentences|shortdesc|longdesc)s?"
_LABEL = (
    rf"(?:(?:[\w'-]{{1,40}} ){{0,5}}{_NAME}|"
    r"(?:(?:the|a|my|your|final|short|long|simple|revised) ){0,3}"
    r"(?:text|answer|output|response|version|assistant))(?: \([^()\n:]{0,40}\))?"
)
_HERE = rf"(?:here(?:'s| is| are)[^:\n]{{0,80}}\b{_NAME}\b[^:\n]{{0,80}}|here (?:you go|it is|you are))"
_EMPHASIS = r"(?:\*{1,3}|_{1,3})?"
# "Sure! Here's a short description:", "Here is one:" on its own line, "**Short description:**", "## Description".
_PREAMBLE = re.compile(
    rf"(?:#{{1,6}}\s{{1,8}})?{_EMPHASIS}\s{{0,8}}(?:"
    rf"(?:{_YES}\b[!,.\s-]{{0,8}})?(?:{_HERE}|{_LABEL}){_EMPHASIS}[ \t]{{0,8}}:|"
    rf"(?:{_YES}|here)\b[^:\n]{{0,160}}:(?={_EMPHASIS}[ \t]{{0,8}}\n)|"
    rf"(?:[\w'-]{{1,40}} ){{0,3}}(?:description|shortdesc|longdesc)(?={_EMPHASIS}[ \t]{{0,8}}\n)"
    rf")[ \t]?{_EMPHASIS}\s*",
    re.IGNORECASE,
)
_HEADING = re.compile(r"#{1,6}[ \t]{1,8}(?=[^\n]+\Z)")
_RULE = re.compile(r"\A[-*_]{3,}[ \t]*\n|\n[ \t]*[-*_]{3,}\Z")
_WORD_COUNT = re.compile(
    r"(?:\s*[*_]{0,2}[(\[][^()\[\]\n]{0,30}(?:\b\d+[ -]?words?\b|\bword(?:s| count)\s*[:=]\s*\d+)[^()\[\]\n]{0,30}"
    r"[)\]]|"
    r"\s+[*_]{0,2}(?:total )?(?:words?\s*[:=]|word count\b)\W{0,6}\d+(?: words?)?|"
    r"\n\W{0,4}(?:total\W{1,3})?\d+ words?)[.*_]{0,3}\s*\Z",
    re.IGNORECASE,
)
TAIL = 200  # characters at the end that are searched for a word count

_MARKUP = re.compile(
    r"[<>\[\]{}|\\`*_~=^]|#(?!\d)|"  # tags, special tokens, links, code, tables, emphasis
    r"\w\(|"  # code
    r"(?:^|\n)[ \t]*(?:[-+\u2022][ \t]|-{3}|\d{1,3}[.)][ \t])|\A\W*\d{1,3}[.)]|"  # lists and rules
    r"https?:|www\.\w|\w-?\.(?:com|org|net|io)\b|"
    r"\(\s*(?:about |~)?\d+\s*(?:words?|sentences?)\b|\bword count\b|\bwords?\s*[:=]\s*\d|[-:]\s*\d+\s*words?\W*\Z|"
    rf"\A\W*(?:{_YES})\b\s*[!,.:]|\A\W*(?:sure|certainly|of course)\b|"
    r"\A\W*here(?:'s| is| are| you go)\b[^.!?]{0,120}:|\A\W*here you go\b|"
    r"\b(?:description|desc|captions?)\b|\b(?:short|long)desc\b|"
    r"\b(?:let me know if|feel free to (?:ask|adjust|let)|would you like me to|i hope (?:this|that) (?:helps|works)\b)|"
    r"(?:^|\n)[^\S\n]*\(?(?:note|explanation|rationale|p\.s\.|assistant|user|short|long|(?:option|version) ?\w?)\s*:",
    re.IGNORECASE,
)


def without_reasoning(text: str) -> str:
    """Return a reply without the reasoning that precedes its answer.

    Reasoning is a leading `<think>...</think>` block (or `<thinking>`, `<reasoning>`, `[THINK]`, ...), everything
    before a closing tag without an opening one (many chat templates open the block), and the analysis channel of
    gpt-oss. An unclosed block is kept, since the beginning of the answer is unknown.
    """
    if len(text) > MAX_CHARACTERS:
        return text
    if _FINAL_CHANNEL in text:
        return text.rpartition(_FINAL_CHANNEL)[2].strip()
    text = _without_tokens_before(text)
    if match := _BARE_CHANNELS.match(text):
        text = text[match.end() :]
    while match := _REASONING.match(text):
        text = text[match.end() :]
    while (closing := _LONE_CLOSING.search(text)) and not _ANY_OPENING.search(text, 0, closing.start()):
        text = text[closing.end() :]
    return text.strip()


def _without_tokens_before(text: str) -> str:
    match = _TOKENS_BEFORE.match(text)
    return text[match.end() :] if match else text


def unwrapped(text: str) -> str:
    """Return a text without harmless additions of chat models; line breaks are kept.

    Special tokens at either end, a code fence, emphasis or quotation marks around the whole text, a heading, a preamble
    ("Sure! Here's a short description:") and a word count at the end are removed if they are unambiguous. `has_markup`
    detects the others.
    """
    if len(text) > MAX_CHARACTERS:
        return text
    for _ in range(12):  # additions can be nested
        before = text
        text = _remove_one_addition(text.strip())
        if text == before:
            break
    return text


def _remove_one_addition(text: str) -> str:
    text = _RULE.sub("", _without_tokens_before(text))
    if match := _TOKENS_AFTER.search(text, max(0, len(text) - TAIL)):
        text = text[: match.start()]
    first, _, rest = text.partition("\n")
    inner = rest.removesuffix("```")
    if _FENCE.fullmatch(first) and inner != rest and "```" not in inner:
        return inner.strip()
    if match := _ELEMENT.fullmatch(text):
        return match[2].strip()
    if (match := _PREAMBLE.match(text)) and text[match.end() :].strip():
        label, rest = match[0], text[match.end() :].strip()
        mark = next((mark for mark in _AROUND[:6] if label.count(mark) % 2 and rest.endswith(mark)), "")
        return rest.removesuffix(mark).strip()  # emphasis around label and text together
    if match := _HEADING.match(text):
        return text[match.end() :].strip()
    if match := _WORD_COUNT.search(text, max(0, len(text) - TAIL)):
        return text[: match.start()].rstrip()
    for mark in _AROUND:
        inner = text[len(mark) : -len(mark)]
        if inner.strip() and text.startswith(mark) and text.endswith(mark) and not _closes(mark, inner):
            return inner.strip()
    return text


def _closes(mark: str, inner: str) -> bool:
    """Return whether a mark also occurs inside, so that the outer two are not necessarily a pair."""
    if mark == "'":  # not an apostrophe
        return re.search(r"(?<!\w)'|'(?!\w)", inner) is not None
    return mark[0] in inner


def has_markup(text: str) -> bool:
    """Return whether a text contains tags, special tokens, Markdown, lists, URLs, code or remarks on the description.

    Args:
        text: result of `unwrapped`, with line breaks.
    """
    return _MARKUP.search(text, 0, MAX_CHARACTERS) is not None

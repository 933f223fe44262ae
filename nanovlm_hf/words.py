"""Words of English text: splitting, base forms and stop words."""

from __future__ import annotations

import functools
import re
from pathlib import Path

# Words that are too common to distinguish one text from another.
STOP_WORDS = frozenset(Path(__file__).with_name("stop_words.txt").read_text(encoding="utf-8").split())
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+")


def words(text: str) -> list[str]:
    """Return the words of a text, unchanged; "doesn't" and "t-shirt" are one word each."""
    return _WORD.findall(text)


@functools.lru_cache(maxsize=65_536)
def base_forms(word: str) -> frozenset[str]:
    """Return the base forms of a word as any part of speech in lower case; the word itself if it has none."""
    from lemminflect import getAllLemmas

    word = word.lower().removesuffix("'s")
    return frozenset(form.lower() for forms in getAllLemmas(word).values() for form in forms) or frozenset([word])

"""Pages that evaluation and training write: self-contained Jinja templates."""

from __future__ import annotations

import html
import re
from typing import Any

from ...errors import scrub

MAX_CHARACTERS = 100_000  # of a value
# Characters that are Markdown anywhere in a line; a bracket only where it makes a link, `_` only at the edge of a word.
_MARKDOWN = re.compile(
    r"[\\`*~$]|(?<![^\W_])_|_(?![^\W_])|(?<=\])[(\[:]|(?<=!)\[|(?<=[a-z]):(?=//)|(?<=www)\.", re.IGNORECASE
)


def markdown(value: Any) -> str:
    """Return a value as one line of Markdown that is plain text: no HTML, links, emphasis or table cells."""
    text = html.escape(scrub(str(value), max_length=MAX_CHARACTERS), quote=False)
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", text).replace("|", "&#124;")


def render(name: str, **fields: Any) -> str:
    """Return a rendered template of this folder; all fields are escaped, in HTML as in Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nanovlm_hf.evaluation", "templates"),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=markdown if name.endswith(".md") else None,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(**fields)

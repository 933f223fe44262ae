"""The pages that evaluation writes: Jinja templates that need nothing beside them."""

from __future__ import annotations

from typing import Any


def render(name: str, **fields: Any) -> str:
    """Fills a template of this folder; what is no template's own is escaped in pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nanovlm_hf.evaluation", "templates"),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(**fields)

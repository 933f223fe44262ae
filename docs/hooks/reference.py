"""Fill the reference pages from the code: commands and options, training fields, packaged configurations."""

from __future__ import annotations

import html
import typing
from dataclasses import MISSING, fields

CLI, TRAINING = "<!-- command line -->", "<!-- training fields -->"
CONFIGS = "<!-- packaged configurations -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the placeholders of the generated pages; MkDocs calls this for every page."""
    if CLI in markdown:
        markdown = markdown.replace(CLI, command_line())
    if TRAINING in markdown:
        markdown = markdown.replace(TRAINING, training_fields()).replace(CONFIGS, packaged_configurations())
    return markdown


def command_line() -> str:
    """Return the help of every sub-command as Markdown, as `typer ... utils docs` writes it."""
    import typer
    from typer.cli import get_docs_for_click

    from nanovlm_hf.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="nanovlm"), name="nanovlm")
    return html.unescape(text).replace("# `nanovlm`\n", "", 1).replace("<", "&lt;")


def training_fields() -> str:
    """Return a table of `RunArguments`: name, type, default and meaning."""
    from nanovlm_hf.training.arguments import RunArguments

    kinds = typing.get_type_hints(RunArguments)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields(RunArguments):
        default = field.default if field.default is not MISSING else None
        if field.default_factory is not MISSING:
            default = field.default_factory()
        shown = "*required*" if default is None and field.default_factory is MISSING and _required(field) else default
        kind = str(kinds[field.name]).replace("typing.", "").replace("<class '", "").replace("'>", "")
        kind = kind.replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{kind}` | {shown} | {field.metadata.get('help', '')} |")
    return "\n".join(rows)


def packaged_configurations() -> str:
    """Return a list of the YAML files that `--config` finds by name."""
    from nanovlm_hf.training.arguments import CONFIGS as FOLDER

    return ", ".join(f"`{path.stem}`" for path in sorted(FOLDER.glob("*.yaml")))


def _required(field: typing.Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING

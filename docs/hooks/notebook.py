"""Show the notebook as a page of the documentation, without the dependencies of a notebook renderer."""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOK, PAGE = "train_your_own.ipynb", "tutorials/notebook.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page; MkDocs calls this once."""
    cells = json.loads((Path(config.docs_dir) / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    parts = ["".join(cell["source"]) for cell in cells]
    parts = [
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, parts, strict=True)
    ]
    download = f"[Download the notebook](../{NOTEBOOK}) to run it in Jupyter."
    parts.insert(1, download)
    files.append(File.generated(config, PAGE, content="\n\n".join(parts)))
    return files

"""The notebook of the documentation, executed from its first cell to its last."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "train_your_own.ipynb"


@pytest.mark.slow
def test_the_notebook_trains_a_model_that_describes_unseen_images(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[-2].outputs)
    images, colours, shapes = map(
        int, re.search(r"(\d+) validation images: right colour (\d+), right shape (\d+)", printed).groups()
    )
    assert images > 40
    assert colours > 0.9 * images
    assert shapes > 0.9 * images


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)

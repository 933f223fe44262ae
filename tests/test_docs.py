"""The README and the documentation: Python blocks run, links resolve, commands and options exist."""

import re
import shutil
from pathlib import Path

import pytest
from matplotlib import get_data_path

from nanovlm_hf.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


SLOW = ("export", "transformers")  # pages whose Python blocks take longer than two seconds


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.stem in SLOW else (), id=page.stem)
        for page in PAGES
        if blocks(page, "python")
    ],
)
def test_python_blocks_run(page, toy, tmp_path, monkeypatch):
    shutil.copyfile(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg", tmp_path / "photo.jpg")
    (tmp_path / "data").symlink_to(toy / "data")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{target} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_options_exist(page):
    from typer.main import get_command

    command = get_command(app)
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if not words or not words[0].endswith("nanovlm"):
            continue
        found, words = command, words[1:]
        while words and words[0] in getattr(found, "commands", {}):
            found, words = found.commands[words[0]], words[1:]
        known = {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
        unknown = {word for word in words if word.startswith("--")} - known
        assert not unknown, f"{line}: no such option"


def test_readme_length():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150

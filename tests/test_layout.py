"""The package's modules: no import cycle between them, and a clear message where an optional package is missing."""

import ast
import configparser
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nanovlm_hf
from nanovlm_hf.extras import EXTRAS

PACKAGE = Path(nanovlm_hf.__file__).parent


def module_files() -> dict[str, Path]:
    """Return the file of every module of the package by its dotted name."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["nanovlm_hf", *path.relative_to(PACKAGE).with_suffix("").parts]
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_at_load(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Return the imports that run when a module is loaded: not those in functions or under `TYPE_CHECKING`."""
    found, pending = [], list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return found


def imported_modules(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Return the package's modules that a module imports when it is loaded."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    imported = set()
    for node in imports_at_load(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            member = f"{source}.{alias.name}"
            imported.add(member if member in modules else source)
    return (imported & modules.keys()) - {name}


def test_no_import_cycle():
    modules = module_files()
    assert {"nanovlm_hf", "nanovlm_hf.cli.command", "nanovlm_hf.modeling_nanovlm"} <= modules.keys()
    graph = {name: imported_modules(name, path, modules) for name, path in modules.items()}
    assert "nanovlm_hf.cli.options" in graph["nanovlm_hf.cli.evaluate_judge"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(reversed(error.args[1]))}")


COMMANDS = {
    "data": [
        "data ingest --out x --captions x",
        "data describe --out x --captions x",
        "data build --captions x --descriptions x --out x --text-only",
        "data card --dataset x",
        "data join --dataset x --images x --out x",
        "data push --dataset x --namespace x",
    ],
    "eval": [
        "evaluate --model mini-short --dataset x --out x",
        "evaluate judge --completions paper --out x",
        "evaluate human-sheet --completions x --out x.html",
        "evaluate human-score --key x --ratings x",
    ],
    "demo": ["demo"],
    "onnx": ["export --out x mini-short"],
    "serve": ["serve"],
}


def test_extras_are_those_of_setup_cfg():
    options = configparser.ConfigParser()
    options.read(PACKAGE.parent / "setup.cfg")
    declared = options["options.extras_require"]
    for extra, modules in EXTRAS.items():  # each of these packages has the name of its module
        packages = {re.split("[<>=]", line)[0] for line in declared[extra].split()}
        assert packages == set(modules), extra
    assert declared["all"].split() == [f"nanovlm-hf[{','.join(sorted(EXTRAS))}]"]


@pytest.mark.parametrize("extra", EXTRAS)
def test_commands_name_the_missing_extra(extra, tmp_path):
    """In an interpreter in which none of the extra's packages can be imported."""
    blocked = list(EXTRAS[extra])
    script = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None
from nanovlm_command import main

def run(*arguments):
    sys.argv = ["nanovlm", *arguments]
    try:
        main()
    except SystemExit as stop:
        return stop.code

for command in {COMMANDS[extra]}:
    assert run(*command.split()) == 2, command
    assert run(*command.partition(" --")[0].split(), "--help") == 0, command
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(COMMANDS[extra])
    for line, command in zip(lines, COMMANDS[extra], strict=True):
        words = command.partition(" --")[0]
        assert line == f"nanovlm: `nanovlm {words}` needs {', '.join(blocked)}: pip install 'nanovlm-hf[{extra}]'"


def test_lazily_imported_package_is_named_too(run, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'matplotlib.figure'", name="matplotlib.figure")

    monkeypatch.setattr("nanovlm_hf.loading.load_config", fail)
    code, lines, errors = run("info", "mini-short")
    assert (code, lines) == (2, [])
    assert errors == ["nanovlm: matplotlib is not installed: pip install 'nanovlm-hf[data]'"]


@pytest.mark.slow
def test_complete_has_a_sample_image_without_matplotlib(tmp_path):
    script = """
import sys
sys.modules["matplotlib"] = None
from nanovlm_hf.cli import main
sys.argv = ["nanovlm", "complete", "--max-new-tokens", "2"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        0,
        "nanovlm: no image given; using astronaut.jpg, an example image of the demo\n",
    )
    assert done.stdout

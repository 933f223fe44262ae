"""The fields of a run: every value is checked, whatever its source, and an error names file and field."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest

from nanovlm_hf import InputError
from nanovlm_hf.configuration_nanovlm import PRESETS, VISION_FEATURE_SELECT_STRATEGIES
from nanovlm_hf.training.arguments import BOUNDS, NAMES, OPTIMIZERS, SOURCES, RunArguments, arguments_of, read_arguments
from nanovlm_hf.variants import VARIANTS

from helpers.runs import CONFIG, ROOT

REQUIRED = ("--dataset", "data", "--output_dir", "run")
FLOATS = [one.name for one in fields(RunArguments) if "float" in str(one.type)]


def problem_of(*argv):
    with pytest.raises(InputError) as caught:
        read_arguments(list(map(str, argv)))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def config(tmp_path, content, mode="w"):
    path = tmp_path / "config.yaml"
    with path.open(mode) as file:
        file.write(content)
    return path


def test_every_number_has_bounds():
    numbers = {one.name for one in fields(RunArguments) if "int" in str(one.type) or "float" in str(one.type)}
    assert numbers - set(BOUNDS) == {"text_weights"}


@pytest.mark.parametrize("name", list(BOUNDS))
@pytest.mark.parametrize("value", ["-1", "1e99", "9" * 400, "-1e-9"])
def test_a_number_out_of_bounds_is_refused(name, value):
    assert problem_of(*REQUIRED, f"--{name}={value}").startswith(f"{name}: ")


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf", "'-inf'", "Infinity"])
def test_nan_and_infinity_are_refused_in_a_file_too(tmp_path, name, value):
    path = config(tmp_path, f"{name}: [{value}]\n" if name == "text_weights" else f"{name}: {value}\n")
    assert problem_of("--config", path, *REQUIRED).startswith(f"{path}: {name}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup_steps", -5),
        ("weight_decay", -1),
        ("early_stopping_patience", -1),
        ("visual_words_weight", -3),
        ("n_layer", 0),
        ("n_blks", 0),
        ("vision_initializer_range", -0.1),
        ("vision_initializer_range", 0),
        ("eval_samples", 1),
        ("seed", -1),
        ("seed", 2**32),
        ("max_steps", 2**31),
        ("learning_rate", 0),
        ("dropout", 1),
        ("ema_decay", 1.5),
    ],
)
def test_values_out_of_range_name_the_field_and_the_file(tmp_path, name, value):
    path = config(tmp_path, f"{name}: {value}\n")
    assert problem_of("--config", path, *REQUIRED).startswith(f"{path}: {name}: ")
    assert problem_of(*REQUIRED, f"--{name}", value).startswith(f"{name}: ")
    # If the command line overrides the file, its value is the wrong one.
    path = config(tmp_path, f"{name}: 1\n")
    assert problem_of("--config", path, *REQUIRED, f"--{name}", value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["dataset", "output_dir", "tokenizer", "init_from", "grow_from", "resume"])
@pytest.mark.parametrize("value", ["''", "'  '", r'"a\0b"', r'"\ud800"'])
def test_an_invalid_name_is_refused(tmp_path, name, value):
    path = config(tmp_path, f"dataset: d\noutput_dir: o\n{name}: {value}\n".replace(f"{name}: {name[0]}\n", "", 1))
    assert problem_of("--config", path).startswith(f"{path}: {name}: ")


def test_the_common_forms_of_yaml_are_read(tmp_path):
    lines = "\ufeff---\ndataset: data  # ours\noutput_dir: 2024-01-02\nlearning_rate: 1e-3\nweight_decay: 5.0e-1\n"
    lines += "augment: yes\ntexts: [short, captions]\ntext_weights: [1, .5]\nmax_steps: ~\ntrackers: []\nn_blks: &n 2\n"
    lines += "n_layer: *n\r\n"
    arguments = read_arguments(["--config", str(config(tmp_path, lines))])
    assert (arguments.output_dir, arguments.learning_rate, arguments.weight_decay) == ("2024-01-02", 1e-3, 0.5)
    assert (arguments.augment, arguments.texts, arguments.text_weights) == (True, ["short", "captions"], [1.0, 0.5])
    assert (arguments.max_steps, arguments.trackers, arguments.n_blks, arguments.n_layer) == (None, [], 2, 2)
    assert read_arguments([f"--config={CONFIG}", "--seed=3"]).seed == 3
    assert read_arguments(["--config", str(config(tmp_path, "texts: short\n")), *REQUIRED]).texts == ["short"]


@pytest.mark.parametrize("value", ["no", "off", "1.10", "12_34", "1:30", "007", "0x10", "2024-13-45", "1e3", "true"])
@pytest.mark.parametrize("name", ["output_dir", "tokenizer", "init_from", "resume"])
def test_a_name_is_read_as_it_is_written(tmp_path, name, value):
    lines = {"dataset": "data", "output_dir": "run", name: value}
    path = config(tmp_path, "".join(f"{one}: {text}\n" for one, text in lines.items()))
    assert getattr(read_arguments(["--config", str(path)]), name) == value
    path = config(tmp_path, f"texts: [short, {value}.txt]\nteacher: [{value}]\n")
    arguments = read_arguments(["--config", str(path), *REQUIRED])
    assert (arguments.texts[1], arguments.teacher) == (f"{value}.txt", [value])


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("mixed_precision: no", "no"),
        ("seed: 010", 10),
        ("seed: !!int 8", 8),
        ("max_steps: 1_000", 1000),
        ("weight_decay: 010.50", 10.5),
        *((f"augment: {text}", True) for text in ("yes", "on", "On", "true", "TRUE", "'true'")),
        *((f"augment: {text}", False) for text in ("no", "off", "OFF", "false", "'no'")),
    ],
)
def test_a_value_is_parsed_by_the_type_of_its_field(tmp_path, line, value):
    path = config(tmp_path, f"{line}\n")
    assert getattr(read_arguments(["--config", str(path), *REQUIRED]), line.split(":")[0]) == value


@pytest.mark.parametrize("line", ["eval_steps: 1:30", "seed: no", "learning_rate: 1:30", "mixed_precision: off"])
def test_a_value_of_another_type_is_refused(tmp_path, line):
    path = config(tmp_path, f"{line}\n")
    assert problem_of("--config", path, *REQUIRED).startswith(f"{path}: {line.split(':')[0]}: ")


ALIASES = "seed: 1\na0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "expected a mapping of field names to values"),
        ("just words", "expected a mapping of field names to values"),
        ("seed: 1\nseed: 2\n", "duplicate key 'seed', line 2"),
        ("seed: 1\n<<: {seed: 2}\n", "merge keys are not supported"),
        ("seed: {a: 1}\n", "seed: expected a number or a text"),
        ("seed: [1, 2]\n", "seed: takes one value, not a list"),
        ("texts: [[short]]\n", "texts: expected a number or a text"),
        ("texts: {short: 1}\n", "texts: expected a number or a text"),
        ("texts: [short, --overwrite, 'true']\n", "texts: "),
        ("dataset: !!binary aGVsbG8=\n", "dataset: expected a number or a text"),
        ("1: 2\n", "there is no field '1'"),
        ("[a]: 2\n", "cannot be read as YAML"),
        ("? {a: b}\n: 2\n", "cannot be read as YAML"),
        ("true: 2\n", "there is no field 'true'"),
        ("seed:\t1\n\tpreset: mini\n", "cannot be read as YAML"),
        ("seed: 1\n---\nseed: 2\n", "cannot be read as YAML"),
        ("seed: !!python/object/apply:os.system ['touch owned']\n", "cannot be read as YAML"),
        ("!!python/object/new:os.system [touch owned]\n", "cannot be read as YAML"),
        ("seed: 2020-13-45\n", "config.yaml: seed: "),
        ("seed: !!timestamp nonsense\n", "cannot be read as YAML"),
        ("seed: !!bool perhaps\n", "cannot be read as YAML"),
        ("seed: !!int ''\n", "cannot be read as YAML"),
        ("seed: " + "9" * 5000, "config.yaml: "),
        ("seed: 0x" + "f" * 5000, "config.yaml: seed: "),
        ("seed: " + "[" * 3000, "cannot be read as YAML"),
        ("seed: *nowhere\n", "cannot be read as YAML"),
        ("seed: &a [*a]\n", "aliases expand to more"),
        ("preset: huge\n", "preset: invalid choice: 'huge'"),
        ("augment: perhaps\n", "augment: "),
        ("seed: " + "x" * 50_000, "config.yaml: seed: "),
        (ALIASES, "aliases expand to more than"),
        (MERGES, "merge keys are not supported"),
    ],
)
def test_yaml_that_is_not_a_config_is_refused(tmp_path, monkeypatch, content, problem):
    monkeypatch.chdir(tmp_path)
    path = config(tmp_path, content)
    message = problem_of("--config", path, *REQUIRED)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"\xff\xfes\0e\0e\0d\0", b"seed: 1\0", b"\x80\x81", os.urandom(2000)])
def test_bytes_that_are_not_text_are_refused(tmp_path, content):
    path = config(tmp_path, content, "wb")
    assert problem_of("--config", path, *REQUIRED).startswith(f"{path}: ")


def test_a_config_that_is_not_a_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(100 * 2**20)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, problem in {
        "fifo": "not a regular file",
        ".": "this is a folder",
        "none": "no such file",
        "large": "exceed the limit",
        "loop": "cannot be read",
        "\0": "cannot be read",
    }.items():
        assert problem in problem_of("--config", tmp_path / name, *REQUIRED)
    assert "one argument" in problem_of("--config")
    assert "given twice" in problem_of("--config", CONFIG, "--config", CONFIG)


def test_the_script_ends_with_one_line_and_code_2(train, tmp_path):
    path = config(tmp_path, "learning_rate: .nan\n")
    assert train("--config", path, *REQUIRED) == (
        2,
        f"nanovlm_hf.training: {path}: learning_rate: nan is not a number\n",
    )


def test_help_names_every_field(train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--help"])
        with pytest.raises(SystemExit) as stop:
            read_arguments(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in NAMES)


@pytest.mark.slow
def test_the_module_can_be_launched_as_the_script_is(tmp_path):
    """From any folder; test_training_script.py launches the script of the repository."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "training/accelerate/cpu.yaml",
    ]
    options = ["--config", "mini_short", "--dataset", tmp_path / "nowhere", "--output_dir", tmp_path / "run"]
    done = subprocess.run(
        list(map(str, [*launcher, "-m", "nanovlm_hf.training", *options])),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert f"nanovlm_hf.training: dataset: {tmp_path / 'nowhere'} (short): cannot be loaded" in done.stderr


def test_a_packaged_config_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_arguments(["--config", "base_long"]) == read_arguments(
        ["--config", str(CONFIG.parent / "base_long.yaml")]
    )
    problem = problem_of("--config", "mini_shrot")
    assert problem == "--config: mini_shrot is neither a file nor a packaged configuration: did you mean 'mini_short'?"
    assert "no such file" in problem_of("--config", "mini_short.yml"), "a name with a suffix is a file"


def test_a_file_takes_precedence_over_the_packaged_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini_short").write_text("dataset: mine\noutput_dir: run\nseed: 7\n")
    assert (read_arguments(["--config", "mini_short"]).dataset, read_arguments(["--config", "mini_short"]).seed) == (
        "mine",
        7,
    )


def test_choices_are_those_of_presets_and_variants():
    choices = {one.name: one.metadata["choices"] for one in fields(RunArguments) if "choices" in one.metadata}
    strategies = {"vision_feature_select_strategy": list(VISION_FEATURE_SELECT_STRATEGIES)}
    assert choices == {"variant": list(VARIANTS), "preset": list(PRESETS), "optimizer": list(OPTIMIZERS)} | strategies
    assert (*VARIANTS, "captions") == SOURCES
    for name in choices:
        assert problem_of(*REQUIRED, f"--{name}", "huge").startswith(f"{name}: invalid choice: 'huge'")
        with pytest.raises(InputError, match=f"{name}: 'huge' is not one of {choices[name][0]}"):
            RunArguments(dataset="d", output_dir="o", **{name: "huge"})


@pytest.mark.parametrize(
    ("options", "optimizer", "rate"),
    [
        ((), "adamw", 0.0),
        (("--muon_learning_rate", "0"), "adamw", 0.0),
        (("--optimizer", "muon"), "muon", 3e-3),
        (("--optimizer", "muon", "--muon_learning_rate", "0.01"), "muon", 0.01),
        (("--config", "mini_short"), "muon", 3e-3),
        (("--config", "mini_short", "--optimizer", "adamw"), "adamw", 0.0),
    ],
)
def test_the_optimizer_and_its_learning_rate(options, optimizer, rate):
    arguments = read_arguments([*REQUIRED, *options])
    assert (arguments.optimizer, arguments.muon_learning_rate) == (optimizer, rate)
    assert arguments_of(vars(arguments), "record") == arguments, "a record is read as the run that it describes"


def test_a_learning_rate_of_muon_without_muon_is_refused():
    for options in ((), ("--optimizer", "adamw")):
        problem = problem_of(*REQUIRED, *options, "--muon_learning_rate", "0.003")
        assert problem == (
            "muon_learning_rate: 0.003 has no effect with optimizer adamw: add --optimizer muon, or set it to 0"
        )


@pytest.mark.parametrize("options", [("--optimizer", "muon"), ("--config", "mini_short")])
def test_muon_without_a_learning_rate_is_refused(options):
    problem = problem_of(*REQUIRED, *options, "--muon_learning_rate", "0")
    assert problem == "muon_learning_rate: 0.0 is not above 0: raise it, or set optimizer adamw"


@pytest.mark.parametrize(
    ("recorded", "optimizer", "rate"),
    [
        ({"muon_learning_rate": 2e-3}, "muon", 2e-3),
        ({"muon_learning_rate": 0.0}, "adamw", 0.0),
        ({}, "adamw", 0.0),
        ({"optimizer": "muon"}, "muon", 3e-3),
    ],
)
def test_records_from_before_the_field_optimizer(recorded, optimizer, rate):
    arguments = arguments_of({"dataset": "data", "output_dir": "run"} | recorded, "record")
    assert (arguments.optimizer, arguments.muon_learning_rate) == (optimizer, rate)

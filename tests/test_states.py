"""The training states of a run: malicious files, damaged files, and kills between any two file operations."""

import errno
import fcntl
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from nanovlm_hf import InputError
from nanovlm_hf.files import locked
from nanovlm_hf.training.loss_plots import plot_run
from nanovlm_hf.training.record import best_metrics
from nanovlm_hf.training.run_directory import LOCK, RunDirectory
from nanovlm_hf.training.run_record import RECORD, read_record
from nanovlm_hf.training.states import EMA, PROGRESS, load_state, save_state, states_in

from helpers.models import tiny_model, tiny_processor
from helpers.runs import Payload

# All files of a state that Accelerate loads, with and without FSDP, and those of older versions.
ACCELERATE_FILES = ["model.safetensors", "pytorch_model.bin", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"]
ACCELERATE_FILES += [
    "custom_checkpoint_0.pkl",
    "sampler.bin",
    "dl_state_dict.bin",
    "scaler.pt",
    "pytorch_model_fsdp.bin",
]


def progress(step: int) -> dict:
    meter = {"loss_sum": 3.5, "distillation_sum": 0.0, "steps": 1}
    return {"step": step, "best_eval_loss": 2.5, "evaluations_without_gain": 1, "meter": meter, "positions": None}


class Training:
    """A linear layer trained through Accelerate, with EMA weights."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.folder = folder
        self.accelerator = Accelerator(cpu=True)
        layer = torch.nn.Linear(3, 2)
        self.ema = AveragedModel(layer)
        optimizer = torch.optim.AdamW(layer.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        self.layer, self.optimizer, self.schedule = self.accelerator.prepare(layer, optimizer, schedule)

    def step_and_save(self, step: int, limit: int = 9) -> None:
        self.layer(torch.ones(1, 3) * step).sum().backward()
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.layer)
        save_state(self.folder, self.accelerator, progress(step), limit, self.ema)

    def load(self, state: Path) -> dict:
        return load_state(state, self.accelerator, self.ema)

    def weights(self) -> list[float]:
        both = [*self.layer.state_dict().values(), *self.ema.state_dict().values()]
        return [number for value in both for number in value.flatten().tolist()]


@pytest.fixture
def training(tmp_path, fresh_accelerate):
    """Two saved steps."""
    one = Training(tmp_path / "states")
    one.step_and_save(1)
    one.step_and_save(2)
    return one


def test_a_state_holds_the_ema_weights_and_no_pickle_of_them(training):
    state = states_in(training.folder)[-1]
    assert set(load_file(state / EMA)) == {"n_averaged", "module.weight", "module.bias"}
    before = training.weights()
    training.step_and_save(3)
    assert training.weights() != before
    loaded = training.load(state)
    assert training.weights() == before
    assert loaded == progress(2)


def poison(path: Path, payload: Payload, how: str) -> None:
    """Write a file that runs code when it is unpickled, and remove the checksums of the state."""
    if how == "torch":
        torch.save({"state": payload, "torch_manual_seed": payload}, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    note = json.loads((path.parent / PROGRESS).read_text())
    del note["files"]  # as an attacker would, and as in states of older versions
    (path.parent / PROGRESS).write_text(json.dumps(note))


@pytest.mark.parametrize("how", ["torch", "pickle"])
@pytest.mark.parametrize("name", [*ACCELERATE_FILES, EMA, PROGRESS])
def test_no_file_of_a_state_runs_code(training, tmp_path, name, how):
    state = states_in(training.folder)[-1]
    ran = tmp_path / "ran"
    if name == "pytorch_model.bin":  # which Accelerate loads if there is no other
        (state / "model.safetensors").unlink()
    if name == PROGRESS:
        (state / name).write_bytes(pickle.dumps(Payload(ran)))
    else:
        poison(state / name, Payload(ran), how)
    ignored = name in ("sampler.bin", "dl_state_dict.bin", "scaler.pt", "pytorch_model_fsdp.bin")
    if ignored:
        assert training.load(state)["step"] == 2
    else:
        with pytest.raises(InputError, match="resume: ") as caught:
            training.load(state)
        assert "\n" not in str(caught.value)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists(), "the payload runs if it is unpickled"


def test_ema_weights_of_an_older_version_are_refused(training):
    state = states_in(training.folder)[-1]
    torch.save(training.ema.state_dict(), state / "custom_checkpoint_0.pkl")
    with pytest.raises(InputError, match=r"holds a pickle .* begin a new run, or finish this one with the version"):
        training.load(state)


FILES = ["model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", EMA, PROGRESS]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 255])
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[:middle],
                "zeros": bytes(len(content)),
                "one byte": content[:middle] + flipped + content[middle + 1 :],
            }[how]
        )


@pytest.mark.parametrize("how", ["missing", "a folder", "empty", "cut", "zeros", "one byte"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_state_are_named_with_the_remedy(training, name, how):
    first, last = states_in(training.folder)
    damage(last / name, how)
    with pytest.raises(InputError) as caught:
        training.load(last)
    message = str(caught.value)
    assert message.startswith("resume: ")
    assert str(last / name) in message
    assert message.endswith(f": resume from an earlier state with --resume {first}")
    assert "\n" not in message
    assert training.load(first)["step"] == 1
    damage(first / name, how)
    with pytest.raises(InputError, match=r"begin a new run$"):
        training.load(first)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", "many"),
        ("step", None),
        ("best_eval_loss", "low"),
        ("evaluations_without_gain", 1.5),
        ("step", 1),
        ("step", 10**9),
        ("step", 10**400),
        ("step", True),
        ("best_eval_loss", float("nan")),
        ("best_eval_loss", float("-inf")),
        ("meter", {"loss_sum": float("nan"), "steps": 1}),
        ("meter", {"loss_sum": 1.0, "steps": 10**30}),
        ("meter", []),
        ("meter", {"loss_sum": 1.0}),
        ("positions", [[0, -1]]),
        ("positions", [[0]]),
        ("positions", 7),
        ("files", ["optimizer.bin"]),
        ("files", {"../../secret": "0" * 64}),
        ("files", {"/etc/passwd": "0" * 64}),
    ],
)
def test_impossible_progress_is_refused(training, field, value):
    state = states_in(training.folder)[-1]
    note = json.loads((state / PROGRESS).read_text())
    (state / PROGRESS).write_text(json.dumps(note | {field: value}))
    with pytest.raises(InputError, match="resume: ") as caught:
        training.load(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "model.safetensors", EMA])
def test_damage_is_detected_in_states_without_checksums(training, name):
    state = states_in(training.folder)[-1]
    note = json.loads((state / PROGRESS).read_text())
    del note["files"]
    (state / PROGRESS).write_text(json.dumps(note))
    assert training.load(state)["step"] == 2
    damage(state / name, "cut")
    with pytest.raises(InputError, match="cannot be loaded"):
        training.load(state)


def test_entries_that_are_not_states_are_ignored(training):
    for name in ("step-best", "partial", "removed", "step-00000099.partial"):
        (training.folder / name).mkdir()
    (training.folder / "step-00000100").write_text("a file")
    (training.folder / "step-100000000").mkdir()
    assert [path.name for path in states_in(training.folder)] == ["step-00000001", "step-00000002", "step-100000000"]


class Killed(BaseException):
    """Simulates a kill: no error handler catches it."""


@pytest.fixture
def kill_at(monkeypatch):
    """Return a function that makes the n-th file operation, and all later ones, fail."""
    counts = {"left": -1}

    def killable(change):
        def call(*args, **kwargs):
            if counts["left"] == 0:
                raise Killed
            counts["left"] -= 1
            return change(*args, **kwargs)

        return call

    def set_moment(number):
        counts["left"] = number

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, killable(getattr(os, name)))
    return set_moment


def interrupted(kill_at, prepare, change):
    """Kill a change at each of its file operations in turn, and yield after each kill and after the whole change."""
    for number in range(200):
        prepare()
        kill_at(number)
        try:
            change()
            ended = True
        except Killed:
            ended = False
        kill_at(-1)
        yield number
        if ended:
            return
    raise AssertionError("the change does not complete")


def test_kills_between_any_two_file_operations_leave_complete_states(training, kill_at):
    """A third state replaces the oldest of two, also if the third one already exists."""
    whole = training.folder.with_name("whole")
    training.step_and_save(3)
    shutil.copytree(training.folder, whole)
    for before in ([1, 2], [1, 2, 3]):

        def prepare(before=before):
            shutil.rmtree(training.folder)
            for step in before:
                shutil.copytree(whole / f"step-{step:08d}", training.folder / f"step-{step:08d}")
            training.load(whole / "step-00000003")

        def change():
            save_state(training.folder, training.accelerator, progress(3), 2, training.ema)

        moments = 0
        for number in interrupted(kill_at, prepare, change):
            moments = number
            states = states_in(training.folder)
            assert states[-1].name in ("step-00000002", "step-00000003")
            for state in states:
                assert training.load(state)["step"] == int(state.name[-1])
            change()
            assert [state.name[-1] for state in states_in(training.folder)] == ["2", "3"]
            assert not (training.folder / "removed").exists()
            assert not (training.folder / "partial").exists()
        assert moments > 8


def test_kills_between_any_two_file_operations_leave_a_complete_model(tmp_path, tokenizer, kill_at):
    processor = tiny_processor(tokenizer)
    models = [tiny_model(), tiny_model()]
    torch.nn.init.zeros_(models[1].lm_head.weight)
    path = tmp_path / "run"

    def prepare():
        shutil.rmtree(path, ignore_errors=True)
        RunDirectory(path).save_model("best", models[0], processor)

    moments, seen = 0, set()
    for number in interrupted(kill_at, prepare, lambda: RunDirectory(path).save_model("best", models[1], processor)):
        moments = number
        folder = RunDirectory(path, exist_ok=True)
        weights = load_file(path / "best" / "model.safetensors")
        seen.add(bool(weights["model.language_model.embed_tokens.weight"].any()))
        assert {"config.json", "tokenizer.json", "preprocessor_config.json"} <= set(os.listdir(path / "best"))
        folder.save_model("best", models[1], processor)
        assert set(os.listdir(path)) <= {"best", LOCK}
    assert moments > 4
    assert seen == {True, False}


def test_a_state_is_flushed_to_the_disk_before_it_is_renamed(training, monkeypatch, tmp_path):
    """A power cut may lose what was not flushed: the files of the state, the metrics, and then its name."""
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(os, "rename", lambda old, new, **k: events.append(f"-> {new}") or rename(old, new, **k))
    folder = RunDirectory(tmp_path)
    folder.log({"step": 3})
    folder.add_samples([{"step": 3, "image_id": 1, "prefix": "a", "text": "a b", "reference": "a c"}])
    folder.save_state(training.accelerator, progress(3), 9, training.ema)
    named = events.index(f"-> {training.folder / 'step-00000003'}")
    synced = {str(Path(one).relative_to(tmp_path)) for one in events[:named] if not one.startswith("->")}
    assert synced >= {f"states/partial/{name}" for name in FILES} | {"states/partial", "metrics.jsonl", "samples.jsonl"}
    assert str(training.folder) in events[named:]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\0" * 40,
        "- a\n- b\n",
        "text",
        "7",
        "arguments: []\n",
        "arguments:\n",
        "data: {}\n",
        "arguments: {a: 1}\ndata: 7\n",
        "arguments: {a: 1}\nprocesses: many\n",
        "a: [",
        "[" * 5000,
        "!!python/object/apply:os.system ['touch ran']\n",
    ],
)
def test_damaged_records_are_named(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / RECORD
    path.write_text(content)
    for read in (lambda: read_record(path), RunDirectory(tmp_path, exist_ok=True).description):
        with pytest.raises(InputError, match="damaged") as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not Path("ran").exists()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_record(path)


@pytest.mark.parametrize(
    "line",
    [
        "\0\0\0\0",
        '{"step": 2, "train',
        "[]",
        "7",
        '{"train_loss": 3.0}',
        '{"step": "two"}',
        '{"step": 2, "eval_loss": []}',
        '{"step": "1"}',
        '{"step": 1' + "0" * 400 + "}",
        '{"step": 1.5}',
        '{"step": true}',
        '{"step": 2, "images_per_second": null}',
        '{"step": 2, "images_per_second": "5"}',
        '{"step": 2, "images_per_second": -1}',
        '{"step": 2, "train_loss": null}',
        '{"step": 2, "train_loss": 1' + "0" * 400 + "}",
        '{"step": 2, "epoch": null}',
        '{"step": 2, "eval_loss": null}',
        '{"step": 2, "words": "5"}',
    ],
)
def test_damaged_lines_of_metrics_are_named(tmp_path, line):
    folder = RunDirectory(tmp_path)
    folder.log({"step": 1, "train_loss": 3.0, "mfu": None})
    with folder.metrics_path.open("a") as file:
        file.write(f"{line}\n")
    folder.log({"step": 3, "train_loss": float("nan")})
    for read in (folder.rows, lambda: folder.truncate_metrics(3), lambda: plot_run(folder)):
        with pytest.raises(InputError, match=r"metrics.jsonl: line 2.*damaged.*remove"):
            read()
    assert len(folder.metrics_path.read_text().splitlines()) == 3, "the file is not rewritten"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["fifo", "folder"])
def test_a_file_of_lines_that_is_not_a_regular_file_is_refused(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: not a regular file: remove it"):
        RunDirectory(tmp_path, exist_ok=True).truncate_metrics(3)


def test_metrics_without_some_values_are_plotted_and_described(tmp_path):
    folder = RunDirectory(tmp_path)
    folder.log({"step": 1, "train_loss": 3.0})
    evaluation = {"eval_loss": 2.0, "eval_loss_wrong_photo": 2.0, "grounding_gap": 0.0, "grounding_gap_stderr": 0.1}
    folder.log({"step": 1, **evaluation})
    folder.log({"step": 2, "eval_loss": 2.0})
    with pytest.raises(InputError, match=r"step 2: eval_loss_wrong_photo"):
        best_metrics(folder)
    plot_run(folder)
    folder.truncate_metrics(1)
    assert best_metrics(folder) == {"step": 1, **evaluation}


@pytest.mark.parametrize(
    "line", ['{"step": "1"}', '{"image_id": "5"}', '{"image_id": 1' + "0" * 400 + "}", '{"text": 5}']
)
def test_damaged_samples_are_named(tmp_path, line):
    folder = RunDirectory(tmp_path)
    sample = {"step": 1, "image_id": 1, "prefix": "a", "text": "b", "reference": "c"}
    folder.samples_path.write_text(json.dumps(sample | json.loads(line)) + "\n")
    with pytest.raises(InputError, match=r"samples.jsonl: line 1: .*damaged"):
        folder.samples()


def test_an_unfinished_last_line_is_dropped(tmp_path):
    folder = RunDirectory(tmp_path)
    folder.log({"step": 1, "train_loss": 3.0})
    sample = {"step": 1, "image_id": 1, "prefix": "über", "text": "über\u2028das", "reference": "\x85"}
    folder.add_samples([sample])
    for path in (folder.metrics_path, folder.samples_path):
        before = path.read_bytes()
        for rest in (bytes(100), "ü".encode()[:1], b'{"step": 2', b"\xff"):
            path.write_bytes(before + rest)
            folder.truncate_metrics(5)
            assert path.read_bytes() == before
    assert folder.samples() == [sample]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_supported(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", "busy") as held:
        assert held == (number == errno.ENOSYS), "then filelock uses a lock file of another kind"
    with locked(tmp_path / "lock", "busy"):
        pass


def test_a_reader_does_not_restore_a_model_that_is_being_replaced(tmp_path):
    (tmp_path / "best.previous").mkdir()
    with locked(tmp_path / LOCK, "busy"):
        RunDirectory(tmp_path, exist_ok=True)
        assert not (tmp_path / "best").exists()
    RunDirectory(tmp_path, exist_ok=True)
    assert (tmp_path / "best").exists()


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return the content with some bytes changed, removed, repeated or zeroed."""
    start, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 2, 8, 64))
    part = rng.choice((b"", rng.randbytes(length), bytes(length), content[start : start + length] * 2))
    return content[:start] + part + content[start + rng.choice((0, length)) :]


def error_of(read) -> str | None:
    """Return the message of the InputError that a call raises, or None."""
    try:
        read()
    except InputError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("checked", [True, False])
def test_mutated_states_are_loaded_or_refused_in_one_line(training, checked):
    state = states_in(training.folder)[-1]
    if not checked:  # as in states of older versions
        note = json.loads((state / PROGRESS).read_text())
        del note["files"]
        (state / PROGRESS).write_text(json.dumps(note))
    rng = random.Random(0)
    for name in FILES:
        content = (state / name).read_bytes()
        for _ in range(50):
            changed = mutated(content, rng)
            (state / name).write_bytes(changed)
            message = error_of(lambda: training.load(state))
            if message is None:
                assert not checked or changed == content or name == PROGRESS, "damage is detected by checksum"
            else:
                assert "\n" not in message
                assert len(message) < 1000
        (state / name).write_bytes(content)
    assert training.load(state)["step"] == 2


@pytest.mark.slow
def test_mutated_records_and_metrics_are_read_or_refused_in_one_line(tmp_path):
    folder = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        folder.log({"step": step, "train_loss": 3.0 / step, "mfu": None})
        folder.add_samples([{"step": step, "image_id": 1, "prefix": "a", "text": "a b", "reference": "\u2028"}])
    folder.describe({"arguments": {"seed": 0, "texts": ["short"]}, "data": {"train": {"photos": 3}}, "processes": 1})
    rng = random.Random(0)
    for path, read in (
        (folder.metrics_path, folder.rows),
        (folder.metrics_path, lambda: folder.truncate_metrics(2)),
        (folder.samples_path, folder.samples),
        (tmp_path / RECORD, folder.description),
    ):
        content = path.read_bytes()
        for _ in range(150):
            path.write_bytes(mutated(content, rng))
            message = error_of(read)
            assert message is None or ("\n" not in message and str(path) in message)
        path.write_bytes(content)

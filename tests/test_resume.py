"""Resuming runs after kills and signals, locking, and damaged or malicious run directories."""

import json
import os
import pty
import shutil
import signal
import subprocess
import time
from pathlib import Path

import datasets
import psutil
import pytest
import torch

from nanovlm_hf import InputError
from nanovlm_hf.training import loop
from nanovlm_hf.training.arguments import read_arguments
from nanovlm_hf.training.resume import _check_same_record
from nanovlm_hf.training.run_directory import COMPLETE, LOCK, SAMPLES_PAGE, RunDirectory, locked_run_directory
from nanovlm_hf.training.run_record import RECORD
from nanovlm_hf.training.run_removal import check_removable
from nanovlm_hf.training.signals import StopSignals

from helpers.runs import (
    CONFIG,
    ROOT,
    Payload,
    alone,
    command,
    launch,
    measured,
    metrics,
    toy_options,
    wait_for,
    weights,
)

# A model of 37,000 parameters, so that a run takes seconds and a state little space.
TINY = {"n_blks": 1, "n_layer": 1, "n_head": 4, "head_size": 4, "img_embd_dim": 16, "optimizer": "adamw"}
TINY |= {"eval_samples": 4, "per_device_train_batch_size": 2, "warmup_steps": 2, "logging_steps": 1}
TINY |= {"mixed_precision": "no"}


@pytest.fixture
def tiny(train, toy):
    """Return a function that trains a tiny model in this process and returns exit code and errors."""

    def call(out, **fields):
        options = (text for name, value in (TINY | fields).items() for text in (f"--{name}", value))
        code, errors = train("--config", CONFIG, *toy_options(toy, out), *options)
        return code, "\n".join(line for line in errors.splitlines() if line.startswith("nanovlm_hf.training: "))

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy):
    """A run of three steps, each with a state, and EMA weights."""
    return train_tiny(toy, tmp_path_factory.mktemp("finished") / "run", **FINISHED)


def train_tiny(toy, out, **fields) -> Path:
    options = [f"--{name}={value}" for name, value in (TINY | fields).items()]
    return loop.train(read_arguments(["--config", str(CONFIG), *map(str, toy_options(toy, out)), *options])).path


FINISHED = {"max_steps": 3, "save_steps": 1, "save_total_limit": 9, "eval_steps": 2, "ema_decay": 0.5}


@pytest.fixture
def killed(finished, tmp_path):
    """A copy of it, as a kill after the second step would have left it."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "states" / "step-00000003")
    shutil.rmtree(folder / "last")
    RunDirectory(folder, exist_ok=True).mark_incomplete()
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(errors: str) -> str:
    assert errors.count("\n") == 0, errors
    assert "Traceback" not in errors
    assert "unexpected" not in errors
    return errors


def test_a_killed_run_is_resumed_to_the_same_end(tiny, killed, finished):
    assert tiny(killed, **FINISHED, resume="auto") == (0, "")
    assert measured(killed) == measured(finished)
    assert weights(killed) == weights(finished)


def test_a_complete_run_without_states_is_not_begun_again(tiny, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "states")
    before = content_of(run)
    before.pop(LOCK, None)
    code, errors = tiny(run, **FINISHED, resume="auto")
    assert code == 1
    assert "is complete, but its folder states/ is gone" in one_line(errors)
    assert {name: content for name, content in content_of(run).items() if name != LOCK} == before
    for resume in ("auto", run / "states" / "step-00000001"):
        code, errors = tiny(run, **FINISHED, resume=resume, overwrite="true")
        assert "overwrite: true removes the run of output_dir, so it cannot be used with resume" in one_line(errors)
    assert (run / "best").exists()


def test_an_earlier_state_replaces_the_later_ones(tiny, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "last")
    RunDirectory(run, exist_ok=True).mark_incomplete()
    damaged = run / "states" / "step-00000003" / "optimizer.bin"
    damaged.write_bytes(b"")
    fields = FINISHED | {"save_total_limit": 1}
    assert tiny(run, **fields, resume=run / "states" / "step-00000001") == (0, "")
    assert [path.name for path in (run / "states").iterdir()] == ["step-00000003"]
    assert damaged.stat().st_size > 0
    assert weights(run) == weights(finished)


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_no_code_of_a_run_directory_is_run(tiny, killed, tmp_path, name, auto):
    state = killed / "states" / "step-00000002"
    progress = json.loads((state / "progress.json").read_text())
    del progress["files"]
    (state / "progress.json").write_text(json.dumps(progress))
    torch.save({"state": Payload(tmp_path / "ran"), "torch_manual_seed": Payload(tmp_path / "ran")}, state / name)
    code, errors = tiny(killed, **FINISHED, resume="auto" if auto else state)
    assert code == 1
    assert one_line(errors).startswith(f"nanovlm_hf.training: resume: {state}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("path", "content", "problem"),
    [
        (
            "states/step-00000002/optimizer.bin",
            b"",
            "optimizer.bin is damaged: resume from an earlier state",
        ),
        ("states/step-00000002/progress.json", bytes(99), "progress.json: not JSON"),
        ("metrics.jsonl", b'{"step": 1}\n\0\0\0\n{"step": 2}\n', "metrics.jsonl: line 2: not JSON"),
        ("samples.jsonl", b"[]\n", "samples.jsonl: line 1: "),
        (RECORD, b"", f"{RECORD}: "),
        (RECORD, b"arguments: 7", f"{RECORD}: arguments: "),
        (RECORD, b"arguments: {}\n", "resume: the dataset is not the one"),
        (RECORD, None, f"{RECORD} is missing"),
    ],
)
def test_damaged_files_give_one_line(tiny, killed, path, content, problem):
    if content is None:
        (killed / path).unlink()
    else:
        (killed / path).write_bytes(content)
    before = content_of(killed)
    code, errors = tiny(killed, **FINISHED, resume="auto")
    assert code == 1
    assert problem in one_line(errors)
    assert content_of(killed) == before, "no file is changed"
    if "states" in path:
        assert tiny(killed, **FINISHED, resume=killed / "states" / "step-00000001")[0] == 0


@pytest.mark.slow
def test_a_state_of_another_directory_is_resumed_only_with_its_own_arguments(tiny, finished, tmp_path):
    """They are those of the run of the state, since the new directory has no record yet."""
    state = finished / "states" / "step-00000002"
    code, errors = tiny(tmp_path / "other", **FINISHED | {"resume": state, "ema_decay": 0.9})
    assert code == 1
    assert "resume: ema_decay was 0.5 and is 0.9 now" in one_line(errors)
    assert tiny(tmp_path / "other", **FINISHED, resume=state) == (0, "")
    assert weights(tmp_path / "other")[0] == weights(finished)[0]
    alone = tmp_path / "alone"
    shutil.copytree(state, alone)
    assert tiny(tmp_path / "third", **FINISHED, resume=alone)[0] == 0
    assert weights(tmp_path / "third")[0] == weights(finished)[0]


def test_another_number_of_processes_is_rejected(tiny, killed):
    record = (killed / RECORD).read_text()
    (killed / RECORD).write_text(record.replace("processes: 1", "processes: 2"))
    code, errors = tiny(killed, **FINISHED, resume="auto")
    assert code == 1
    assert "resume: the number of processes was 2 and is 1 now: use the same" in one_line(errors)


def test_a_finished_run_is_not_changed(tiny, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = content_of(folder)
    for resume in ("auto", folder / "states" / "step-00000003"):
        assert tiny(folder, **FINISHED, resume=resume) == (0, "")
        assert content_of(folder) == before
    RunDirectory(folder, exist_ok=True).mark_incomplete()  # as a kill after the last state would leave it
    shutil.rmtree(folder / "last")
    assert tiny(folder, **FINISHED, resume="auto") == (0, "")
    assert weights(folder) == weights(finished)
    assert (folder / SAMPLES_PAGE).exists()
    assert (folder / COMPLETE).exists()


@pytest.mark.parametrize("name", [SAMPLES_PAGE, COMPLETE])
def test_a_complete_run_stays_complete(tiny, finished, tmp_path, name):
    """Without its page, which its user may delete, and without the mark, which runs of earlier versions lack."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / name).unlink()
    before = content_of(folder)
    assert tiny(folder, **FINISHED, resume="auto") == (0, "")
    assert content_of(folder) == before


def test_early_stopping_is_final(toy, tmp_path, capsys, fresh_accelerate):
    """At this learning rate the loss does not improve, so patience is exhausted before the last step."""
    out = tmp_path / "run"
    fields = {"eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 1e-12, "max_steps": 40, "save_steps": 7}
    train_tiny(toy, out, **fields)
    last = metrics(out)[-1]["step"]
    assert last < 40
    assert "there is nothing left to do" not in capsys.readouterr().out
    before = content_of(out)
    for _ in range(2):
        train_tiny(toy, out, **fields, resume="auto")
        said = capsys.readouterr().out
        assert f"{out}: this run has stopped early (step {last}): there is nothing left to do" in said
        assert content_of(out) == before


def test_a_second_process_on_a_run_is_rejected(tiny, killed):
    with locked_run_directory(killed, exist_ok=True, overwrite=False, inputs=[]):
        for fields in ({"resume": "auto"}, {"overwrite": "true"}, {}):
            code, errors = tiny(killed, **FINISHED, **fields)
            assert code == 1
            assert f"output_dir: another process is working on {killed}: wait for it" in one_line(errors)
    assert tiny(killed, **FINISHED, resume="auto")[0] == 0


@pytest.mark.slow
def test_a_run_of_two_processes_is_locked_until_it_is_killed(tmp_path, toy):
    """Both read the same stream; the state of the kill is in the second window of 16 steps.

    `datasets` sleeps for five seconds after the second pass, in step 34, so that the run cannot end before the kill.
    """
    out = tmp_path / "run"
    fields = {"max_steps": 36, "save_steps": 18, "eval_steps": 36, "resume": "auto", "eval_samples": 4}
    fields |= {"streaming": "true", "texts": "short", "per_device_train_batch_size": 4}
    first = psutil.Popen(command(toy, out, 2, **fields), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: RunDirectory(out, exist_ok=True).states(), first)
    processes = [first, *first.children(recursive=True)]
    try:
        for process in processes:
            process.suspend()
        for start in (command(toy, out, 2, **fields), alone(toy, out, **fields)):
            second = subprocess.run(start, capture_output=True, text=True, timeout=900)
            assert second.returncode == 1
            assert f"nanovlm_hf.training: output_dir: another process is working on {out}: wait for it" in second.stderr
    finally:
        for process in processes:
            process.kill()
        psutil.wait_procs(processes)
    assert not (out / "last").exists()
    launch(toy, out, 2, **fields)
    launch(toy, tmp_path / "whole", 2, **fields)
    assert measured(out) == measured(tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


ENDLESS = {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000}


@pytest.mark.slow
def test_a_terminal_that_closes_saves_before_the_run_ends(tmp_path, toy):
    """The run is the foreground job of a terminal; output after the hang-up cannot be written."""
    out = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        script = alone(toy, out, **TINY | ENDLESS)
        os.execv(script[0], script)
    deadline = time.monotonic() + 300
    os.set_blocking(terminal, False)
    while len(RunDirectory(out, exist_ok=True).rows()) < 4:
        assert time.monotonic() < deadline
        try:
            os.read(terminal, 1 << 16)
        except BlockingIOError:
            time.sleep(0.02)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    (state,) = RunDirectory(out, exist_ok=True).states()
    assert int(state.name.removeprefix("step-")) >= 4


@pytest.mark.slow
def test_a_run_under_nohup_ignores_hang_ups(tmp_path, toy):
    out = tmp_path / "run"
    script = alone(toy, out, **TINY | ENDLESS | {"max_steps": 400})
    process = subprocess.Popen(["nohup", *script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(RunDirectory(out, exist_ok=True).rows()) >= 4, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(300) == 0
    assert metrics(out)[-1]["step"] == 400


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != LOCK}


def test_overwriting_removes_a_run_and_nothing_else(tmp_path, monkeypatch):
    run = tmp_path / "run"
    RunDirectory(run).describe({"arguments": {}})
    (run / "best").mkdir()
    (run / "best" / RECORD).write_text("arguments: {}\nname: run\nphotos_seen: 3\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").write_text("years of work")
    (run / "link").symlink_to(tmp_path / "elsewhere")
    (run / "dangling").symlink_to("nowhere")
    with locked_run_directory(
        run, exist_ok=False, overwrite=True, inputs=["org/ShortDesc", str(tmp_path / "elsewhere")]
    ):
        RunDirectory(run, overwrite=True)
        assert tree(run) == set()
    assert (tmp_path / "elsewhere" / "thesis.tex").exists()
    RunDirectory(run, overwrite=True)
    RunDirectory(tmp_path / "new", overwrite=True)


def not_removable(tmp_path: Path) -> dict[str, tuple[Path, list[str], str]]:
    """Return directories that --overwrite must not remove, what the new run reads, and the expected error."""
    record = {"arguments": {}}
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / RECORD).write_text("learning_rate: 0.1\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / RECORD).write_text("")
    for run in ("runs/a", "runs/b", "parent", "parent/child", "home", "work", "work/deep", "uses"):
        RunDirectory(tmp_path / run, exist_ok=True).describe(record)
    (tmp_path / "uses" / "data").mkdir()
    checkpoint = tmp_path / "checkpoint"
    RunDirectory(checkpoint).describe(record | {"name": "mini", "photos_seen": 5})
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "runs" / "a")
    record_linked = tmp_path / "record_linked"
    record_linked.mkdir()
    (record_linked / RECORD).symlink_to(tmp_path / "runs" / "a" / RECORD)
    return {
        "not a run": (thesis, [], "does not hold a run"),
        "a file of that name": (foreign, [], "arguments: Field required"),
        "an empty record": (empty, [], "damaged"),
        "a parent of runs": (tmp_path / "runs", [], "does not hold a run"),
        "a run with a run in it": (tmp_path / "parent", [], "holds other runs too"),
        "a checkpoint": (checkpoint, [], "holds a checkpoint"),
        "a link": (linked, [], "is a link"),
        "a link as its record": (record_linked, [], "does not hold a run"),
        "the root": (Path("/"), [], "does not hold a run"),
        "home": (tmp_path / "home", [], "holds the home directory"),
        "where one is": (tmp_path / "work" / "deep", [], "holds the working directory"),
        "the dataset": (tmp_path / "uses", [str(tmp_path / "uses" / "data")], "uses/data, which this run reads"),
        "itself as the checkpoint": (tmp_path / "uses", [str(tmp_path / "uses")], "uses, which this run reads"),
    }


def test_overwriting_rejects_everything_but_a_run(tmp_path, monkeypatch):
    cases = not_removable(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work" / "deep")
    before = tree(tmp_path)
    for path, inputs, problem in cases.values():
        with pytest.raises(InputError, match=problem) as caught, locked_run_directory(path, False, True, inputs):
            pass
        assert "\n" not in str(caught.value)
        assert tree(tmp_path) == before
        assert not (path / LOCK).exists()
    with pytest.raises(InputError, match="does not hold a run"):
        RunDirectory(tmp_path / "thesis", overwrite=True)
    with pytest.raises(InputError, match="holds the working directory"):
        check_removable(Path("."))


FOREIGN = ("thesis.tex", "stories.txt", "my.yaml", ".git/config", "photos/1.jpg", "best/notes.txt", "states/thesis.tex")


@pytest.mark.parametrize(
    "name", [*FOREIGN, "states/step-1/../../last/photos/1.jpg", "metrics.jsonl/1", "best.partial/a"]
)
def test_overwriting_names_what_no_run_wrote(tmp_path, name):
    run = tmp_path / "run"
    RunDirectory(run).describe({"arguments": {}})
    path = Path(os.path.normpath(run / name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("years of work")
    before = tree(run)
    with pytest.raises(InputError, match=r"holds .*, which no run wrote, so --overwrite does not remove it") as caught:
        RunDirectory(run, overwrite=True)
    assert str(run) in str(caught.value)
    assert tree(run) == before


def test_overwriting_keeps_the_texts_and_teachers_of_the_new_run(tiny, killed, finished):
    for fields in ({"texts": f"short {killed / 'samples.jsonl'}"}, {"teacher": killed / "best"}):
        before = content_of(killed)
        options = [text for name, value in fields.items() for text in (f"--{name}", *str(value).split())]
        arguments = read_arguments(["--config", str(CONFIG), "--output_dir", str(killed), "--overwrite=true", *options])
        with pytest.raises(InputError, match="which this run reads"):
            loop.train(arguments)
        assert content_of(killed) == before


def test_text_files_of_one_name_are_told_apart():
    new = {"train": {"files": [{"name": "s.txt", "sha256": "a"}, {"name": "s.txt", "sha256": "b"}]}}
    other = {"train": {"files": [{"name": "s.txt", "sha256": "c"}, {"name": "s.txt", "sha256": "b"}]}}
    arguments = {"arguments": {"mixed_precision": "no", "resume": None}, "processes": 1, "mixed_precision": "no"}
    with pytest.raises(InputError, match="the dataset is not the one"):
        _check_same_record(arguments | {"data": new}, arguments | {"data": other})
    old = {"train": {"files": {"s.txt": "a"}}}  # of an earlier version
    one = {"train": {"files": [{"name": "s.txt", "sha256": "a"}]}}
    _check_same_record(arguments | {"data": one}, arguments | {"data": old})


def test_a_dataset_may_have_moved_if_its_content_is_the_same():
    fields = {"mixed_precision": "no", "resume": None}
    record = {"processes": 1, "mixed_precision": "no", "data": {"train": {"sha256": "a"}}}
    here, there = ({"arguments": fields | {"dataset": name}} for name in ("data", "/mnt/data"))
    _check_same_record(record | there, record | here)
    with pytest.raises(InputError, match="the dataset is not the one"):
        _check_same_record(record | there | {"data": {"train": {"sha256": "b"}}}, record | here)


def test_signals_that_the_parent_ignores_do_not_stop_a_run():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            with StopSignals() as signals:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            assert signals.received == 0
            assert signal.getsignal(number) == signal.SIG_IGN
        finally:
            signal.signal(number, before)


def test_an_emptied_best_model_is_written_again(tiny, killed):
    (killed / "best" / "model.safetensors").unlink()
    (killed / "best" / "config.json").unlink()
    assert tiny(killed, **FINISHED, resume="auto") == (0, "")
    assert RunDirectory(killed, exist_ok=True).has_model("best")


def test_the_script_does_not_remove_a_directory_without_a_run(tiny, tmp_path, toy):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, errors = tiny(tmp_path, **FINISHED, overwrite="true")
    assert code == 1
    assert f"output_dir: {tmp_path} does not hold a run (there is no {RECORD}), so --overwrite does" in one_line(errors)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["best", "samples.html", "states", "complete"])
def test_a_directory_of_something_else_is_not_trained_in(tiny, tmp_path, name):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    (out / name / "step-3").mkdir()
    for fields in ({}, {"resume": "auto"}):
        code, errors = tiny(out, **FINISHED, **fields)
        assert code == 1
        told = f"output_dir: {out} holds {name}, but not the record of a run" in one_line(errors)
        assert told or fields, "`auto` may find other problems first"
        assert (out / name / "step-3").exists()


def test_a_published_record_is_not_trained_over(tiny, tmp_path):
    out = tmp_path / "kept"
    shutil.copytree(ROOT / "training" / "experiments" / "base_texts", out)
    before = content_of(out)
    code, errors = tiny(out, **FINISHED, resume="auto")
    assert code == 1
    assert "holds a checkpoint or the record of a run, not a run" in one_line(errors)
    assert {name: text for name, text in content_of(out).items() if name != LOCK} == before


def test_a_run_that_cannot_begin_does_not_remove_another(tiny, killed):
    before = content_of(killed)
    for fields in ({"per_device_train_batch_size": 5000}, {"dataset": "nowhere"}, {"init_from": "nowhere"}):
        code, errors = tiny(killed, **FINISHED | fields, overwrite="true")
        assert code == 1
        assert next(iter(fields)) in one_line(errors)
        assert content_of(killed) == before
    assert tiny(killed, **FINISHED | {"max_steps": 1}, overwrite="true")[0] == 0
    assert [state.name for state in RunDirectory(killed, exist_ok=True).states()] == ["step-00000001"]


def test_the_run_that_is_resumed_is_not_overwritten(tiny, killed):
    state = killed / "states" / "step-00000001"
    code, errors = tiny(killed, **FINISHED, overwrite="true", resume=state)
    assert code == 2
    assert "cannot be used with resume" in one_line(errors)
    assert state.exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file", "File exists"),
        ("file/run", "Not a directory"),
        ("a" * 300, "File name too long"),
        ("dangling", "File exists"),
        ("read-only/run", "Read-only file system"),
        ("read-only", "Read-only file system"),
    ],
)
def test_a_directory_that_cannot_be_written_gives_one_line(tiny, tmp_path, small_disk, name, problem):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    if "read-only" in name:
        disk = small_disk("1m")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        (tmp_path / "read-only").symlink_to(disk)
    code, errors = tiny(tmp_path / name, **FINISHED)
    assert code == 1
    assert f"cannot be written ({problem}): name another folder" in one_line(errors)


def test_a_null_byte_in_the_name_of_the_directory_gives_one_line(train, toy, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f'output_dir: "a\\0b"\ndataset: {toy / "data"}\n')
    code, errors = train("--config", path)
    assert code == 2
    assert "output_dir" in one_line(errors.strip())


def test_an_unexpected_error_gives_one_line_that_mentions_nanovlm_debug(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "load_splits", lambda *_: 1 // 0)
    code, errors = tiny(tmp_path / "run")
    assert code == 1
    assert errors.startswith("nanovlm_hf.training: unexpected ZeroDivisionError")
    assert errors.endswith("run with NANOVLM_DEBUG=1 for the traceback")
    monkeypatch.setattr(loop, "load_splits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert tiny(tmp_path / "run") == (130, "nanovlm_hf.training: stopped")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("streaming", "steps"),
    [
        (True, (1, 15, 16, 17, 32, 34, 35)),
        (False, (1, 16, 32, 34, 35)),
    ],
)
def test_a_run_resumed_at_a_window_boundary_is_the_same_run(tiny, tmp_path, monkeypatch, streaming, steps):
    """36 steps of two micro-batches of two images: windows of 16 steps, and a pass over 137 images after 34."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    fields = {"max_steps": 36, "save_steps": 1, "save_total_limit": 99, "eval_steps": 40, "augment": "true"}
    fields |= {
        "gradient_accumulation_steps": 2,
        "texts": "short",
        "ema_decay": 0.5,
        "streaming": str(streaming).lower(),
    }
    assert tiny(tmp_path / "whole", **fields)[0] == 0
    whole = {row["step"]: row for row in metrics(tmp_path / "whole") if "train_loss" in row}
    for step in steps:
        other = tmp_path / f"from-{step}"
        state = tmp_path / "whole" / "states" / f"step-{step:08d}"
        assert tiny(other, **fields, resume=state)[0] == 0
        resumed = {row["step"]: row for row in metrics(other) if "train_loss" in row}
        assert list(resumed) == list(range(step + 1, 37))
        for at, row in resumed.items():
            for name in ("train_loss", "grad_norm", "learning_rate", "epoch"):
                assert row[name] == whole[at][name], (step, at, name)
        assert weights(other)[0] == weights(tmp_path / "whole")[0]
        shutil.rmtree(other)

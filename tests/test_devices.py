"""Device, mixed precision and number of cores; imports without Linux-specific modules."""

import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from nanovlm_hf import devices

from helpers.models import tiny_model
from helpers.runs import tiny_options

CPU = torch.device("cpu")


@pytest.mark.parametrize("isa", ["AVX2", "avx512_core", "AVX512_CORE_VNNI", "SSE41"])
def test_cpu_without_bf16_uses_float32(monkeypatch, isa):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert not devices.cpu_has_bf16()
    assert devices.choose_precision("auto", CPU) == (
        "no",
        "mixed_precision: no (this CPU has no bfloat16 instructions; bf16 would be several times slower)",
    )
    asked = devices.choose_precision("bf16", CPU)
    assert asked.value == "bf16"
    assert asked.message.startswith(
        "mixed_precision: bf16 (as requested, although this CPU has no bfloat16 instructions"
    )
    assert "use auto" in asked.message


@pytest.mark.skipif(not devices.cpu_has_bf16(), reason="needs a CPU with AVX512-bf16 or AMX")
def test_cpu_with_bf16_uses_it():
    value, message = devices.choose_precision("auto", CPU)
    assert value == "bf16"
    assert message in ("mixed_precision: bf16 (AVX512-bf16)", "mixed_precision: bf16 (AMX)")
    assert devices.choose_precision("no", CPU) == ("no", "mixed_precision: no (as requested)")
    assert devices.choose_precision("bf16", CPU) == ("bf16", "mixed_precision: bf16 (as requested)")


def test_unmeasured_devices_use_float32():
    assert devices.choose_precision("auto", torch.device("mps")) == (
        "no",
        "mixed_precision: no (bf16 has not been measured on mps)",
    )


def recorded(folder):
    return yaml.safe_load((folder / "training_args.yaml").read_text())


@pytest.mark.slow
def test_run_records_precision_and_resumes_with_it(train, tmp_path, toy, monkeypatch):
    """On a CPU whose bf16 instructions are disabled in oneDNN."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    options = [*map(str, tiny_options(toy, tmp_path / "run")), "--max_steps", "2", "--save_steps", "1"]
    options = options[: options.index("--mixed_precision")] + options[options.index("--mixed_precision") + 2 :]
    options += ["--save_total_limit", "2", "--resume", "auto"]
    code, errors = train(*options)
    assert code == 0
    assert "mixed_precision: no (this CPU has no bfloat16 instructions" in errors
    record = recorded(tmp_path / "run")
    assert (record["arguments"]["mixed_precision"], record["mixed_precision"]) == ("auto", "no")
    assert "cosine schedule, float32." in (tmp_path / "run" / "best" / "README.md").read_text()

    def again(*more):
        AcceleratorState._reset_state(reset_partial_state=True)
        return train(*options, "--resume", tmp_path / "run" / "states" / "step-00000001", *more)

    assert again("--mixed_precision", "no")[0] == 0, "auto resolves to no"
    code, errors = again("--mixed_precision", "bf16")
    assert code == 1
    assert "resume: mixed_precision was no and is bf16 now: add --mixed_precision no" in errors
    # Records from before `auto` only hold the precision that was used.
    record["arguments"]["mixed_precision"] = "bf16"
    del record["mixed_precision"]
    (tmp_path / "run" / "training_args.yaml").write_text(yaml.safe_dump(record))
    assert "mixed_precision was bf16 and is no now" in again()[1]
    assert again("--mixed_precision", "bf16")[0] == 0


@pytest.mark.slow
def test_imports_without_linux_specific_modules():
    """As on Windows, which has neither /proc, getrusage nor CPU affinity."""
    script = """
import os, pathlib, sys
from transformers import AutoImageProcessor, Trainer  # may need them on Linux
sys.modules["resource"] = None
del os.sched_getaffinity
from nanovlm_hf.data import image_store
from nanovlm_hf.training import loop, metrics, provenance, streaming, with_trainer
import nanovlm_hf.data.build, nanovlm_hf.evaluation.completions
from nanovlm_hf import devices
import torch
devices._STATUS = pathlib.Path("nowhere")
assert devices.cpu_count() == os.cpu_count()
assert devices.peak_memory_mib() is None
meter = metrics.Meter(torch.device("cpu"))
meter.add(metrics.StepResult(torch.zeros(()), torch.zeros(()), tokens=1, stop=0), images=1)
meter.first_bad()
assert meter.read(None)["memory_mib"] is None
print(provenance.device_name(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert " of " in done.stdout


def test_peak_memory_is_in_mib():
    model = tiny_model()
    assert sum(weight.numel() for weight in model.parameters()) > 0
    assert 50 < devices.peak_memory_mib() < 100_000
    assert 50 < devices.peak_memory_mib(torch.device("cpu")) < 100_000


def test_peak_memory_of_a_gpu_is_what_pytorch_allocated(monkeypatch):
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda of: {device: 3 * 2**20 + 7}[of])
    assert devices.peak_memory_mib(device) == 3


@pytest.mark.slow
def test_peak_memory_of_a_launcher_does_not_count():
    """As the `ru_maxrss` of a process does, which starts with that of the one that forked it."""
    launcher = b"\1" * (1 << 30)
    script = "from nanovlm_hf.devices import peak_memory_mib; print(peak_memory_mib())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < len(launcher) >> 20

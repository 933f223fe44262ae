"""Mutate the files of a checkpoint at random and run the commands on each mutant; see test_fuzz_checkpoints.py.

Run in tests/ as `python -m helpers.odd_checkpoints FOLDER SEED NUMBER WORK DATA`, where FOLDER is a small checkpoint,
WORK an empty folder for the mutants and DATA a small dataset. Prints one line of JSON for each failure.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

from helpers.memory import peak_mib

SECONDS = 10  # of CPU time for one command
WAIT = 120  # seconds of wall-clock time after which a command counts as hanging

ODD = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 10**18, 10**400, 0.5, -0.5, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "1",
        "cls",
        "gelu",
        "../../etc/passwd",
        "\ud83d",
        "\x1b]0;x\x07",
        "a" * 10_000,
    ),
    *([], [1], [[]], [None] * 3, ["x"] * 3, list(range(1000)), {}, {"a": 1}, {"height": 10**5, "width": 10**5}),
    *({"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x" * 1000}, {"type": "Prepend", "prepend": "x"}),
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 99}] * 9},
    {"type": "Split", "pattern": {"Regex": "(?<!x)"}, "behavior": "Isolated", "invert": False},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000, "special_tokens": {}},
]
NAMES = """
    attribute_map sub_configs to_dict num_patches image_seq_length is_encoder_decoder torchscript quantization_config
    auto_map num_labels id2label dtype torch_dtype attn_implementation architectures output_attentions return_dict
    return_dict_in_generate cache_implementation penalty_alpha num_beam_groups stop_strings assistant_early_exit
    watermarking_config guidance_scale custom_generate chat_template tokenizer_class tokenizer_file model_type
    added_tokens_decoder image_processor_type processor_class unk_token mask_token vision_config text_config
    tie_word_embeddings num_return_sequences normalizer pre_tokenizer post_processor decoder truncation padding
""".split()
NUMBERS = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38]
IN_INDEX = [
    "../x.safetensors",
    "/etc/passwd",
    "model.safetensors",
    "",
    ".",
    "none.safetensors",
    "\0",
    "config.json",
]


def places(value, path=()):
    """Return the paths of keys in a JSON value; of long lists and objects only the first few entries."""
    yield path
    if isinstance(value, (dict, list)) and len(path) < 8:
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, one in items[:30]:
            yield from places(one, (*path, key))


def mutate_json(rng: random.Random, path: Path) -> str:
    content = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.choice(list(places(content)))
        if rng.random() < 0.15:
            place = (*place[:-1], rng.choice(NAMES))
        value = rng.choice(ODD)
        if not place:
            content = value
            break
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        if not isinstance(holder, (dict, list)) or (isinstance(holder, list) and not isinstance(place[-1], int)):
            continue
        if rng.random() < 0.2 and isinstance(holder, dict):
            holder.pop(place[-1], None)
        elif rng.random() < 0.05:
            for _ in range(rng.choice([20, 500, 5000])):
                value = [value]
            holder[place[-1]] = value
        else:
            holder[place[-1]] = value
    try:
        path.write_text(json.dumps(content))
    except (RecursionError, ValueError):
        path.write_text('{"a":' * 100_000)
    return path.name


def mutate_bytes(rng: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "insert", "empty", "zeros", "deep"])
    if kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "flip":
        for _ in range(rng.choice([1, 10, 1000])):
            content[rng.randrange(min(len(content), rng.choice([64, 8000, 10**9])))] = rng.randrange(256)
    elif kind == "insert":
        at = rng.randrange(len(content))
        content[at:at] = rng.randbytes(rng.choice([1, 100]))
    elif kind == "empty":
        content.clear()
    elif kind == "zeros":
        content[:] = bytes(len(content))
    else:
        content[:] = b"[" * 200_000
    path.write_bytes(content)
    return f"{path.name} {kind}"


def mutate_weights(rng: random.Random, path: Path) -> str:
    """Change the header or the values of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    key = rng.choice([name for name in header if name != "__metadata__"])
    about = header[key]
    kind = rng.choice(["numbers", "dtype", "shape", "offsets", "drop", "extra", "rename", "length", "many"])
    if kind == "numbers":
        begin, end = about["data_offsets"]
        number = struct.pack("<f", rng.choice(NUMBERS))
        data[begin:end] = (number * ((end - begin) // 4)) if rng.random() < 0.5 else number + data[begin + 4 : end]
    elif kind == "dtype":
        about["dtype"] = rng.choice(["F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "X", None, 5])
    elif kind == "shape":
        about["shape"] = rng.choice([[], [0], [10**9], [10**18, 10**18], about["shape"][::-1], [-1], ["x"], None])
    elif kind == "offsets":
        about["data_offsets"] = rng.choice(
            [[0, 0], [0, 10**15], [10, 5], [-1, 4], None, [0], about["data_offsets"][::-1]]
        )
    elif kind == "drop":
        del header[key]
    elif kind == "extra":
        header["extra" * rng.choice([1, 1000])] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    elif kind == "rename":
        header[rng.choice(["x", key.upper(), "model." + key, "../" + key, "\u202e"])] = header.pop(key)
    elif kind == "many":
        end = len(data)
        header |= {
            f"extra{number}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for number in range(50_000)
        }
    text = json.dumps(header).encode()
    said = rng.choice([0, 1, 10**6, 2**40, 2**63, 2**64 - 1]) if kind == "length" else len(text)
    path.write_bytes(struct.pack("<Q", said) + text + bytes(data))
    return f"weights {kind} {key}"


def replace_file(rng: random.Random, path: Path) -> str:
    """Replace a file by something that is not a regular file."""
    kind = rng.choice(["missing", "folder", "fifo", "zero", "loop", "sparse", "index", "adapter", "text"])
    if kind in ("index", "adapter", "text"):
        files = {"index": "model.safetensors.index.json", "adapter": "adapter_config.json", "text": "model.safetensors"}
        content = {"weight_map": {name: rng.choice(IN_INDEX) for name in "ab"}, "base_model_name_or_path": "a/b"}
        if kind == "index":
            (path.parent / "model.safetensors").unlink()
        (path.parent / files[kind]).write_text("version https://git-lfs" if kind == "text" else json.dumps(content))
        return kind
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind in ("zero", "loop"):
        path.symlink_to("/dev/zero" if kind == "zero" else path.name)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    return f"{path.name} {kind}"


class Hangs(BaseException):
    """Raised on timeout; a BaseException, so that no library catches it."""


def stop(*_):
    raise Hangs


def behaves(arguments: list[str]) -> str | None:
    """Return what is wrong with the outcome of a command, or None."""
    from nanovlm_hf import cli

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["nanovlm", *arguments]
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(WAIT)
    start, code = time.process_time(), None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        return f"raises {error!r}"
    finally:
        signal.alarm(0)
    lines = err.getvalue().splitlines()
    if "Traceback" in err.getvalue() or "unexpected" in err.getvalue() or "\x1b" in err.getvalue():
        return f"says {err.getvalue()[-300:]!r}"
    if code not in (0, 1) or (code == 1 and len(lines) != 1) or (code == 0 and lines):
        return f"ends with {code} and {lines!r}"
    if time.process_time() - start > SECONDS:
        return f"takes {time.process_time() - start:.0f} s"
    return None


def main() -> None:
    whole, work, data = Path(sys.argv[1]), Path(sys.argv[4]), sys.argv[5]
    seed, number = int(sys.argv[2]), int(sys.argv[3])
    photo = work / "photo.png"
    shutil.copy(whole / "photo.png", photo)
    peak = 0
    for case in range(number):
        rng = random.Random(f"{seed}-{case}")
        folder = work / f"case{case}"
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("photo.png"))
        files = sorted(path for path in folder.glob("*.json") if path.name != "metrics.json")
        mutation = rng.choice([mutate_json] * 5 + [mutate_bytes, mutate_weights, replace_file])
        done = mutation(rng, folder / "model.safetensors" if mutation is mutate_weights else rng.choice(files))
        if mutation in (mutate_bytes, replace_file) and rng.random() < 0.3:
            with contextlib.suppress(OSError, ValueError):
                done += ", " + mutation(rng, folder / "model.safetensors")
        print(f"case {case}: {done!r}", file=sys.stderr, flush=True)
        sampling = ["--temperature", "1", "--seed", "0"] if rng.random() < 0.3 else []
        commands = [["complete", str(photo), "--model", str(folder), "--max-new-tokens", "3", *sampling]]
        commands.append(["info", str(folder)])
        if case % 4 == 0:
            commands.append(["push", str(folder), "org/name", "--dry-run"])
        if case % 10 == 0:
            models = [
                "--model",
                str(folder),
                "--dataset",
                data,
                "--variant",
                "short",
                "--out",
                str(work / f"out{case}"),
            ]
            commands.append(["evaluate", *models, "--limit", "1", "--max-new-tokens", "2", "--grounding-images", "2"])
        for command in commands:
            problem = behaves(command)
            if command[0] in ("push", "evaluate") and problem is not None and problem.startswith("ends with 0"):
                problem = None  # they say what they do
            mebibytes = peak_mib()
            if problem is None and mebibytes > max(peak, 1536):
                problem = f"takes {mebibytes} MiB"
            peak = max(peak, mebibytes)
            if problem is not None:
                print(
                    json.dumps({"case": case, "mutation": done, "command": command[0], "problem": problem}), flush=True
                )
        shutil.rmtree(folder)
    print(json.dumps({"cases": number, "peak_mib": peak}), flush=True)


if __name__ == "__main__":
    main()

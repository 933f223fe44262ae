"""Inputs that were mutated at random: whatever they hold, a command ends soon, with one line and no traceback.

`NANOVLM_FUZZ_SEED` draws other mutations, `NANOVLM_FUZZ_CASES` sets how many. An input that fails is in the folder
that the message names.
"""

import copy
import io
import json
import os
import random
import re
import shutil
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nanovlm_hf.data.build import build_dataset
from nanovlm_hf.errors import scrub
from nanovlm_hf.hub import dataset_card as card_module

from helpers.toy_data import write_sources

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("NANOVLM_FUZZ_SEED", "0"))
CASES = int(os.environ.get("NANOVLM_FUZZ_CASES", "100"))
SECONDS = 10.0  # of CPU time that one input may take
WAIT = 60.0  # seconds by the clock, on a machine that other tests keep busy

VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63) - 1, 10**400),
    *(1.5, 1001.0, 1e308, float("nan"), float("inf")),
    *("", " ", "1001", "-1", "9" * 30, "9" * 5000, "x", "a dog", "x" * 5000, "caf\xe9", "NaN", "=1+1"),
    *("/etc/passwd", "../../etc/passwd", "~", ".", "..", "a/" * 300, "[1]*", "%s", "{{7*7}}", "${x}", "<script>"),
    *("\0", "\n", "\r\n", "\x1b]0;x\x07", "\u2028", "\x85", "\ud83d", "\udc00", "\u202e", "\uffff"),
    *("http://[::1/x", "http://u:p@h/", "file:///etc/passwd"),
    *([], {}, [[]], [None], [1, "x"], {"a": 1}, {"bytes": None, "path": "/etc/passwd"}, {"": {}}),
]
BYTES = [*(one.encode() for one in '{}[]"\\,:' + "\n\r\t#\u2028"), b"", b"\0", b"\xff", b"\xfe\xff", b"\xc3"]
BYTES += [b"\xef\xbb\xbf", b"\\ud800", b"9" * 5000, b"[" * 3000, b"---\n", b"- ", b"&a ", b"*a", b"!!", b"1e999"]
ENCODINGS = ("utf-16", "utf-32", "utf-8-sig", "latin-1")


def nodes(content, path=()):
    """Yield the locations in a JSON value as paths of keys."""
    yield path
    if isinstance(content, (list, dict)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from nodes(value, (*path, key))


def mutated(content, rng):
    """Return a JSON value with one to three values changed, removed, renamed or duplicated."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(nodes(content)))
        if not path:
            if rng.random() < 0.1:
                return rng.choice(VALUES)
            continue
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        what = rng.random()
        if what < 0.7:
            holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))
        elif what < 0.8:
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        else:
            holder[str(rng.choice(["x", "id", "image_id", "\ud83d", ""]))] = holder.pop(path[-1])
    return content


def mutated_bytes(content, rng):
    """Return bytes with one to three flipped, truncated, inserted or duplicated, or in another encoding."""
    if rng.random() < 0.05:
        return content.decode("utf-8", "replace").encode(rng.choice(ENCODINGS), "replace")
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(content))
        end = min(len(content), at + rng.choice([0, 1, 1, 4, 40, 400]))
        what = rng.random()
        if what < 0.3:
            content = content[:at] + rng.choice(BYTES) + content[end:]
        elif what < 0.5:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif what < 0.7:
            content = content[:at] + content[end:]
        elif what < 0.8:
            content = content[:at]
        else:
            content = content[:end] + content[at:end] + content[end:]
    return content


def dumped(content):
    return json.dumps(content).encode()


def mutated_rows(rows, rng):
    """Return JSON Lines with one line mutated, as JSON or as bytes."""
    rows = mutated(rows, rng) if rng.random() < 0.7 else rows
    content = b"\n".join(map(dumped, rows)) if isinstance(rows, list) else dumped(rows)
    return mutated_bytes(content, rng) if rng.random() < 0.4 else content


def mutated_document(content, rng):
    content = dumped(mutated(content, rng) if rng.random() < 0.7 else content)
    return mutated_bytes(content, rng) if rng.random() < 0.4 else content


def mutated_parquet(rows, rng):
    """Return a Parquet file with other values, columns and types, or with other bytes."""
    rows = mutated(rows, rng)
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    columns = {}
    for name in sorted({str(name) for row in rows for name in row}):
        column = arrow([row.get(name) for row in rows])
        columns[name.encode(errors="replace").decode()] = column
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return mutated_bytes(buffer.getvalue(), rng) if rng.random() < 0.4 else buffer.getvalue()


def arrow(values):
    """Return a column of these values, or of their representation if no column can hold them."""
    try:
        column = pa.array(values)
        pq.write_table(pa.table({"a": column}), io.BytesIO())
        return column
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        return pa.array([repr(value).encode(errors="replace").decode() for value in values])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Sources of six small images, and the datasets built from them."""
    folder = tmp_path_factory.mktemp("whole")
    sources = write_sources(folder / "sources", photos=6)
    for path in (sources / "images").iterdir():
        Image.new("RGB", (8, 8)).save(path)
    given = sources / "captions.json", sources / "descriptions.jsonl"
    build_dataset(*given, sources / "images", folder / "photos", about="## About\n\nAll mine.")
    build_dataset(*given, None, folder / "texts")
    return folder


@pytest.fixture
def fuzz(run, tmp_path, monkeypatch):
    """Runs a command on many inputs and checks how it ends."""
    monkeypatch.setattr(card_module, "plot", lambda _, path: path.write_bytes(b""))  # a second each

    def call(count, prepare):
        outcomes = {0: 0, 1: 0, 2: 0}
        for number in range(count):
            rng = random.Random(f"{SEED}-{number}")
            folder = tmp_path / str(number)
            folder.mkdir()
            command = prepare(folder, rng)
            start, began = time.process_time(), time.monotonic()
            code, _, errors = run(*command)
            seconds, waited = time.process_time() - start, time.monotonic() - began
            said = [line for line in errors if line.strip() and not re.search(r"(image|examples)(/s)?[\],]", line)]
            about = f"seed {SEED}, {folder}: {code}, {said}"
            assert code in outcomes, about
            assert seconds < SECONDS, about
            assert waited < WAIT, about
            assert "Traceback" not in "".join(errors), about
            assert "unexpected" not in "".join(said), about
            if code:
                assert len(said) == 1, about
            assert all(line.startswith("nanovlm: ") and scrub(line, 2100) == line for line in said), about
            outcomes[code] += 1
            shutil.rmtree(folder)
        return outcomes

    return call


def test_captions(fuzz, whole):
    content = json.loads((whole / "sources" / "captions.json").read_text())
    for row in content["images"]:
        row["coco_url"] = f"http://127.0.0.1:9/{row['id']}.jpg"

    def prepare(folder, rng):
        (folder / "captions.json").write_bytes(mutated_document(content, rng))
        command = rng.choice(["ingest", "build"])
        given = ["data", command, "--captions", folder / "captions.json", "--out", folder / "out"]
        if command == "ingest":
            images = ["--images", whole / "sources" / "images"] if rng.random() < 0.8 else []  # no photo is downloaded
            return [*given, *images, "--limit", rng.choice([1, 3, 10**30]), "--seed", rng.choice([0, -1, 10**30])]
        images = ["--images", whole / "sources" / "images"] if rng.random() < 0.5 else ["--text-only"]
        shards = ["--num-shards", rng.choice([1, 2, 10**6]), "--shard-index", rng.choice([0, 1, 5])]
        return [*given, "--descriptions", whole / "sources" / "descriptions.jsonl", *images, *shards]

    assert min(fuzz(CASES, prepare).values()) > CASES // 100, "no kind of end is too rare to be tested"


def test_descriptions(fuzz, whole):
    rows = [json.loads(line) for line in (whole / "sources" / "descriptions.jsonl").read_text().splitlines()]

    def prepare(folder, rng):
        (folder / "texts.jsonl").write_bytes(mutated_rows(rows, rng))
        given = ["data", "build", "--captions", whole / "sources" / "captions.json", "--text-only"]
        return [*given, "--descriptions", folder / "texts.jsonl", "--out", folder / "out"]

    outcomes = fuzz(CASES // 2, prepare)
    assert min(outcomes[0], outcomes[1]) > CASES // 80


def test_image_folders(fuzz, whole):
    names = {number: f"{number}.jpg" for number in range(1000, 1004)}
    rows = [{"file_name": name, "caption": "a dog, a cat", "image_id": number} for number, name in names.items()]
    header = b"file_name,caption,image_id,x\n"
    lines = header + b"".join(b'%d.jpg,"a dog, a cat",%d,1\n' % (number, number) for number in range(1000, 1004))

    def prepare(folder, rng):
        album = folder / "album"
        shutil.copytree(whole / "sources" / "images", album)
        kind = rng.choice(["jsonl", "csv", "parquet"])
        if kind == "jsonl":
            content = mutated_rows(rows, rng)
        else:
            content = mutated_bytes(lines, rng) if kind == "csv" else mutated_parquet(rows, rng)
        (album / f"metadata.{kind}").write_bytes(content)
        return ["data", "ingest", "--image-folder", album, "--out", folder / "out"]

    outcomes = fuzz(CASES, prepare)
    assert min(outcomes[0], outcomes[1]) > CASES // 40


def test_cards_of_datasets(fuzz, whole):
    text = (whole / "photos" / "README.md").read_bytes()
    head = text[: text.index(b"# ")]

    def prepare(folder, rng):
        shutil.copytree(whole / "photos", folder / "data")
        content = text if rng.random() < 0.02 else mutated_bytes(head, rng) + text[len(head) :]
        (folder / "data" / "README.md").write_bytes(content)
        return ["data", "push", "--dataset", folder / "data", "--to-folder", folder / "out"]

    outcomes = fuzz(CASES // 2, prepare)
    assert min(outcomes[0], outcomes[1]) > CASES // 80


def rows_of(folder):
    return [row for path in sorted((folder / "short").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_parquet_that_a_card_is_written_for(fuzz, whole):
    rows = rows_of(whole / "texts")

    def prepare(folder, rng):
        (folder / "data" / "short").mkdir(parents=True)
        (folder / "data" / "short" / "train-0.parquet").write_bytes(mutated_parquet(rows, rng))
        return ["data", "card", "--dataset", folder / "data"]

    outcomes = fuzz(CASES // 2, prepare)
    assert min(outcomes[0], outcomes[1]) > CASES // 80


def dataset_of(folder, content, rng):
    """Write a dataset of one split; its name is in the card, so that the cache of `datasets` distinguishes it."""
    (folder / "short").mkdir(parents=True)
    name = f"short/train-{rng.randrange(10**12)}.parquet"
    (folder / name).write_bytes(content)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: short\n  data_files:\n  - split: train\n    path: {name}\n---\n"
    )
    return folder


def test_datasets_that_are_joined(fuzz, whole):
    rows = rows_of(whole / "texts")

    def prepare(folder, rng):
        dataset = dataset_of(folder / f"data{rng.randrange(10**9)}", mutated_parquet(rows, rng), rng)
        return ["data", "join", "--dataset", dataset, "--images", whole / "sources" / "images", "--out", folder / "out"]

    outcomes = fuzz(CASES // 8, prepare)
    assert min(outcomes[0], outcomes[1]) > 0


def test_datasets_and_items_that_are_evaluated(fuzz, whole):
    """The images are read before the missing model is reported."""
    rows = rows_of(whole / "photos")

    def prepare(folder, rng):
        dataset = dataset_of(folder / f"data{rng.randrange(10**9)}", mutated_parquet(rows, rng), rng)
        (folder / "items.txt").write_bytes(mutated_bytes(b"# ids\n1000\n1001\n", rng))
        items = ["--items", folder / "items.txt"] if rng.random() < 0.7 else []
        given = ["evaluate", "--model", "nowhere", "--dataset", dataset, "--variant", "short", "--split", "train"]
        return [*given, "--out", folder / "out", *items]

    assert fuzz(CASES // 8, prepare)[0] == 0

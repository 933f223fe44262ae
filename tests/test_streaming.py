"""Training from a streamed dataset."""

from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets import Image as HubImage
from PIL import Image

from nanovlm_hf import InputError, NanoVLMImageProcessor, NanoVLMProcessor
from nanovlm_hf.training import data
from nanovlm_hf.training.arguments import read_arguments
from nanovlm_hf.training.batches import TrainingBatches
from nanovlm_hf.training.run_directory import RunDirectory
from nanovlm_hf.training.streaming import StreamedBatches, StreamedSplit, open_stream
from nanovlm_hf.training.texts import TokenizedTexts

from helpers.image_files import png_header
from helpers.runs import CONFIG, metrics, small_options, weights
from helpers.toy_data import jpeg_of


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    """Disable the five seconds that `datasets` sleeps after each pass."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def processor(tokenizer):
    return NanoVLMProcessor(NanoVLMImageProcessor(), tokenizer, image_seq_length=1)


def batches_of(split: StreamedSplit, processor, **settings) -> StreamedBatches:
    settings = {"batch_size": 1, "steps": 80, "vocab_size": 320, "augment": True, **settings}
    return StreamedBatches(split, processor, ["short", "captions"], **settings)


def damaged_stream(damaged: int, images: int = 400) -> StreamedSplit:
    """Return a split whose first images are not images, or claim too many pixels to be decoded."""
    bad = [b"nothing", png_header(60_000, 60_000)]
    contents = [bad[number % 2] if number < damaged else jpeg_of(number) for number in range(images)]
    rows = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "image_id": list(range(images)),
        "description": ["There is a big red ball."] * images,
        "captions": [["a ball"]] * images,
    }
    features = Features(
        {
            "image": HubImage(decode=False),
            "image_id": Value("int64"),
            "description": Value("string"),
            "captions": [Value("string")],
        }
    )
    return StreamedSplit(Dataset.from_dict(rows, features=features).to_iterable_dataset(), ["a.parquet"])


@pytest.mark.slow
def test_a_streamed_run_learns_and_resumes(train, tmp_path, toy):
    """Two windows of steps, a second pass over the images, and a state within the second window."""
    options = ("--streaming", "true", "--texts", "short", "captions", "--per_device_train_batch_size", 6)
    options += ("--max_steps", 28, "--save_steps", 11, "--save_total_limit", 9, "--eval_steps", 14)
    options += ("--augment", "true", "--logging_steps", 2, "--warmup_steps", 10)
    whole, other = tmp_path / "whole", tmp_path / "other"
    assert train("--config", CONFIG, *small_options(toy, whole), *options)[0] == 0
    rows = [row for row in metrics(whole) if "train_loss" in row]
    assert rows[-1]["epoch"] == 0.0
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    state = whole / "states" / "step-00000022"
    assert train("--config", CONFIG, *small_options(toy, other), *options, "--resume", state)[0] == 0
    after = {row["step"]: row["train_loss"] for row in metrics(other) if "train_loss" in row}
    assert list(after) == [24, 26, 28]
    assert after == {row["step"]: row["train_loss"] for row in rows if row["step"] > 22}
    assert weights(other)[0] == weights(whole)[0]
    assert "A stream of images for training" in (whole / "best" / "README.md").read_text()

    mapped = tmp_path / "mapped"
    assert train("--config", CONFIG, *small_options(toy, mapped), "--max_steps", 2)[0] == 0
    records = [RunDirectory(run, exist_ok=True).description()["data"] for run in (whole, mapped)]
    assert records[0]["validation"] == records[1]["validation"], "both are evaluated on the same images"
    assert records[0]["train"]["files"] == 1


def test_processes_take_different_images_and_leave_none_out(toy, processor):
    split = open_stream(str(toy / "data"), "short", "train")
    every = [row["image_id"] for row in split.rows]
    taken = []
    for index in range(2):
        batches = batches_of(split, processor, process_index=index, num_processes=2)
        taken.append([image_id for batch in batches.from_step(0) for image_id in batch["image_ids"]])
    once = [ids[: len(every) // 2 // 16 * 16] for ids in taken]  # whole windows of the first pass
    assert len(set(once[0] + once[1])) == len(once[0] + once[1])
    assert set(taken[0] + taken[1]) == set(every)
    assert once[0] != every[: len(once[0])], "the order is random"


def test_each_process_opens_its_own_files(processor, tmp_path):
    """If their number is a multiple of the number of processes; otherwise each reads every row, and uses its share."""
    rows = damaged_stream(0, images=64).rows
    files = []
    for number in range(4):
        files.append(str(tmp_path / f"{number}.parquet"))
        Dataset.from_list(list(rows.skip(16 * number).take(16)), features=rows.features).to_parquet(files[-1])
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path / "cache"))
    split = StreamedSplit(stream.cast_column("image", HubImage(decode=False)), files)
    taken = []
    for index in range(2):
        batches = batches_of(split, processor, process_index=index, num_processes=2, steps=32)
        taken.append({image_id for batch in batches.from_step(0) for image_id in batch["image_ids"]})
        assert batches.rows.num_shards <= 2
    assert taken[0] | taken[1] == set(range(64))
    assert not taken[0] & taken[1]
    for ids in taken:
        assert len({image_id // 16 for image_id in ids}) == 2, "two files each"


def test_a_second_pass_has_another_order(processor):
    images = 64
    batches = batches_of(damaged_stream(0, images), processor, steps=2 * images)
    taken, epochs = [], []
    for batch in batches.from_step(0):
        taken += batch["image_ids"]
        epochs.append(batches.epoch(0))
    assert epochs == sorted(epochs)
    assert epochs[-1] == 1.0
    first, second = taken[:images], taken[images:]
    assert first != second
    assert len(set(first)) == images


def same(one: dict, other: dict) -> bool:
    if one["image_ids"] != other["image_ids"] or len(one["texts"]) != len(other["texts"]):
        return False
    tensors = [(one[name], other[name]) for name in ("crops", "gain", "bias", "word_targets")]
    for text, its in zip(one["texts"], other["texts"], strict=True):
        tensors += [(text[name], its[name]) for name in text]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize(
    ("micro_batches", "processes", "steps"),
    [
        (1, 1, (15, 16, 17)),
        *(pytest.param(*shared, range(37), marks=pytest.mark.slow) for shared in ((1, 1), (2, 1), (1, 2))),
    ],
)
def test_a_stream_resumed_after_any_step_gives_the_same_batches(processor, micro_batches, processes, steps):
    """36 steps: windows of 16, two passes and more, with damaged images among them, bit for bit."""
    split = damaged_stream(2, images=16 * micro_batches * processes)
    settings = {"steps": 36, "micro_batches": micro_batches, "process_index": processes - 1, "num_processes": processes}
    batches = batches_of(split, processor, **settings)
    coming, whole, positions = batches.from_step(0), [], [batches.position]
    for _ in range(36):
        whole += [next(coming) for _ in range(micro_batches)]
        positions.append(batches.position)  # what a state saved here would hold
    assert positions[-1][0] == 2
    for step in steps:
        resumed = batches_of(split, processor, **settings)
        resumed.position = positions[step]
        rest = list(resumed.from_step(step))
        assert len(rest) >= len(whole) - step * micro_batches
        assert all(map(same, whole[step * micro_batches :], rest)), step


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_images_on_disk_resumed_after_any_step_give_the_same_batches(processor, micro_batches):
    """36 steps, passes of 14, windows of 16."""
    rows = 14 * micro_batches
    images = np.random.default_rng(0).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    captions = [[f"a ball {'to the left ' * (row % 3)}", "one"] for row in range(rows)]
    texts = TokenizedTexts({"captions": captions}, captions, processor)

    def batches():
        settings = {
            "batch_size": 1,
            "steps": 36,
            "micro_batches": micro_batches,
            "vocab_size": 320,
            "augment": True,
            "seed": 3,
        }
        return TrainingBatches(images, texts, list(range(rows)), **settings)

    whole = list(batches().from_step(0))
    assert len(whole) == 36 * micro_batches
    for step in range(37):
        rest = list(batches().from_step(step))
        assert len(rest) == len(whole) - step * micro_batches
        assert all(map(same, whole[step * micro_batches :], rest)), step


def test_a_few_damaged_images_are_left_out(processor):
    batches = batches_of(damaged_stream(5, images=101), processor, steps=96)
    taken = [image_id for batch in batches.from_step(0) for image_id in batch["image_ids"]]
    assert sorted(taken)[:2] == [5, 6]
    assert not set(range(5)) & set(taken)


def test_many_damaged_images_stop_the_run(processor):
    with pytest.raises(InputError, match=r"dataset: 11 of the first \d+ images cannot be decoded \(image_id \d+, "):
        list(batches_of(damaged_stream(60), processor, steps=400).from_step(0))


def test_a_stream_without_images_for_a_process(processor):
    with pytest.raises(InputError, match="the stream has no image for this process"):
        list(batches_of(damaged_stream(0, images=1), processor, process_index=1, num_processes=2).from_step(0))


def test_a_stream_that_fails(processor):
    def rows():
        yield from damaged_stream(0, images=3).rows
        raise ConnectionError("the line is down\nand more")

    split = StreamedSplit(IterableDataset.from_generator(rows, features=damaged_stream(0, 1).rows.features), [])
    with pytest.raises(InputError, match=r"the stream failed \(.*the line is down\): use --resume auto"):
        list(batches_of(split, processor).from_step(0))


def test_streamed_pixels_are_those_of_the_stored_image(toy, processor):
    """Without augmentation, a streamed image of the right size keeps its pixels."""
    split = open_stream(str(toy / "data"), "short", "train")
    (batch, *_) = batches_of(split, processor, augment=False, steps=1).from_step(0)
    stored = {row["image_id"]: row["image"]["bytes"] for row in split.rows}[batch["image_ids"][0]]
    assert np.array_equal(batch["crops"][0].permute(1, 2, 0).numpy(), np.asarray(Image.open(BytesIO(stored))))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "max_steps: is required when streaming"),
        (("--max_steps", 5, "--train_samples", 9), 2, "train_samples: cannot be combined with streaming"),
        (("--max_steps", 5, "--texts", "short", "long"), 2, "cannot be streamed: only short and captions can"),
        (("--max_steps", 0), 2, "max_steps: 0 is less than 1"),
        (("--max_steps", 5, "--dataset", "nowhere"), 1, "dataset: nowhere (short) cannot be read as a stream: "),
    ],
)
def test_wrong_streams(train, tmp_path, toy, options, code, message):
    got, errors = train("--config", CONFIG, *small_options(toy, tmp_path / "run"), "--streaming", "true", *options)
    assert got == code
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("split", "rows", "missing", "problem"),
    [
        ("validation", 0, None, "no validation split of two images or more"),
        ("validation", 1, None, "no validation split of two images or more"),
        ("train", 1, None, "no train split of two images or more"),
        ("validation", 2, "description", "has no column 'description'"),
        ("train", 2, "image_id", "has no column 'image_id'"),
        ("validation", 2, "captions", "has no column 'captions'"),
    ],
)
def test_the_splits_of_a_stream_are_checked(processor, monkeypatch, split, rows, missing, problem):
    def opened(name, variant, one):
        stream = damaged_stream(0, 4)
        if one == split:
            stream.rows = stream.rows.take(rows)
            stream.rows = stream.rows.remove_columns([missing]) if missing else stream.rows
        return stream

    monkeypatch.setattr(data, "open_stream", opened)
    options = ["--dataset=data", "--output_dir=run", "--streaming=true", "--max_steps=2"]
    with pytest.raises(InputError, match=problem):
        data.load_splits(read_arguments(options), processor)


@pytest.mark.slow
def test_a_stream_is_resumed_by_the_same_number_of_processes(train, tmp_path, toy, monkeypatch):
    options = ("--config", CONFIG, *small_options(toy, tmp_path / "run"), "--streaming", "true", "--max_steps", 2)
    assert train(*options)[0] == 0
    (state,) = RunDirectory(tmp_path / "run", exist_ok=True).states()
    progress = state / "progress.json"
    progress.write_text(progress.read_text().replace('"positions": [[0, 0]]', '"positions": [[0, 0], [0, 0]]'))
    code, errors = train(*options, "--resume", "auto")
    assert code == 1
    assert "resume: the stream was read by 2 processes and is now read by 1: use the same number" in errors

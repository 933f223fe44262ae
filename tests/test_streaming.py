"""Training from a dataset that is read as it comes."""

from io import BytesIO

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as HubImage
from PIL import Image
from run_folder import RunFolder
from runs import CONFIG, launch, metrics, toy_options, weights
from streaming import StreamedBatches, StreamedSplit, open_stream
from test_photos import png_header
from toy_data import jpeg_of

from nanovlm_hf import InputError, NanoVLMImageProcessor, NanoVLMProcessor


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """`datasets` rests for five seconds after each pass, which toy passes need not."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def processor(tokenizer):
    return NanoVLMProcessor(NanoVLMImageProcessor(), tokenizer, image_seq_length=1)


def batches_of(split: StreamedSplit, processor, **settings) -> StreamedBatches:
    settings = {"batch_size": 1, "steps": 80, "vocab_size": 320, "augment": True, **settings}
    return StreamedBatches(split, processor, ["short", "captions"], **settings)


def damaged_stream(damaged: int, photos: int = 400) -> StreamedSplit:
    """Photos of which the first are no pictures, or claim more pixels than are ever decoded."""
    bad = [b"nothing", png_header(60_000, 60_000)]
    contents = [bad[number % 2] if number < damaged else jpeg_of(number) for number in range(photos)]
    rows = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "image_id": list(range(photos)),
        "description": ["There is a big red ball."] * photos,
        "captions": [["a ball"]] * photos,
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


def test_a_streamed_run_learns_and_goes_on_where_it_was(train, tmp_path, toy):
    """Two windows of steps and a second pass over the photos; from a state within the second window."""
    options = ("--streaming", "true", "--texts", "short", "captions", "--per_device_train_batch_size", 6)
    options += ("--max_steps", 28, "--save_steps", 11, "--save_total_limit", 9, "--eval_steps", 14)
    options += ("--augment", "true", "--logging_steps", 2, "--warmup_steps", 10)
    whole, other = tmp_path / "whole", tmp_path / "other"
    assert train("--config", CONFIG, *toy_options(toy, whole), *options)[0] == 0
    rows = [row for row in metrics(whole) if "train_loss" in row]
    assert rows[-1]["epoch"] == 0.0
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    state = whole / "states" / "step-00000022"
    assert train("--config", CONFIG, *toy_options(toy, other), *options, "--resume", state)[0] == 0
    after = {row["step"]: row["train_loss"] for row in metrics(other) if "train_loss" in row}
    assert list(after) == [24, 26, 28]
    assert after == {row["step"]: row["train_loss"] for row in rows if row["step"] > 22}
    assert weights(other)[0] == weights(whole)[0]
    assert "A stream of photos to train" in (whole / "best" / "README.md").read_text()

    mapped = tmp_path / "mapped"
    assert train("--config", CONFIG, *toy_options(toy, mapped), "--max_steps", 2)[0] == 0
    records = [RunFolder(run, keep=True).description()["data"] for run in (whole, mapped)]
    assert records[0]["validation"] == records[1]["validation"], "both are judged on the same photos"
    assert records[0]["train"]["files"] == 1


@pytest.mark.slow
def test_two_processes_share_a_stream_and_go_on(tmp_path, toy):
    fields = {"streaming": "true", "max_steps": 20, "per_device_train_batch_size": 4, "texts": "short"}
    fields |= {"save_steps": 18, "save_total_limit": 9, "eval_steps": 20}
    launch(toy, tmp_path / "whole", 2, **fields)
    state = tmp_path / "whole" / "states" / "step-00000018"
    launch(toy, tmp_path / "other", 2, **fields, resume=state)
    rows, after = ([row for row in metrics(tmp_path / name) if "train_loss" in row] for name in ("whole", "other"))
    assert [row["train_loss"] for row in after] == [row["train_loss"] for row in rows[18:]]
    assert weights(tmp_path / "other")[0] == weights(tmp_path / "whole")[0]


def test_processes_take_different_photos_and_leave_none_out(toy, processor):
    split = open_stream(str(toy / "data"), "short", "train")
    every = [row["image_id"] for row in split.rows]
    taken = []
    for index in range(2):
        batches = batches_of(split, processor, process_index=index, num_processes=2)
        taken.append([image_id for batch in batches.from_step(0) for image_id in batch["image_ids"]])
    once = [ids[: len(every) // 2 // 16 * 16] for ids in taken]  # whole windows of the first pass
    assert len(set(once[0] + once[1])) == len(once[0] + once[1])
    assert set(taken[0] + taken[1]) == set(every)
    assert once[0] != every[: len(once[0])], "the order is by chance"


def test_a_second_pass_comes_in_another_order(toy, processor):
    split = open_stream(str(toy / "data"), "short", "train")
    photos = sum(1 for _ in split.rows)
    batches = batches_of(split, processor, steps=2 * photos)
    taken, epochs = [], []
    for batch in batches.from_step(0):
        taken += batch["image_ids"]
        epochs.append(batches.epoch(0))
    assert epochs == sorted(epochs)
    assert epochs[-1] == 1.0
    first, second = taken[:photos], taken[photos:]
    assert first != second
    assert len(set(first)) > photos - 16


def test_a_few_damaged_photos_are_left_out(processor):
    batches = batches_of(damaged_stream(5), processor, steps=395)
    taken = [image_id for batch in batches.from_step(0) for image_id in batch["image_ids"]]
    assert sorted(taken)[:2] == [5, 6]
    assert not set(range(5)) & set(taken)


def test_many_damaged_photos_stop_the_run(processor):
    with pytest.raises(InputError, match=r"dataset: 11 of the first \d+ photos cannot be decoded \(image_id \d+, "):
        list(batches_of(damaged_stream(60), processor, steps=400).from_step(0))


def test_a_stream_without_photos_for_a_process(processor):
    with pytest.raises(InputError, match="the stream gives this process no photo"):
        list(batches_of(damaged_stream(0, photos=1), processor, process_index=1, num_processes=2).from_step(0))


def test_a_stream_that_breaks_off(processor):
    def rows():
        yield from damaged_stream(0, photos=3).rows
        raise ConnectionError("the line is down\nand more")

    split = StreamedSplit(IterableDataset.from_generator(rows, features=damaged_stream(0, 1).rows.features), [])
    with pytest.raises(InputError, match=r"the stream broke off \(.*the line is down\): --resume auto goes on"):
        list(batches_of(split, processor).from_step(0))


def test_what_is_stored_is_what_is_seen(toy, processor):
    """Without augmentation a streamed photo has the pixels that the image processor gives."""
    split = open_stream(str(toy / "data"), "short", "train")
    (batch, *_) = batches_of(split, processor, augment=False, steps=1).from_step(0)
    stored = {row["image_id"]: row["image"]["bytes"] for row in split.rows}[batch["image_ids"][0]]
    assert np.array_equal(batch["crops"][0].permute(1, 2, 0).numpy(), np.asarray(Image.open(BytesIO(stored))))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "max_steps: None but a stream has no length: say how many"),
        (("--max_steps", 5, "--train_samples", 9), 2, "train_samples: 9 are not to be found in a stream"),
        (("--max_steps", 5, "--texts", "short", "long"), 2, "but a stream holds short and captions alone"),
        (("--max_steps", 0), 2, "max_steps: 0 is less than 1"),
        (("--max_steps", 5, "--dataset", "nowhere"), 1, "dataset: nowhere (short) cannot be read as a stream: "),
    ],
)
def test_wrong_streams(train, tmp_path, toy, options, code, message):
    got, errors = train("--config", CONFIG, *toy_options(toy, tmp_path / "run"), "--streaming", "true", *options)
    assert got == code
    assert message in errors
    assert "Traceback" not in errors


def test_a_stream_is_resumed_by_as_many_processes(train, tmp_path, toy, monkeypatch):
    options = ("--config", CONFIG, *toy_options(toy, tmp_path / "run"), "--streaming", "true", "--max_steps", 2)
    assert train(*options)[0] == 0
    (state,) = RunFolder(tmp_path / "run", keep=True).states()
    progress = state / "progress.json"
    progress.write_text(progress.read_text().replace('"positions": [[0, 0]]', '"positions": [[0, 0], [0, 0]]'))
    code, errors = train(*options, "--resume", "auto")
    assert code == 1
    assert "resume: 2 processes read the stream before, 1 do now: go on with as many" in errors

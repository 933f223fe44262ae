"""ShortDesc and LongDesc as they are in the repository: texts alone, and cards that say what the files hold."""

import json
import re
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from nanovlm_hf.data import quality
from nanovlm_hf.data.card import NAMES
from nanovlm_hf.data.splits import split_of

DATASETS = Path(__file__).parent.parent / "hub_cards" / "datasets"


@pytest.mark.parametrize("variant", NAMES)
def test_it_is_text_alone_and_the_card_is_true(variant):
    folder = DATASETS / NAMES[variant]
    splits = load_dataset(str(folder))
    assert set(splits) == {"train", "validation", "test"}
    sources = {"flickr8k": 0, "coco": 0}
    words = rows = 0
    for split, dataset in splits.items():
        assert dataset.column_names == ["image_id", "file_name", "description", "source", "coco_url"]
        for row in dataset:
            assert split_of(row["image_id"]) == split
            reply = {"text": row["description"], "finish_reason": None, "refusal": None}
            assert quality.problems(reply, quality.ACCEPTED[variant]) == []
            source = row["source"].split("-")[0]
            sources[source] += 1
            assert (row["coco_url"] is None) == (source == "flickr8k")
            assert row["coco_url"] is None or row["coco_url"].endswith("/" + row["file_name"])
            assert int(re.findall(r"\d+", row["file_name"].removeprefix("COCO_val2014_"))[0]) == row["image_id"] or (
                row["source"] == "coco-train2014"
            )
            words += len(quality.words(row["description"]))
            rows += 1
    statistics = json.loads((folder / "stats.json").read_text())[variant]
    assert statistics["descriptions"] == rows
    assert statistics["words"] == words
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    sizes = " | ".join(f"{splits[name].num_rows:,}" for name in ("train", "validation", "test"))
    assert f"| `{variant}` | {sizes} |" in card.text
    assert f"| descriptions | {rows:,} |" in card.text
    assert f"| words | {words:,} |" in card.text
    assert "**not** written by GPT-4o" in card.text
    if variant == "short":  # all photos have one
        assert sources == {"flickr8k": 7890, "coco": 1414}
        assert "7,890 of Flickr8k" in card.text
        assert "1,414 of COCO" in card.text

"""The released ShortDesc and LongDesc: text-only data, and cards that agree with the files."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from nanovlm_hf.data import quality
from nanovlm_hf.data.collections import upstream_names
from nanovlm_hf.data.splits import split_of
from nanovlm_hf.data.vocabulary import PATH, released_vocabulary
from nanovlm_hf.variants import VARIANTS
from nanovlm_hf.words import words

DATASETS = Path(__file__).parent.parent / "hub_cards" / "datasets"


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_released_datasets_are_text_only_and_agree_with_their_cards(variant):
    folder = DATASETS / VARIANTS[variant].title
    splits = load_dataset(str(folder))
    assert set(splits) == {"train", "validation", "test"}
    sources = Counter()
    total = rows = 0
    for split, dataset in splits.items():
        assert dataset.column_names == ["image_id", "file_name", "description", "written_from", "source", "coco_url"]
        for row in dataset:
            assert split_of(row["image_id"]) == split
            reply = {"text": row["description"], "finish_reason": None, "refusal": None}
            assert quality.problems(reply, VARIANTS[variant].accepted) == []
            source = row["source"].split("-")[0]
            sources[source, row["written_from"]] += 1
            assert (row["coco_url"] is None) == (source != "coco")
            assert row["coco_url"] is None or row["coco_url"].endswith("/" + row["file_name"])
            known = [row["file_name"], *upstream_names(row["source"], row["image_id"], row["file_name"])]
            assert row["file_name"] in known[1:] or re.match(r"\d+", row["file_name"])[0] == str(row["image_id"])
            total += len(words(row["description"]))
            rows += 1
    statistics = json.loads((folder / "stats.json").read_text())[variant]
    assert statistics["descriptions"] == rows
    assert statistics["words"] == total
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    sizes = " | ".join(f"{splits[name].num_rows:,}" for name in ("train", "validation", "test"))
    assert f"| `{variant}` | {sizes} |" in card.text
    assert f"| descriptions | {rows:,} |" in card.text
    assert f"| words | {total:,} |" in card.text
    assert "**not** GPT-4o" in card.text
    if variant == "short":  # every image has a short description
        assert sources == {
            ("flickr8k", "captions"): 7890,
            ("coco", "captions"): 1414,
            ("coco", "image"): 4847,
            ("visual7w", "image"): 6030,
            ("voc2007", "image"): 1860,
        }
        assert sum(origin == "captions" for origin in splits["validation"]["written_from"]) == 953
        for count in ("7,890", "1,414", "4,847", "6,030", "1,860"):
            assert count in card.text


@pytest.mark.slow
def test_the_vocabulary_is_that_of_the_released_datasets():
    folders = [str(DATASETS / variant.title) for variant in VARIANTS.values()]
    assert PATH.read_text(encoding="utf-8") == released_vocabulary(folders)

"""The columns of ShortDesc and LongDesc."""

from __future__ import annotations

from datasets import Features, Image, List, Value

IMAGE_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("int64"),
        "captions": List(Value("string")),
        "description": Value("string"),
        "written_from": Value("string"),
        "source": Value("string"),
        "coco_url": Value("string"),
    }
)
# Without pixels and human captions, which may not be redistributed; `nanovlm data join` adds both.
TEXT_FEATURES = Features(
    {
        "image_id": Value("int64"),
        "file_name": Value("string"),
        "description": Value("string"),
        "written_from": Value("string"),
        "source": Value("string"),
        "coco_url": Value("string"),
    }
)
IMAGE_SCHEMA = IMAGE_FEATURES.arrow_schema
TEXT_SCHEMA = TEXT_FEATURES.arrow_schema

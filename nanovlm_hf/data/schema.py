"""The columns of ShortDesc and LongDesc."""

from __future__ import annotations

from datasets import Features, Image, List, Value

PHOTO_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("int64"),
        "captions": List(Value("string")),
        "description": Value("string"),
        "source": Value("string"),
        "coco_url": Value("string"),
    }
)
# Without pixels and human captions, whose owners may not let them be passed on; `nanovlm data join` puts both back.
TEXT_FEATURES = Features(
    {
        "image_id": Value("int64"),
        "file_name": Value("string"),
        "description": Value("string"),
        "source": Value("string"),
        "coco_url": Value("string"),
    }
)
PHOTO_SCHEMA = PHOTO_FEATURES.arrow_schema
TEXT_SCHEMA = TEXT_FEATURES.arrow_schema

"""The collections that the images of the released datasets are from, and how their files are named once unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import inside

_COCO_2017 = ("{0:012}.jpg", "train2017/{0:012}.jpg", "val2017/{0:012}.jpg")


@dataclass(frozen=True)
class Collection:
    """The names of a collection's images.

    Attributes:
        names: names relative to the folder that a user has unpacked; `{0}` is the collection's own number of the image
            and `{1}` the name in the dataset.
        offset: number that is added to the collection's own numbers, so that ids are unique in a dataset.
    """

    names: tuple[str, ...]
    offset: int = 0


COLLECTIONS = {
    # COCO of 2017 has all images of 2014, under other names.
    "coco-train2014": Collection(("COCO_train2014_{0:012}.jpg", "train2014/COCO_train2014_{0:012}.jpg", *_COCO_2017)),
    "coco-val2014": Collection(("COCO_val2014_{0:012}.jpg", "val2014/COCO_val2014_{0:012}.jpg", *_COCO_2017)),
    "coco-train2017": Collection(_COCO_2017),
    "flickr8k": Collection(("Flicker8k_Dataset/{1}", "Flickr8k_Dataset/{1}", "Images/{1}")),
    # Visual7W numbers its images as Visual Genome does, whose two archives hold them without the prefix.
    "visual7w": Collection(
        ("v7w_{0}.jpg", "images/v7w_{0}.jpg", "{0}.jpg", "VG_100K/{0}.jpg", "VG_100K_2/{0}.jpg"),
        offset=7_000_000_000_000,
    ),
    "voc2007": Collection(
        tuple(
            f"{folder}{{0:06}}.jpg"
            for folder in ("", "JPEGImages/", "VOC2007/JPEGImages/", "VOCdevkit/VOC2007/JPEGImages/")
        ),
        offset=8_000_000_000_000,
    ),
}


def upstream_names(source: str, image_id: int, file_name: str) -> list[str]:
    """Return the names that an image may have in the folder of its collection; none for an unknown collection.

    Args:
        source: value of the column of that name.
        image_id: id in the dataset.
        file_name: name in the dataset.
    """
    collection = COLLECTIONS.get(source)
    if collection is None:
        return []
    return [name.format(image_id - collection.offset, file_name) for name in collection.names]


def find_image(folders: Sequence[Path], names: Sequence[str]) -> tuple[Path, str]:
    """Return the first folder and name of an existing file; the first of both if there is none.

    Args:
        folders: in the order of the search.
        names: untrusted names, relative to each folder.
    """
    for folder in folders:
        for name in names:
            try:
                inside(folder, name)
            except InputError:
                continue
            return folder, name
    return folders[0], names[0]

"""A dataset that a small model can learn in seconds: a coloured square on grey, with its description."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 170, 40), "blue": (40, 40, 210), "yellow": (220, 210, 40)}


def square(number: int) -> tuple[Image.Image, str]:
    """Return an image of a coloured square at a random position, and the colour."""
    rng = np.random.default_rng(number)
    colour = list(COLOURS)[number % len(COLOURS)]
    image = Image.new("RGB", (224, 224), (128, 128, 128))
    left, top = rng.integers(0, 96, 2)
    image.paste(COLOURS[colour], (left, top, left + 128, top + 128))
    return image, colour


def jpeg_of(number: int) -> bytes:
    """Return such an image as a JPEG file."""
    buffer = io.BytesIO()
    square(number)[0].save(buffer, "JPEG")
    return buffer.getvalue()


def write_sources(folder: Path, photos: int) -> Path:
    """Write captions, descriptions and images for `nanovlm data build`."""
    (folder / "images").mkdir(parents=True)
    annotations, images, lines = [], [], []
    for number in range(photos):
        image, colour = square(number)
        image_id = 1000 + number
        image.save(folder / "images" / f"{image_id}.jpg", quality=90)
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "source": "toy"})
        annotations += [
            {"id": len(annotations) + place, "image_id": image_id, "caption": caption}
            for place, caption in enumerate([f"a {colour} square", f"one {colour} thing on grey"])
        ]
        lines.append(
            {
                "image_id": image_id,
                "short": f"There is a big {colour} square.",
                "long": f"There is a big {colour} square. It sits on a grey floor. I like {colour} things.",
            }
        )
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "descriptions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder

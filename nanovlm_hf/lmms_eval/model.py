"""A NanoVLM checkpoint as a model of lmms-eval."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ..completion import finite_logits
from ..completion_files import DEFAULT_NEW_TOKENS
from ..loading import load_model


class NanoVLM(lmms):
    """Completes the text of each request about its image.

    Args:
        pretrained: released checkpoint, folder or Hub id.
        batch_size: images at a time.

    Raises:
        InputError: if the checkpoint cannot be loaded.
    """

    def __init__(self, pretrained: str = "mini-short", batch_size: int | str = 1, device: str | None = None):
        super().__init__()
        self.model, self.processor = load_model(pretrained)
        if device is not None:
            self.model.to(device)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the completion of each request, without its text."""
        texts: list[str] = []
        with tqdm(total=len(requests), unit="image") as bar:
            for limit, group in itertools.groupby(requests, _limit):  # requests of a task follow one another
                same = [request.args for request in group]
                for start in range(0, len(same), self.batch_size):
                    batch = same[start : start + self.batch_size]
                    texts += self._complete(batch, limit)
                    bar.update(len(batch))
        return texts

    @torch.no_grad()
    def _complete(self, batch: list[tuple[Any, ...]], max_new_tokens: int) -> list[str]:
        prefixes = [prefix for prefix, *_ in batch]
        images = [self._image(*rest) for _, _, *rest in batch]
        inputs = self.processor(images=images, text=prefixes, return_tensors="pt").to(self.model.device)
        # Otherwise as the checkpoint's generation config says.
        tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, logits_processor=finite_logits())
        return self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _image(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> Image.Image:
        (image,) = doc_to_visual(self.task_dict[task][split][doc_id])
        return image

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("the tasks of this model generate text")

    def generate_until_multi_round(self, requests: list[Instance]) -> Any:
        raise NotImplementedError("this model has no conversations")


def _limit(request: Instance) -> int:
    return request.args[1].get("max_new_tokens", DEFAULT_NEW_TOKENS)

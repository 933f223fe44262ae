"""Generate descriptions from captions with a chat model (section 2.1.2; Prompts 1 and 2 of figure 2).

Every reply is first written to `replies.jsonl`. Which texts are accepted depends on that file alone: a killed run that
is started again has the same result as an uninterrupted one.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat.answers import all_thinking
from ..chat.journal import request_key
from ..chat.prices import Price, cost_estimate, estimate_tokens
from ..chat.replies import ChatRequest, ReplyStore, fingerprint_of
from ..chat.untrusted import data_note, delimited
from ..errors import InputError, Interrupt
from ..files import atomic_write, json_line, read_text, write_json
from ..variants import VARIANTS, LengthRange
from . import quality
from .report import DescriptionReport
from .sources import WRITTEN_FROM, ImageRecord

if TYPE_CHECKING:
    from ..chat.client import Outcome  # imports `openai`, which is not needed for given texts

TOKENS_PER_WORD = 1.35  # estimate for simple English including punctuation


@functools.cache
def packaged_prompt(variant: str) -> str:
    """Return the prompt of a variant: Prompt 1 (`short`) or Prompt 2 (`long`) in the paper's wording."""
    return files("nanovlm_hf.data").joinpath(f"prompts/{variant}.txt").read_text(encoding="utf-8").strip()


def messages_of(prompt: str, captions: list[str], delimit: bool = False) -> list[dict[str, Any]]:
    """Return the messages for an image: the prompt and all its captions, numbered (section 2.1.2).

    Args:
        delimit: put the captions between tags that they cannot forge, and state that they are data (beyond the paper;
            the paper's own prompts are sent without).
    """
    numbered = "\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, start=1))
    if delimit:
        prompt, numbered = f"{prompt}\n\n{data_note('captions')}", delimited("captions", numbered)
    return [{"role": "user", "content": f"{prompt}\n\nCaptions:\n{numbered}"}]


def read_prompt(path: str | Path) -> str:
    """Return the prompt in a text file.

    Raises:
        InputError: if the file cannot be read or is empty.
    """
    text = read_text(path).strip()
    if not text:
        raise InputError(f"{path}: the prompt is empty")
    return text


@dataclass(frozen=True)
class DescribeSettings:
    """How descriptions are requested and which are accepted.

    Attributes:
        model: name of the chat model.
        prompts: prompt by variant, for the variants to write. A prompt that is not the paper's is sent with delimited
            captions.
        accepted: accepted length by variant.
        parameters: sampling parameters, without the token limit.
        max_completion_tokens: token limit of a reply, by variant.
        attempts: maximum number of replies for a text.
    """

    model: str
    prompts: dict[str, str]
    accepted: dict[str, LengthRange] = field(
        default_factory=lambda: {name: variant.accepted for name, variant in VARIANTS.items()}
    )
    parameters: dict[str, Any] = field(default_factory=dict)
    max_completion_tokens: dict[str, int] = field(
        default_factory=lambda: {name: variant.max_completion_tokens for name, variant in VARIANTS.items()}
    )
    attempts: int = 3


@dataclass(slots=True)
class Item:
    """The state of one text: an image in a variant.

    Attributes:
        image: the image with its captions.
        variant: name of the variant.
        fingerprint: hash of the request.
        accepted: attempt whose reply was accepted, or 0.
        tried: number of attempts with a reply.
        reasons: gates that the last reply failed.
        out_of_tokens: whether the last reply reached the token limit before its text, as any other would.
    """

    image: ImageRecord
    variant: str
    fingerprint: str
    accepted: int = 0
    tried: int = 0
    reasons: tuple[str, ...] = ()
    out_of_tokens: bool = False


class Describer:
    """Requests the descriptions of a set of images and applies the quality gates.

    Args:
        images: images with their captions.
        settings: how to request and which to accept.
        store: the replies; None if the texts are `given`.
        given: existing texts by image id and variant, instead of replies.
    """

    def __init__(
        self,
        images: list[ImageRecord],
        settings: DescribeSettings,
        store: ReplyStore | None,
        given: dict[int, dict[str, str]] | None = None,
    ):
        self.settings, self.store, self.given = settings, store, given
        self.unanswered: dict[str, str] = {}
        self.stopped: str | None = None
        self.error: BaseException | None = None
        self.refused: dict[int, str] = {}
        self.items = [
            Item(image, variant, self._fingerprint(image, variant))
            for image in images
            for variant in VARIANTS
            if variant in settings.prompts
        ]
        if given is None:
            self._refuse_captions(images)

    def _refuse_captions(self, images: list[ImageRecord]) -> None:
        for image in images:
            if not image.captions:
                self.refused[image.image_id] = "no_captions"
            elif quality.is_foreign(" ".join(image.captions)):
                self.refused[image.image_id] = "captions_language"

    def _parameters(self, variant: str) -> dict[str, Any]:
        return self.settings.parameters | {"max_completion_tokens": self.settings.max_completion_tokens[variant]}

    def _messages(self, image: ImageRecord, variant: str) -> list[dict[str, Any]]:
        prompt = self.settings.prompts[variant]
        return messages_of(prompt, image.captions, delimit=prompt != packaged_prompt(variant))

    def _fingerprint(self, image: ImageRecord, variant: str) -> str:
        return fingerprint_of(self.settings.model, self._parameters(variant), self._messages(image, variant))

    def missing(self) -> list[Item]:
        """Return the items to request now: not accepted yet, and with attempts left.

        Of images with the same captions, whose request is the same, only the first has an item.
        """
        if self.given is not None:
            return []
        found: dict[str, Item] = {}
        for item in self.items:
            if (
                not item.accepted
                and item.tried < self.settings.attempts
                and not item.out_of_tokens
                and item.image.image_id not in self.refused
                and self._next_key(item) not in self.store  # the endpoint has refused it
            ):
                found.setdefault(self._next_key(item), item)
        return list(found.values())

    def _next_key(self, item: Item) -> str:
        return request_key(item.fingerprint, item.tried + 1)

    def request(self, item: Item) -> ChatRequest:
        """Return the next request for an item."""
        return ChatRequest(
            item.fingerprint,
            item.tried + 1,
            self._messages(item.image, item.variant),
            self._parameters(item.variant),
            {"image_id": item.image.image_id, "variant": item.variant},
        )

    def _reply(self, item: Item, attempt: int) -> dict[str, Any] | None:
        if self.given is None:
            return self.store.get(request_key(item.fingerprint, attempt))
        text = self.given.get(item.image.image_id, {}).get(item.variant)
        return {"text": text, "finish_reason": None, "refusal": None} if text and attempt == 1 else None

    def _written_from(self, image: ImageRecord) -> list[str]:
        """Return the captions that a text must be related to: none for a text that was written from the image."""
        given = (self.given or {}).get(image.image_id, {})
        return [] if given.get(WRITTEN_FROM) == "image" else image.captions

    def apply_gates(self) -> Counter[tuple[str, str]]:
        """Pass all replies through the gates, first attempts first.

        Returns:
            Number of replies that failed each gate, by (variant, gate).
        """
        failures: Counter[tuple[str, str]] = Counter()
        seen = {variant: quality.NearDuplicates() for variant in self.settings.prompts}
        for item in self.items:
            item.accepted, item.tried, item.reasons, item.out_of_tokens = 0, 0, (), False
        for attempt in range(1, self.settings.attempts + 1):
            for item in self.items:
                if item.accepted or item.tried != attempt - 1 or (reply := self._reply(item, attempt)) is None:
                    continue
                item.tried = attempt
                item.out_of_tokens = all_thinking(reply)
                reasons = quality.problems(reply, self.settings.accepted[item.variant], self._written_from(item.image))
                if not reasons and not seen[item.variant].add(quality.clean(reply["text"])):
                    reasons = ["near_duplicate"]
                failures.update((item.variant, reason) for reason in reasons)
                item.reasons = tuple(reasons)
                if not reasons:
                    item.accepted = attempt
        return failures

    def run(self, ask: Callable[[Iterator[ChatRequest], int], Outcome]) -> Counter[tuple[str, str]]:
        """Send requests until every item is accepted or out of attempts.

        An error or limit that ends this early is kept in `error` or `stopped`, to be raised after `write`.

        Args:
            ask: function that takes the requests of a round and their number.

        Returns:
            As `apply_gates`.
        """
        failures = self.apply_gates()
        given_up: set[str] = set()
        try:
            for _ in range(self.settings.attempts):
                missing = [item for item in self.missing() if self._next_key(item) not in given_up]
                if not missing:
                    break
                outcome = ask((self.request(item) for item in missing), len(missing))
                self.unanswered |= outcome.unanswered
                given_up |= outcome.given_up
                self.stopped, self.error = outcome.stopped, outcome.error
                failures = self.apply_gates()
                if self.stopped or self.error:
                    break
        except (InputError, *Interrupt) as error:
            self.error = error
            failures = self.apply_gates()
        return failures

    def incomplete_reason(self, out: Path) -> str | None:
        """Return why another run may accept more texts, or why there is none; None if neither is the case."""
        if self.stopped:
            return f"{self.stopped}: run again with a higher limit to resume"
        if any(self._next_key(item) in self.unanswered for item in self.missing()):
            return f"{out / 'rejected.jsonl'}: some requests had no reply (no_reply): run again to retry them"
        if any(item.accepted for item in self.items) or not self.items:
            return None
        hint = "raise --max-completion-tokens" if any(item.out_of_tokens for item in self.items) else "see its reasons"
        return f"{out / 'rejected.jsonl'}: no description was accepted: {hint}"

    def estimate(self, price: Price | None, batch: bool) -> dict[str, Any]:
        """Estimate the cost of one request for each missing text, as `cost_estimate` returns it."""
        missing = self.missing()
        prompt_tokens = sum(estimate_tokens(self._messages(item.image, item.variant)) for item in missing)
        words = sum(sum(VARIANTS[item.variant].requested.words) / 2 for item in missing)
        return cost_estimate(len(missing), prompt_tokens, words * TOKENS_PER_WORD, price, batch)

    def write(self, out: Path, failures: Counter[tuple[str, str]]) -> dict[str, Any]:
        """Write `descriptions.jsonl`, `rejected.jsonl` and `report.json` atomically.

        Returns:
            Content of the report.
        """
        report = DescriptionReport()
        with atomic_write(out / "descriptions.jsonl") as good, atomic_write(out / "rejected.jsonl") as bad:
            for image_id, items in itertools.groupby(self.items, key=lambda item: item.image.image_id):
                texts = {}
                for item in items:
                    reply = self._reply(item, item.accepted or item.tried)
                    text = quality.clean(reply["text"]) if reply else None
                    if item.accepted:
                        texts[item.variant] = text
                        report.accept(item.variant, text)
                    else:
                        line = self._rejection(item, text)
                        report.reject(item.variant, line["reasons"])
                        bad.write(json_line(line))
                origin = "captions" if self.given is None else self.given.get(image_id, {}).get(WRITTEN_FROM)
                if texts:
                    good.write(json_line({"image_id": image_id} | texts | ({WRITTEN_FROM: origin} if origin else {})))
        settings = self.settings
        content = {
            "model": settings.model,
            "parameters": settings.parameters,
            "prompts_sha256": {
                name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in settings.prompts.items()
            },
            "variants": {name: report.content(name, settings.accepted[name], failures) for name in settings.prompts},
        }
        if self.store is not None:
            content["tokens"] = {"prompt": self.store.prompt_tokens, "completion": self.store.completion_tokens}
        write_json(out / "report.json", content)
        return content

    def _rejection(self, item: Item, text: str | None) -> dict[str, Any]:
        line: dict[str, Any] = {"image_id": item.image.image_id, "variant": item.variant}
        if refused := self.refused.get(item.image.image_id):
            return line | {"reasons": [refused], "captions": item.image.captions}
        reasons = list(item.reasons)
        refusal = None if self.store is None else self.store.refusal(self._next_key(item))
        problem = self.unanswered.get(self._next_key(item))
        if refusal is not None:
            reasons.append(refusal["reason"])
            line["problem"] = refusal["problem"]
        elif item.tried == 0 and problem is not None:
            reasons.append("no_reply")
            line["problem"] = problem
        elif item.tried == 0:
            reasons.append("no_text" if self.given is not None else "not_asked")
        line["reasons"] = reasons
        return line if item.tried == 0 else line | {"attempts": item.tried, "text": text}

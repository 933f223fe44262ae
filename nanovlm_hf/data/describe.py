"""From captions to descriptions by a chat model (section 2.1.2; Prompts 1 and 2 of figure 2).

Every reply goes to `replies.jsonl` first. What is accepted and what is rejected follows from that file alone, so that a
run that was killed ends, when it is started again, as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..chat.prices import BATCH_DISCOUNT, estimate_tokens
from ..chat.replies import ChatRequest, ReplyStore, fingerprint_of
from ..errors import InputError
from ..files import written_whole
from . import quality
from .sources import VARIANTS, Photo, read_text

TOKENS_PER_WORD = 1.35  # of simple English with its punctuation, about
MAX_COMPLETION_TOKENS = {"short": 120, "long": 300}


def packaged_prompt(variant: str) -> str:
    """Prompt 1 (`short`) or Prompt 2 (`long`) in the paper's wording."""
    return files("nanovlm_hf.data").joinpath(f"prompts/{variant}.txt").read_text(encoding="utf-8").strip()


def messages_of(prompt: str, captions: list[str]) -> list[dict[str, Any]]:
    """What is sent for a photo: the prompt and all its captions, numbered (section 2.1.2)."""
    numbered = "\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, start=1))
    return [{"role": "user", "content": f"{prompt}\n\nCaptions:\n{numbered}"}]


@dataclass(frozen=True)
class DescribeSettings:
    """What is asked and what is accepted.

    Attributes:
        model: the chat model's name.
        prompts: by variant; its keys are the variants to write.
        bands: accepted numbers of words and sentences, by variant.
        parameters: sampling parameters beside the length.
        max_completion_tokens: of a reply, by variant.
        attempts: how often a photo is asked for until a text passes the gates.
    """

    model: str
    prompts: dict[str, str]
    bands: dict[str, quality.Band] = field(default_factory=lambda: dict(quality.ACCEPTED))
    parameters: dict[str, Any] = field(default_factory=dict)
    max_completion_tokens: dict[str, int] = field(default_factory=lambda: dict(MAX_COMPLETION_TOKENS))
    attempts: int = 3


@dataclass(slots=True)
class Item:
    """One text to be written: a photo in a variant, and how it stands."""

    photo: Photo
    variant: str
    fingerprint: str
    accepted: int = 0  # the attempt whose text was good
    tried: int = 0  # attempts with a reply
    reasons: tuple[str, ...] = ()  # why the last one was not good


class Describer:
    """The texts of a set of photos, as far as their replies are there.

    Args:
        photos: with their captions.
        settings: what to ask and accept.
        store: the replies; None where the texts are `given`.
        given: texts that exist already, by image id and variant, instead of replies.
    """

    def __init__(
        self,
        photos: list[Photo],
        settings: DescribeSettings,
        store: ReplyStore | None,
        given: dict[int, dict[str, str]] | None = None,
    ):
        self.settings, self.store, self.given = settings, store, given
        self.unanswered: dict[str, str] = {}
        self.stopped: str | None = None
        self.refused: dict[int, str] = {}
        self.items = [
            Item(photo, variant, self._fingerprint(photo, variant))
            for photo in photos
            for variant in VARIANTS
            if variant in settings.prompts
        ]
        if given is None:
            self._refuse_captions(photos)

    def _refuse_captions(self, photos: list[Photo]) -> None:
        for photo in photos:
            if not photo.captions:
                self.refused[photo.image_id] = "no_captions"
            elif quality.language(" ".join(photo.captions)) != "en":
                self.refused[photo.image_id] = "captions_language"

    def _parameters(self, variant: str) -> dict[str, Any]:
        return self.settings.parameters | {"max_completion_tokens": self.settings.max_completion_tokens[variant]}

    def _messages(self, photo: Photo, variant: str) -> list[dict[str, Any]]:
        return messages_of(self.settings.prompts[variant], photo.captions)

    def _fingerprint(self, photo: Photo, variant: str) -> str:
        return fingerprint_of(self.settings.model, self._parameters(variant), self._messages(photo, variant))

    def missing(self) -> list[Item]:
        """The items to ask for now: not good yet, and with attempts left."""
        if self.given is not None:
            return []
        return [
            item
            for item in self.items
            if not item.accepted and item.tried < self.settings.attempts and item.photo.image_id not in self.refused
        ]

    def request(self, item: Item) -> ChatRequest:
        """The next request for an item."""
        return ChatRequest(
            item.fingerprint,
            item.tried + 1,
            self._messages(item.photo, item.variant),
            self._parameters(item.variant),
            {"image_id": item.photo.image_id, "variant": item.variant},
        )

    def _reply(self, item: Item, attempt: int) -> dict[str, Any] | None:
        if self.given is None:
            return self.store.get(f"{item.fingerprint}-{attempt}")
        text = self.given.get(item.photo.image_id, {}).get(item.variant)
        return {"text": text, "finish_reason": None, "refusal": None} if text and attempt == 1 else None

    def judge(self) -> Counter[tuple[str, str]]:
        """Passes all replies through the gates, from the first attempts to the last.

        Returns:
            How many replies failed each gate, by (variant, gate).
        """
        failures: Counter[tuple[str, str]] = Counter()
        seen = {variant: quality.NearDuplicates() for variant in self.settings.prompts}
        for item in self.items:
            item.accepted, item.tried, item.reasons = 0, 0, ()
        for attempt in range(1, self.settings.attempts + 1):
            for item in self.items:
                if item.accepted or item.tried != attempt - 1 or (reply := self._reply(item, attempt)) is None:
                    continue
                item.tried = attempt
                reasons = quality.problems(reply, self.settings.bands[item.variant])
                if not reasons and not seen[item.variant].add(quality.clean(reply["text"])):
                    reasons = ["near_duplicate"]
                failures.update((item.variant, reason) for reason in reasons)
                item.reasons = tuple(reasons)
                if not reasons:
                    item.accepted = attempt
        return failures

    def run(self, ask: Callable[[Iterator[ChatRequest], int], Any]) -> Counter[tuple[str, str]]:
        """Asks until every item is good or out of attempts.

        Args:
            ask: takes the requests of a round and their number, and returns an `Outcome`.
        """
        failures = self.judge()
        for _ in range(self.settings.attempts):
            missing = self.missing()
            if not missing:
                break
            outcome = ask((self.request(item) for item in missing), len(missing))
            self.unanswered = outcome.unanswered
            self.stopped = outcome.stopped
            failures = self.judge()
            if self.stopped:
                break
        return failures

    def estimate(self, price: Any, batch: bool) -> dict[str, Any]:
        """Calls, tokens and US dollars of asking once for what is missing; tokens are estimated from the bytes."""
        missing = self.missing()
        prompt_tokens = sum(estimate_tokens(self._messages(item.photo, item.variant)) for item in missing)
        completion_tokens = 0.0
        for item in missing:
            completion_tokens += sum(quality.PROMPT_RANGE[item.variant].words) / 2 * TOKENS_PER_WORD
        cost = None
        if price is not None:
            cost = price.cost(prompt_tokens, completion_tokens) * (BATCH_DISCOUNT if batch else 1.0)
        return {
            "calls": len(missing),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": round(completion_tokens),
            "cost": cost,
        }

    def write(self, out: Path, failures: Counter[tuple[str, str]]) -> dict[str, Any]:
        """Writes `descriptions.jsonl`, `rejected.jsonl` and `report.json`, each aside and then renamed.

        Returns:
            The report.
        """
        report = _Report(self.settings)
        with written_whole(out / "descriptions.jsonl") as good, written_whole(out / "rejected.jsonl") as bad:
            for photo, items in _by_photo(self.items):
                texts = {}
                for item in items:
                    reply = self._reply(item, item.accepted or item.tried)
                    text = quality.clean(reply["text"]) if reply else None
                    if item.accepted:
                        texts[item.variant] = text
                        report.accepted(item.variant, text)
                    else:
                        line = self._rejection(item, text)
                        report.rejected(item.variant, line["reasons"])
                        bad.write(_json_line(line))
                if texts:
                    good.write(_json_line({"image_id": photo.image_id} | texts))
        content = report.content(failures)
        if self.store is not None:
            content["tokens"] = {"prompt": self.store.prompt_tokens, "completion": self.store.completion_tokens}
        with written_whole(out / "report.json") as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        return content

    def _rejection(self, item: Item, text: str | None) -> dict[str, Any]:
        line: dict[str, Any] = {"image_id": item.photo.image_id, "variant": item.variant}
        refused = self.refused.get(item.photo.image_id)
        problem = self.unanswered.get(f"{item.fingerprint}-{item.tried + 1}")
        if refused:
            return line | {"reasons": [refused], "captions": item.photo.captions}
        if problem is not None and item.tried == 0:
            return line | {"reasons": ["no_reply"], "problem": problem}
        if item.tried == 0:
            return line | {"reasons": ["no_text" if self.given is not None else "not_asked"]}
        return line | {"reasons": list(item.reasons), "attempts": item.tried, "text": text}


class _Report:
    """Counts what is accepted and rejected, and how the accepted texts are made."""

    def __init__(self, settings: DescribeSettings):
        self.settings = settings
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)

    def accepted(self, variant: str, text: str) -> None:
        found = quality.words(text)
        low, high = quality.PROMPT_RANGE[variant].words
        counts = self.counts[variant]
        counts["accepted"] += 1
        counts["words"] += len(found)
        counts["easy_words"] += sum(map(quality.is_easy, found))
        counts["sentences"] += quality.count_sentences(text)
        counts["in_prompt_range"] += low <= len(found) <= high

    def rejected(self, variant: str, reasons: list[str]) -> None:
        self.counts[variant]["rejected"] += 1
        self.reasons[variant].update(reasons)

    def content(self, failures: Counter[tuple[str, str]]) -> dict[str, Any]:
        variants = {}
        for variant in self.settings.prompts:
            counts = self.counts[variant]
            accepted = counts["accepted"]
            band = self.settings.bands[variant]
            variants[variant] = {
                "accepted": accepted,
                "rejected": counts["rejected"],
                "rejected_for": dict(self.reasons[variant].most_common()),
                "replies_failing": {gate: count for (name, gate), count in sorted(failures.items()) if name == variant},
                "accepted_words": list(band.words),
                "accepted_sentences": list(band.sentences),
                "mean_words": round(counts["words"] / accepted, 2) if accepted else None,
                "mean_sentences": round(counts["sentences"] / accepted, 2) if accepted else None,
                "share_in_prompt_range": round(counts["in_prompt_range"] / accepted, 4) if accepted else None,
                "share_outside_child_vocabulary": (
                    round(1 - counts["easy_words"] / counts["words"], 4) if counts["words"] else None
                ),
            }
        settings = self.settings
        prompts = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in settings.prompts.items()}
        return {
            "model": settings.model,
            "parameters": settings.parameters,
            "prompts_sha256": prompts,
            "variants": variants,
        }


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _by_photo(items: list[Item]) -> Iterator[tuple[Photo, list[Item]]]:
    group: list[Item] = []
    for item in items:
        if group and item.photo is not group[0].photo:
            yield group[0].photo, group
            group = []
        group.append(item)
    if group:
        yield group[0].photo, group


def read_prompt(path: str | Path) -> str:
    """A prompt of the user's own.

    Raises:
        InputError: if it cannot be read or is empty.
    """
    text = read_text(path).strip()
    if not text:
        raise InputError(f"{path}: the prompt is empty")
    return text

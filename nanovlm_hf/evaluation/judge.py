"""A chat model grades completions (section 3, Prompt 3): grammar, creativity, consistency, meaningfulness and plot.

Replies go to `replies.jsonl` first, and every grade follows from that file alone. A reply that is no grade is asked for
again; a completion that never got one has no score, and counts nowhere.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from ..chat.prices import BATCH_DISCOUNT, Price, estimate_tokens
from ..chat.replies import ChatRequest, ReplyStore, fingerprint_of
from .completions import Row
from .intervals import bootstrap

CRITERIA = ("grammar", "creativity", "consistency", "meaningfulness", "plot")  # as Table 3 has them
HIGHEST = 10
COMPLETION_TOKENS = 40  # of a reply, about
MOST_COMPLETION_TOKENS = 200
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "grades",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {name: {"type": "integer", "minimum": 0, "maximum": HIGHEST} for name in CRITERIA},
            "required": list(CRITERIA),
            "additionalProperties": False,
        },
    },
}


def paper_prompt() -> str:
    """Prompt 3 of figure 2, in the paper's wording."""
    return files("nanovlm_hf.evaluation").joinpath("facts/judge_prompt.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, and how.

    Attributes:
        model: the chat model's name.
        prompt: Prompt 3, or one of the user's own.
        parameters: sampling parameters (`temperature`).
        repeats: grades for each completion.
        attempts: replies that are asked for until one is a grade.
    """

    model: str
    prompt: str = field(default_factory=paper_prompt)
    parameters: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1
    attempts: int = 3


def parse_grades(reply: dict[str, Any]) -> dict[str, int]:
    """The five grades of a reply.

    Raises:
        ValueError: if they are not there, or one is no whole number of 0 to 10.
    """
    if reply["refusal"]:
        raise ValueError("refused")
    if reply["finish_reason"] == "length":
        raise ValueError("cut short")
    try:
        content = json.loads(reply["text"])
    except ValueError:
        raise ValueError("no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("no grades")
    grades = {}
    for name in CRITERIA:
        value = content.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer():
            raise ValueError(f"{name} is no whole number: {value!r}")
        if not 0 <= value <= HIGHEST:
            raise ValueError(f"{name} is out of range: {value!r}")
        grades[name] = int(value)
    return grades


@dataclass(slots=True)
class _Grading:
    row: Row
    repeat: int
    fingerprint: str
    grades: dict[str, int] | None = None
    tried: int = 0
    problem: str = "not asked"


class Judge:
    """Grades of completions, as far as their replies are there.

    Args:
        rows: to grade.
        settings: who judges.
        store: the replies.
        images: by item id, to show the judge the photos as well (beyond the paper).
    """

    def __init__(
        self, rows: list[Row], settings: JudgeSettings, store: ReplyStore, images: dict[str, Image.Image] | None = None
    ):
        self.rows, self.settings, self.store, self.images = rows, settings, store, images
        self.stopped: str | None = None
        self.gradings = [
            _Grading(row, repeat, self._fingerprint(row, repeat)) for row in rows for repeat in range(settings.repeats)
        ]

    def _parameters(self) -> dict[str, Any]:
        return self.settings.parameters | {"response_format": SCHEMA, "max_completion_tokens": MOST_COMPLETION_TOKENS}

    def _messages(self, row: Row) -> list[dict[str, Any]]:
        text = f"{self.settings.prompt}\n\nText's beginning: {row.prefix}\n\nCompleted text: {row.text}"
        if self.images is None:
            return [{"role": "user", "content": text}]
        buffer = io.BytesIO()
        self.images[row.item_id].save(buffer, "JPEG", quality=90)
        url = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return [
            {
                "role": "user",
                "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}],
            }
        ]

    def _fingerprint(self, row: Row, repeat: int) -> str:
        return fingerprint_of(self.settings.model, self._parameters() | {"repeat": repeat}, self._messages(row))

    def read(self) -> None:
        """Takes the grades out of the replies that are there."""
        for grading in self.gradings:
            grading.grades, grading.tried = None, 0
            while grading.grades is None and grading.tried < self.settings.attempts:
                reply = self.store.get(f"{grading.fingerprint}-{grading.tried + 1}")
                if reply is None:
                    break
                grading.tried += 1
                try:
                    grading.grades = parse_grades(reply)
                except ValueError as error:
                    grading.problem = str(error)

    def missing(self) -> list[_Grading]:
        """What to ask for now."""
        # The same words of one item by two models are one question.
        wanted = {one.fingerprint: one for one in self.gradings if one.grades is None}
        return [one for one in wanted.values() if one.tried < self.settings.attempts]

    def _request(self, grading: _Grading) -> ChatRequest:
        return ChatRequest(
            grading.fingerprint,
            grading.tried + 1,
            self._messages(grading.row),
            self._parameters(),
            {"item_id": grading.row.item_id, "model_judged": grading.row.model, "repeat": grading.repeat},
        )

    def run(self, ask: Callable[[Iterator[ChatRequest], int], Any]) -> None:
        """Asks until every completion is graded or out of attempts.

        Args:
            ask: takes the requests of a round and their number, and returns an `Outcome`.
        """
        self.read()
        for _ in range(self.settings.attempts):
            missing = self.missing()
            if not missing or self.stopped:
                break
            outcome = ask(map(self._request, missing), len(missing))
            self.stopped = outcome.stopped
            self.read()
            for grading in self.gradings:
                key = f"{grading.fingerprint}-{grading.tried + 1}"
                grading.problem = outcome.unanswered.get(key, grading.problem)

    def complaint(self) -> str | None:
        """Why grades are missing that another run may get, in one line; None if there are none."""
        if self.stopped:
            return f"{self.stopped}: run again with more, and it goes on from here"
        unanswered = [one.problem for one in self.gradings if one.grades is None and one.tried < self.settings.attempts]
        if unanswered:
            return f"judge: {len(unanswered)} grades are missing ({unanswered[0]}): run again to ask for them"
        return None

    def estimate(self, price: Price | None, batch: bool = False) -> dict[str, Any]:
        """Calls, tokens and US dollars of asking once for what is missing; tokens are estimated from the bytes."""
        self.read()
        missing = self.missing()
        prompt_tokens = sum(estimate_tokens(self._messages(grading.row)) for grading in missing)
        completion_tokens = COMPLETION_TOKENS * len(missing)
        share = BATCH_DISCOUNT if batch else 1.0
        cost = None if price is None else share * price.cost(prompt_tokens, completion_tokens)
        return {
            "calls": len(missing),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cost": cost,
        }

    def lines(self) -> list[dict[str, Any]]:
        """Each completion with the means of its repeats; `missing` says why there is none."""
        found: list[dict[str, Any]] = []
        repeats = self.settings.repeats
        for place, row in enumerate(self.rows):
            gradings = self.gradings[place * repeats : (place + 1) * repeats]
            grades = [one.grades for one in gradings if one.grades is not None]
            line: dict[str, Any] = {"item_id": row.item_id, "model": row.model, "graded": len(grades)}
            if grades:
                scores = {name: float(np.mean([one[name] for one in grades])) for name in CRITERIA}
                line |= {"scores": scores, "total": sum(scores.values())}
            else:
                line |= {"scores": None, "total": None, "missing": gradings[0].problem}
            found.append(line)
        return found

    def summary(self) -> dict[str, Any]:
        """Who judged and when, and for each model the mean of each criterion and of the total, with intervals."""
        lines = self.lines()
        models = {}
        for model in dict.fromkeys(row.model for row in self.rows):
            graded = [line for line in lines if line["model"] == model and line["scores"] is not None]
            scores = {name: bootstrap([line["scores"][name] for line in graded]) for name in CRITERIA}
            models[model] = {
                "scores": scores,
                "total": bootstrap([line["total"] for line in graded]),
                "missing": sum(line["model"] == model for line in lines) - len(graded),
            }
        replies = [self.store.get(f"{one.fingerprint}-{one.tried}") for one in self.gradings if one.tried]
        return {
            "judge": self.settings.model,
            "judge_model": sorted({reply["model"] for reply in replies if reply["model"]}),
            "dates": [min(times)[:10], max(times)[:10]] if (times := [reply["time"] for reply in replies]) else [],
            "prompt_sha256": hashlib.sha256(self.settings.prompt.encode()).hexdigest()[:16],
            "paper_prompt": self.settings.prompt == paper_prompt(),
            "parameters": self.settings.parameters,
            "repeats": self.settings.repeats,
            "sees_the_photo": self.images is not None,
            "models": models,
        }

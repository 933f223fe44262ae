"""LLM judge: a chat model grades completions on the criteria of `CRITERIA` (section 3, Prompt 3).

Replies are written to `replies.jsonl` first, and all grades are read from that file. A reply without valid grades is
requested again; a completion that never gets grades is recorded as missing and does not count.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from ..chat.answers import all_thinking
from ..chat.journal import request_key
from ..chat.prices import Price, cost_estimate, estimate_tokens
from ..chat.replies import ChatRequest, ReplyStore, fingerprint_of
from ..chat.untrusted import data_note, delimited, instruction_in
from ..data_uri import data_uri
from ..errors import InputError, Interrupt
from .assets import read_asset
from .completions import Row
from .grades import read_grades
from .intervals import bootstrap

CRITERIA = ("grammar", "creativity", "consistency", "meaningfulness", "plot")  # Table 3
HIGHEST = 10
Grade = Annotated[float, Field(ge=0, le=HIGHEST, allow_inf_nan=False, strict=True)]  # in a file
_FLAG = ("item_id", "model", "total", "flagged")
COMPLETION_TOKENS = 40  # of a typical reply
MAX_COMPLETION_TOKENS = 200


def highest_total() -> int:
    """Return the highest total: 50 with the paper's five criteria."""
    return HIGHEST * len(CRITERIA)


def response_format() -> dict[str, Any]:
    """Return the JSON schema of a reply: a whole number for each criterion."""
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer", "minimum": 0, "maximum": HIGHEST} for name in CRITERIA},
        "required": list(CRITERIA),
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "grades", "strict": True, "schema": schema}}


@functools.cache
def paper_prompt() -> str:
    """Return Prompt 3 of figure 2, in the paper's wording."""
    return read_asset("judge_prompt.txt").strip()


@dataclass(frozen=True)
class JudgeSettings:
    """The judge and how it is asked.

    Attributes:
        model: name of the chat model.
        prompt: Prompt 3, or the user's own; with the latter, the texts are delimited and declared as data (beyond the
            paper).
        parameters: sampling parameters, such as `temperature`.
        repeats: how often each completion is graded.
        attempts: maximum number of requests until a reply has valid grades.
        max_completion_tokens: maximum length of a reply; reasoning models need more.
    """

    model: str
    prompt: str = field(default_factory=paper_prompt)
    parameters: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1
    attempts: int = 3
    max_completion_tokens: int = MAX_COMPLETION_TOKENS


def parse_grades(reply: dict[str, Any]) -> dict[str, int]:
    """Return the grades of a reply, by criterion.

    Raises:
        ValueError: if they are missing or ambiguous, or one is not a whole number from 0 to 10.
    """
    if reply["refusal"] or reply["finish_reason"] == "content_filter":
        raise ValueError("refused")
    if reply["finish_reason"] == "length":
        raise ValueError("cut short")
    return read_grades(reply["text"] or "", CRITERIA, HIGHEST)


@dataclass(slots=True)
class _Grading:
    row: Row
    repeat: int
    fingerprint: str
    grades: dict[str, int] | None = None
    tried: int = 0
    problem: str = "not requested"
    refused: bool = False  # permanently
    out_of_tokens: bool = False  # the last reply reached the token limit before its text; so would another


def _next_key(grading: _Grading) -> str:
    return request_key(grading.fingerprint, grading.tried + 1)


class Judge:
    """Grades of completions, from the replies that are stored so far.

    Args:
        rows: completions to grade.
        settings: the judge.
        store: the replies.
        images: images by item id that the judge is shown (beyond the paper; the texts are delimited then).

    Attributes:
        stopped: why the requests ended early (`--max-cost`); None if they did not.
        error: the error that ended the requests.
    """

    def __init__(
        self, rows: list[Row], settings: JudgeSettings, store: ReplyStore, images: dict[str, Image.Image] | None = None
    ):
        self.rows, self.settings, self.store, self.images = rows, settings, store, images
        self.stopped: str | None = None
        # The paper's own request stays as it is; beyond the paper, the texts are delimited and declared as data.
        self.delimits = images is not None or settings.prompt != paper_prompt()
        self.error: BaseException | None = None
        self.gradings = [
            _Grading(row, repeat, self._fingerprint(row, repeat)) for row in rows for repeat in range(settings.repeats)
        ]

    def _parameters(self) -> dict[str, Any]:
        return self.settings.parameters | {
            "response_format": response_format(),
            "max_completion_tokens": self.settings.max_completion_tokens,
        }

    def _messages(self, row: Row) -> list[dict[str, Any]]:
        prompt, beginning, completed = self.settings.prompt, row.prefix, row.text
        if self.delimits:
            prompt += f"\n\n{data_note('beginning', 'completed')}"
            beginning, completed = delimited("beginning", beginning), delimited("completed", completed)
        text = f"{prompt}\n\nText's beginning: {beginning}\n\nCompleted text: {completed}"
        if self.images is None:
            return [{"role": "user", "content": text}]
        url = data_uri(self.images[row.item_id], "JPEG", quality=90)
        return [
            {
                "role": "user",
                "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}],
            }
        ]

    def _fingerprint(self, row: Row, repeat: int) -> str:
        return fingerprint_of(self.settings.model, self._parameters() | {"repeat": repeat}, self._messages(row))

    def read(self) -> None:
        """Read the grades from the stored replies."""
        for grading in self.gradings:
            grading.grades, grading.tried, grading.refused, grading.out_of_tokens = None, 0, False, False
            while self._is_open(grading):
                key = _next_key(grading)
                reply = self.store.get(key)
                if reply is None:
                    if (refusal := self.store.refusal(key)) is not None:
                        grading.problem = f"{refusal['reason']} ({refusal['problem']})"
                        grading.refused = key in self.store
                    break
                grading.tried += 1
                grading.out_of_tokens = all_thinking(reply)
                try:
                    grading.grades = parse_grades(reply)
                except ValueError as error:
                    grading.problem = str(error)

    def missing(self) -> list[_Grading]:
        """Return the gradings to request now."""
        # Equal completions of an item by two models are one request.
        return list({one.fingerprint: one for one in self.gradings if self._is_open(one)}.values())

    def _is_open(self, grading: _Grading) -> bool:
        settled = grading.grades is not None or grading.refused or grading.out_of_tokens
        return not settled and grading.tried < self.settings.attempts

    def _request(self, grading: _Grading) -> ChatRequest:
        return ChatRequest(
            grading.fingerprint,
            grading.tried + 1,
            self._messages(grading.row),
            self._parameters(),
            {"item_id": grading.row.item_id, "model_judged": grading.row.model, "repeat": grading.repeat},
        )

    def run(self, ask: Callable[[Iterator[ChatRequest], int], Any]) -> None:
        """Request grades until every completion is graded or out of attempts.

        An early end is recorded in `error` and `stopped`, so that the caller can write the grades before raising it.

        Args:
            ask: sends the requests of a round, given with their number, and returns an `Outcome`.
        """
        self.read()
        given_up: set[str] = set()
        try:
            for _ in range(self.settings.attempts):
                missing = [one for one in self.missing() if _next_key(one) not in given_up]
                if not missing or self.stopped or self.error:
                    break
                outcome = ask(map(self._request, missing), len(missing))
                self.stopped, self.error = outcome.stopped, outcome.error
                given_up |= outcome.given_up
                self.read()
                for grading in self.gradings:
                    grading.problem = outcome.unanswered.get(_next_key(grading), grading.problem)
        except (InputError, *Interrupt) as error:
            self.error = error
            self.read()

    def incomplete_reason(self) -> str | None:
        """Return why grades are missing that another run may get, or why there are none at all; otherwise None."""
        if self.stopped:
            return f"{self.stopped}: raise it and run again to resume"
        if missing := list(filter(self._is_open, self.gradings)):
            return f"judge: {len(missing)} grades are missing ({missing[0].problem}): run again to request them"
        if any(one.grades is not None for one in self.gradings) or not self.gradings:
            return None
        reason = next(iter(self.missing_reasons()))
        hint = ": raise --max-completion-tokens" if any(one.out_of_tokens for one in self.gradings) else ""
        return f"judge: none of {len(self.rows)} completions is graded; most common reason: {reason}{hint}"

    def missing_reasons(self) -> dict[str, int]:
        """Return the number of completions without grades by reason, the most common reason first."""
        return dict(Counter(line["missing"] for line in self.lines() if line["scores"] is None).most_common())

    def estimate(self, price: Price | None, batch: bool = False) -> dict[str, Any]:
        """Estimate the cost of requesting the missing grades once, as `cost_estimate` returns it."""
        self.read()
        missing = self.missing()
        prompt_tokens = sum(estimate_tokens(self._messages(grading.row)) for grading in missing)
        return cost_estimate(len(missing), prompt_tokens, COMPLETION_TOKENS * len(missing), price, batch)

    def lines(self) -> list[dict[str, Any]]:
        """Return each completion with its mean grades over the repeats.

        `missing` is why there are no grades. `flagged` quotes what a text says about grades or instructions, as
        somebody should check whether the judge followed it.
        """
        found: list[dict[str, Any]] = []
        repeats = self.settings.repeats
        for index, row in enumerate(self.rows):
            gradings = self.gradings[index * repeats : (index + 1) * repeats]
            grades = [one.grades for one in gradings if one.grades is not None]
            line: dict[str, Any] = {"item_id": row.item_id, "model": row.model, "graded": len(grades)}
            if grades:
                scores = {name: float(np.mean([one[name] for one in grades])) for name in CRITERIA}
                line |= {"scores": scores, "total": sum(scores.values())}
            else:
                line |= {"scores": None, "total": None, "missing": gradings[0].problem}
            if flagged := instruction_in(f"{row.prefix}\n{row.text}"):
                line["flagged"] = flagged
            found.append(line)
        return found

    def summary(self) -> dict[str, Any]:
        """Return the judge, the dates, and each model's means of every criterion and of the total, with intervals."""
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
        replies = [self.store.get(request_key(one.fingerprint, one.tried)) for one in self.gradings if one.tried]
        return {
            "judge": self.settings.model,
            "judge_model": sorted({reply["model"] for reply in replies if reply["model"]}),
            "dates": [min(times)[:10], max(times)[:10]] if (times := [reply["time"] for reply in replies]) else [],
            "prompt_sha256": hashlib.sha256(self.settings.prompt.encode()).hexdigest()[:16],
            "paper_prompt": self.settings.prompt == paper_prompt(),
            "texts_delimited": self.delimits,
            "parameters": self.settings.parameters,
            "repeats": self.settings.repeats,
            "sees_the_photo": self.images is not None,
            "highest_total": highest_total(),
            "missing_reasons": self.missing_reasons(),
            "flagged": [{name: line[name] for name in _FLAG} for line in lines if "flagged" in line],
            "models": models,
        }

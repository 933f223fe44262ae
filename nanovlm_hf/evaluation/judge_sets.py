"""The LLM judge as a step of an evaluation."""

from __future__ import annotations

from typing import Any

from ..chat.replies import ReplyStore
from ..chat.terminal import make_request_fn
from ..errors import InputError
from .item_sets import ItemSet
from .judge import Judge
from .settings import EvaluationSettings


def judge_sets(settings: EvaluationSettings, sets: list[ItemSet], results: dict[str, Any]) -> BaseException | None:
    """Add the judge's grades of every set to the results.

    Returns:
        The error that ended the requests, or one that says why grades are missing; None if there is neither.
    """
    error: BaseException | None = None
    incomplete: str | None = None
    with ReplyStore(settings.out / "judge") as store:
        for one in sets:
            rows = [row for own in one.rows.values() for row in own]
            images = {item.item_id: item.image for item in one.items} if settings.judge_sees_image else None
            judge = Judge(rows, settings.judge, store, images)
            if error is None:
                judge.run(make_request_fn(settings.endpoint, store))
            else:
                judge.read()  # no more requests, but the replies of earlier runs still count
            error, incomplete = error or judge.error, incomplete or judge.incomplete_reason()
            lines = judge.lines()
            if error is None or any(line["graded"] for line in lines):
                results["sets"][one.name]["judge"] = judge.summary() | {"lines": lines}
    return error or (None if incomplete is None else InputError(incomplete))

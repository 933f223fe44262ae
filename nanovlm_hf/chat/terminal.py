"""Asking at the terminal: progress, and what it would cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .client import Endpoint
from .replies import ReplyStore


def asker(endpoint: Endpoint, store: ReplyStore, batch: bool = False, poll_seconds: float = 30.0) -> Callable[..., Any]:
    """A function that asks a round of requests, given with their number, under a progress bar."""
    from tqdm import tqdm

    from .batch import ask_all_in_batches
    from .client import ask_all

    def ask(requests: Any, total: int) -> Any:
        with tqdm(total=total, unit="reply", mininterval=0.5, smoothing=0.05) as bar:

            def progress(cost: float | None) -> None:
                if cost is not None:
                    bar.set_postfix_str(f"${cost:.2f}", refresh=False)
                bar.update()

            def say(line: str) -> None:
                bar.write(line, file=sys.stderr)

            if batch:
                return ask_all_in_batches(endpoint, requests, store, progress, say, poll_seconds)
            return ask_all(endpoint, requests, store, progress)

    return ask


def print_estimate(estimate: dict[str, Any], endpoint: Endpoint) -> None:
    """Prints calls, tokens and US dollars."""
    cost = estimate["cost"]
    print(f"{estimate['calls']} calls of {endpoint.model} at {endpoint.base_url}")
    print(f"about {estimate['prompt_tokens']:,} tokens in and {estimate['completion_tokens']:,} out")
    print("price unknown: add --price INPUT OUTPUT" if cost is None else f"about ${cost:.2f}")

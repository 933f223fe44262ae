"""Send requests with a progress bar, and print cost estimates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..errors import scrub
from .endpoint import Endpoint
from .replies import ReplyStore


def make_request_fn(
    endpoint: Endpoint, store: ReplyStore, batch: bool = False, poll_seconds: float = 30.0
) -> Callable[..., Any]:
    """Return a function that sends a round of requests under a progress bar.

    The function takes the requests and their number, and returns an `Outcome`.

    Args:
        endpoint: that the requests are sent to.
        store: of the replies.
        batch: use the Batch API.
        poll_seconds: between two polls of a batch's status.

    Raises:
        InputError: by the function, if single requests are to be sent while a batch in the store's folder is pending.
    """
    from tqdm import tqdm

    from .batch_jobs import refuse_pending
    from .client import ask_all

    def ask(requests: Any, total: int) -> Any:
        if not batch:
            refuse_pending(store.path.parent)
        with tqdm(total=total, unit="reply", mininterval=0.5, smoothing=0.05) as bar:

            def progress(cost: float | None) -> None:
                if cost is not None:
                    bar.set_postfix_str(f"${cost:.2f}", refresh=False)
                bar.update()

            def say(line: str) -> None:
                bar.write(scrub(line), file=sys.stderr)

            if batch:
                from .batch import ask_all_in_batches

                return ask_all_in_batches(endpoint, requests, store, progress, say, poll_seconds)
            return ask_all(endpoint, requests, store, progress, say)

    return ask


def print_estimate(estimate: dict[str, Any], endpoint: Endpoint) -> None:
    """Print the number of calls and tokens, and the cost in US dollars."""
    cost = estimate["cost"]
    print(f"{estimate['calls']} calls of {scrub(endpoint.model)} at {endpoint.address}")
    print(f"about {estimate['prompt_tokens']:,} input and {estimate['completion_tokens']:,} output tokens")
    print("price unknown: add --price INPUT OUTPUT" if cost is None else f"about ${cost:.2f}")

"""Prices of tokens, and estimates of their number.

Price tables of packages (`litellm`, `genai-prices`) go out of date as well, and a tokenizer (`tiktoken`) fits one
vendor's models: prices of other models are given by the user, and the endpoint's own counts replace estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

# OpenAI's prices in US dollars per million input and output tokens.
LISTED = {
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
}
BATCH_DISCOUNT = 0.5
BYTES_PER_TOKEN = 4  # approximately, for English
TOKENS_PER_MESSAGE = 4
TOKENS_PER_IMAGE = 255  # for 224 x 224, as counted by gpt-4o: 85 and one tile of 170
UNLIMITED = 4096  # assumed tokens of a reply without a limit: more than any accepted reply


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return the cost in US dollars."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


def price_of(model: str, given: tuple[float, float] | None = None) -> Price | None:
    """Return the given price, else OpenAI's price of a listed model, else None.

    Raises:
        UsageError: if a given price is not a positive number.
    """
    known = given or LISTED.get(model)
    if known is None:
        return None
    if not all(math.isfinite(part) and part > 0 for part in known):
        raise UsageError(
            f"--price {known[0]:g} {known[1]:g}: both must be positive numbers; omit the option for a free model"
        )
    return Price(*known)


def estimate_tokens(messages: list[dict[str, Any]]) -> int:
    """Estimate the number of tokens of messages from their number of bytes."""
    return round(sum(_tokens_of(message["content"]) + TOKENS_PER_MESSAGE for message in messages))


def cost_estimate(
    calls: int, prompt_tokens: int, completion_tokens: float, price: Price | None, batch: bool = False
) -> dict[str, Any]:
    """Return `calls`, `prompt_tokens`, `completion_tokens` and `cost` in US dollars (None without a price).

    Args:
        batch: whether the Batch API is used, at a lower price.
    """
    share = BATCH_DISCOUNT if batch else 1.0
    return {
        "calls": calls,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": round(completion_tokens),
        "cost": None if price is None else share * price.cost(prompt_tokens, completion_tokens),
    }


def most_tokens(messages: list[dict[str, Any]], parameters: dict[str, Any]) -> tuple[int, int]:
    """Return the maximum number of input tokens (a generous estimate) and of output tokens of a request."""
    return 2 * estimate_tokens(messages), token_limit(parameters)


def token_limit(parameters: dict[str, Any]) -> int:
    """Return the maximum number of tokens of a reply from the parameters of its request."""
    limit = parameters.get("max_completion_tokens") or parameters.get("max_tokens")
    return limit if isinstance(limit, int) and limit > 0 else UNLIMITED


def is_plausible(tokens: int | None, *contents: str | list[dict[str, Any]]) -> bool:
    """Return whether a reported number of tokens is at least half of what texts of this length have.

    Images do not count, as their number of tokens varies between models.
    """
    texts = [content for content in contents if isinstance(content, str)]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    texts += [part["text"] for part in parts if part["type"] != "image_url"]
    return tokens is not None and tokens >= sum(map(_tokens_of, texts)) / 2


def estimate_reply(reply: dict[str, Any], parameters: dict[str, Any]) -> int:
    """Estimate the number of tokens of a reply; the limit if the reply reached it."""
    if reply["finish_reason"] == "length":
        return token_limit(parameters)
    return math.ceil(_tokens_of(reply["text"] + (reply["refusal"] or "")))


def _tokens_of(content: str | list[dict[str, Any]]) -> float:
    if isinstance(content, str):
        return len(content.encode(errors="replace")) / BYTES_PER_TOKEN
    return sum(TOKENS_PER_IMAGE if part["type"] == "image_url" else _tokens_of(part["text"]) for part in content)

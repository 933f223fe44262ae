"""What tokens cost, and how many a text has before anybody has counted them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# US dollars for a million tokens of input and of output, as OpenAI lists them. Another model's are given by the user.
LISTED = {
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
}
BATCH_DISCOUNT = 0.5
BYTES_PER_TOKEN = 4  # of English, about; the endpoint's own count replaces it in every reply
TOKENS_PER_MESSAGE = 4
TOKENS_PER_PICTURE = 255  # of 224 x 224, as gpt-4o counts them: 85 and one tile of 170


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """US dollars for a request."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


def price_of(model: str, given: tuple[float, float] | None = None) -> Price | None:
    """The price that was given, or OpenAI's for a model that is listed."""
    known = given or LISTED.get(model)
    return None if known is None else Price(*known)


def estimate_tokens(messages: list[dict[str, Any]]) -> int:
    """About how many tokens the messages have: a quarter of their bytes, and a few for each message."""
    return round(sum(_tokens_of(message["content"]) + TOKENS_PER_MESSAGE for message in messages))


def _tokens_of(content: str | list[dict[str, Any]]) -> float:
    if isinstance(content, str):
        return len(content.encode()) / BYTES_PER_TOKEN
    return sum(TOKENS_PER_PICTURE if part["type"] == "image_url" else _tokens_of(part["text"]) for part in content)

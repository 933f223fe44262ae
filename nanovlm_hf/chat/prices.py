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


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """US dollars for a request."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


def estimate_tokens(messages: list[dict[str, Any]]) -> int:
    """About how many tokens the messages have: a quarter of their bytes, and a few for each message."""
    sizes = (len(str(message["content"]).encode()) / BYTES_PER_TOKEN + TOKENS_PER_MESSAGE for message in messages)
    return round(sum(sizes))

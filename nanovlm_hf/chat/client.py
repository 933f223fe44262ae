"""Asking many requests at once: bounded in number, in time and in money, and patient with a busy endpoint.

The `openai` package sends and parses. Its own retries are switched off because a whole pool of requests has to wait
when one of them is told to, and because a body that is no JSON is worth another try here as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion

from ..errors import InputError, UsageError, first_line
from .prices import Price, estimate_tokens
from .replies import ChatRequest, ReplyStore

OPENAI_BASE_URL = "https://api.openai.com/v1"
LONGEST_PAUSE = 60.0  # seconds between two tries
RATE_LIMIT_PATIENCE = 900.0  # seconds that a request waits because the endpoint says so
GIVE_UP_AFTER = 5  # requests in a row of which no try was answered: then the endpoint is down, not a request unlucky


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how patiently.

    Attributes:
        model: its name at the endpoint.
        base_url: of an OpenAI-compatible API; `OPENAI_BASE_URL` or OpenAI's own if not given.
        concurrency: requests under way at a time.
        timeout: seconds that one try may take.
        tries: how often a request is sent before it counts as unanswered.
        price: what its tokens cost, or None where nobody said.
        max_cost: US dollars that all replies in the folder together may cost.
    """

    model: str
    base_url: str = field(default_factory=lambda: os.environ.get("OPENAI_BASE_URL") or OPENAI_BASE_URL)
    concurrency: int = 16
    timeout: float = 60.0
    tries: int = 6
    price: Price | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise UsageError(f"--base-url {self.base_url}: it must begin with http:// or https://")
        if self.max_cost is not None and self.price is None:
            raise UsageError(f"--max-cost: the price of {self.model} is not known: add --price INPUT OUTPUT")

    @property
    def api_key(self) -> str:
        """`OPENAI_API_KEY`; other endpoints than OpenAI's may need none.

        Raises:
            UsageError: if there is none and OpenAI is asked.
        """
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key and urlsplit(self.base_url).hostname == urlsplit(OPENAI_BASE_URL).hostname:
            raise UsageError("OPENAI_API_KEY is not set: export it, or name another endpoint with --base-url")
        return key or "none"


def most_tokens(messages: list[dict[str, Any]], parameters: dict[str, Any]) -> tuple[int, int]:
    """What a request may use at most: tokens in, about and rather too many, and tokens out."""
    # 4,096 where the user lifted the limit: more than any reply that would be kept.
    return 2 * estimate_tokens(messages), parameters.get("max_completion_tokens") or 4096


@dataclass
class Outcome:
    """What became of a run of requests.

    Attributes:
        unanswered: why a request has no reply, by its key, for those that were tried.
        stopped: why the rest was not tried, or None.
        retries: tries beyond the first.
    """

    unanswered: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    retries: int = 0


class EndpointError(InputError):
    """The endpoint cannot serve any request: a wrong key, an unknown model, no answer at all."""


def ask_all(
    endpoint: Endpoint,
    requests: Iterable[ChatRequest],
    store: ReplyStore,
    progress: Callable[[float | None], None] = lambda cost: None,
) -> Outcome:
    """Asks what the store has no reply to, and stores each reply as it comes.

    Args:
        progress: called after each request with the US dollars that the folder's replies cost.

    Raises:
        EndpointError: if the endpoint can serve no request; the replies that came before it are stored.
        OSError: if a reply cannot be written.
    """
    return asyncio.run(_Run(endpoint, store, progress).run(requests))


class _Run:
    def __init__(self, endpoint: Endpoint, store: ReplyStore, progress: Callable[[float | None], None]):
        self.endpoint, self.store, self.progress = endpoint, store, progress
        self.outcome = Outcome()
        self.resume_at = 0.0  # when the endpoint will take requests again, by its own word
        self.reserved = 0.0  # US dollars that the requests under way may cost at most
        self.settled = asyncio.Event()
        self.unanswered_in_a_row = 0

    async def run(self, requests: Iterable[ChatRequest]) -> Outcome:
        missing = (request for request in requests if request.key not in self.store)
        # aiohttp takes two thirds of the time of httpx2 for a request, and is there already: `datasets` needs it.
        http_client = openai.DefaultAioHttpClient()
        async with openai.AsyncOpenAI(
            api_key=self.endpoint.api_key,
            base_url=self.endpoint.base_url,
            timeout=self.endpoint.timeout,
            max_retries=0,
            http_client=http_client,
        ) as client:
            workers = [asyncio.create_task(self._work(client, missing)) for _ in range(self.endpoint.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return self.outcome

    async def _work(self, client: openai.AsyncOpenAI, requests: Iterable[ChatRequest]) -> None:
        for request in requests:  # one iterator, shared by all workers
            most = 0.0
            if self.endpoint.max_cost is not None:
                most = self.endpoint.price.cost(*most_tokens(request.messages, request.parameters))
                if not await self._reserve(most):
                    return
            try:
                reply = await self._ask(client, request)
                if reply is not None:
                    self.store.add(request, reply)
            finally:
                self.reserved -= most
                self.settled.set()
            self.progress(spent(self.endpoint.price, self.store))

    async def _reserve(self, most: float) -> bool:
        """Waits until a request is surely affordable; False if it never will be."""
        while self.outcome.stopped is None:
            if spent(self.endpoint.price, self.store) + self.reserved + most <= self.endpoint.max_cost:
                self.reserved += most
                return True
            if self.reserved <= 1e-12:  # nothing under way whose real cost could leave room
                self.outcome.stopped = f"--max-cost {self.endpoint.max_cost:g} is reached"
                self.settled.set()
                break
            self.settled.clear()
            await self.settled.wait()
        return False

    async def _ask(self, client: openai.AsyncOpenAI, request: ChatRequest) -> dict[str, Any] | None:
        problem, tries, began = "", 0, time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, self.resume_at - time.monotonic()))
            pause = min(LONGEST_PAUSE, 0.5 * 2**tries) * random.uniform(0.75, 1.25)
            tries += 1
            try:
                # As `client.chat.completions.create` without its walk through every field, a fifth of a request's time.
                body = {"model": self.endpoint.model, "messages": request.messages} | request.parameters
                completion = await client.post("/chat/completions", cast_to=ChatCompletion, body=body)
                reply = reply_of(completion)
                self.unanswered_in_a_row = 0
                return reply
            except openai.RateLimitError as error:
                stop_if_hopeless(error, self.endpoint)
                problem = "429: too many requests"
                wait = _retry_after(error.response)
                if wait is not None and time.monotonic() + wait - began < RATE_LIMIT_PATIENCE:
                    # Everybody waits, since more requests would only be refused too; being told to is no failed try.
                    self.resume_at = max(self.resume_at, time.monotonic() + wait)
                    tries -= 1
                    pause = random.uniform(0.0, 0.5)  # not all at once after it
            except openai.APIStatusError as error:
                stop_if_hopeless(error, self.endpoint)
                problem = f"{error.status_code}: {one_line(error)}"
                if error.status_code < 500 and error.status_code not in (408, 409):
                    break  # this request is at fault: it would be refused again
                pause = max(pause, min(LONGEST_PAUSE, _retry_after(error.response) or 0.0))
            except openai.APITimeoutError:
                problem = f"no reply in {self.endpoint.timeout:g} s"
            except openai.APIConnectionError as error:
                problem = one_line(error.__cause__ or error)
            except (openai.APIError, ValueError) as error:
                problem = f"a reply that cannot be read ({one_line(error)})"
            if tries >= self.endpoint.tries:
                break
            self.outcome.retries += 1
            await asyncio.sleep(pause)
        self.outcome.unanswered[request.key] = problem
        self.unanswered_in_a_row += 1
        if self.unanswered_in_a_row >= GIVE_UP_AFTER:
            raise EndpointError(
                f"{self.endpoint.base_url}: {GIVE_UP_AFTER} requests in a row had no reply ({problem}): "
                "nothing is lost, run again when it answers"
            )
        return None


def reply_of(completion: Any) -> dict[str, Any]:
    """The part of a chat completion that is stored.

    Raises:
        ValueError: if it is none.
    """
    choices = getattr(completion, "choices", None)
    if not choices or choices[0].message is None:
        raise ValueError("no choices in it")
    choice, usage = choices[0], completion.usage
    return {
        "text": choice.message.content or "",
        "finish_reason": choice.finish_reason,
        "refusal": getattr(choice.message, "refusal", None),
        "usage": usage
        and {"prompt_tokens": usage.prompt_tokens or 0, "completion_tokens": usage.completion_tokens or 0},
        "model": completion.model,
        "id": completion.id,
    }


def spent(price: Price | None, store: ReplyStore) -> float | None:
    """US dollars that the stored replies cost, or None without a price."""
    return None if price is None else price.cost(store.prompt_tokens, store.completion_tokens)


def stop_if_hopeless(error: openai.APIStatusError, endpoint: Endpoint) -> None:
    """Raises `EndpointError` for an answer that no patience mends: of the key, the model or the account."""
    # What the endpoint says of a key may hold a part of it: that is not repeated.
    if isinstance(error, openai.AuthenticationError):
        raise EndpointError(f"OPENAI_API_KEY: {endpoint.base_url} does not accept it (401)") from None
    if isinstance(error, openai.PermissionDeniedError):
        raise EndpointError(f"OPENAI_API_KEY: it may not use {endpoint.model} at {endpoint.base_url} (403)") from None
    if isinstance(error, openai.NotFoundError):
        raise EndpointError(
            f"--model {endpoint.model}: {endpoint.base_url} does not know it (404: {one_line(error)})"
        ) from None
    if error.code == "insufficient_quota":
        raise EndpointError(f"{endpoint.base_url}: the account has no credit left (429)") from None


def _retry_after(response: Any) -> float | None:
    """Seconds that the endpoint asks to wait: a number, or the time of an HTTP date."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind, short enough for a terminal."""
    message = first_line(error)
    return message if len(message) <= 200 else message[:197] + "..."

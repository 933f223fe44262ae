"""Send many requests concurrently, within limits on their number, time and cost, and with retries.

The `openai` package sends them. Its own retries are disabled because all requests have to wait when one of them is told
to, and its parsing because it accepts any JSON as a reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx2
import openai

from ..errors import InputError, Interrupt, Terminated, first_line, scrub
from .answers import Reply, UnreadableReplyError, Usage, all_thinking, read_answer
from .api_errors import MAX_SHOWN, ApiError
from .endpoint import Endpoint, EndpointError
from .prices import Price, most_tokens
from .refusals import Refusals
from .replies import ChatRequest, ReplyStore
from .transport import AsyncBoundedClient

CONNECT_SECONDS = 20.0  # in which a connection must be made, at most half the timeout of an attempt
LONGEST_PAUSE = 60.0  # seconds between two attempts
RATE_LIMIT_PATIENCE = 900.0  # seconds that a request waits on the endpoint's instruction
GIVE_UP_AFTER = 5  # consecutive requests without any response, after which the endpoint counts as down
LAST_REPLIES = 30.0  # seconds granted to requests in flight when the run ends early; at most the timeout
LAST_REPLIES_INTERRUPTED = 10.0  # seconds granted to requests in flight after Ctrl-C or SIGTERM
UNREADABLE_TRIES = 2  # a reply that cannot be read is perhaps paid for
ALL_THINKING = 20  # end the run if so many first replies reach the token limit before their text begins


@dataclass
class Outcome:
    """Outcome of a run of requests.

    Attributes:
        unanswered: reason why a request that was sent has no reply, by its key.
        given_up: keys of those that were sent as often as a run may.
        stopped: reason why the remaining requests were not sent, or None.
        retries: number of attempts beyond the first.
        error: that ended the run early, for the caller to raise after writing its results: `EndpointError`, or one of
            `errors.Interrupt` for Ctrl-C and SIGTERM.
    """

    unanswered: dict[str, str] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    stopped: str | None = None
    retries: int = 0
    error: BaseException | None = None


def ask_all(
    endpoint: Endpoint,
    requests: Iterable[ChatRequest],
    store: ReplyStore,
    progress: Callable[[float | None], None] = lambda cost: None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Send the requests that have no stored reply, and store each reply on arrival.

    Args:
        endpoint: that the requests are sent to.
        requests: to send, unless the store holds their replies.
        store: of the replies.
        progress: called after each request with the cost in US dollars of all replies in the folder.
        say: called with a line for the user.

    Raises:
        OSError: if a reply cannot be written.
    """
    return asyncio.run(_Run(endpoint, store, progress, say).run(requests))


class _Run:
    def __init__(
        self,
        endpoint: Endpoint,
        store: ReplyStore,
        progress: Callable[[float | None], None],
        say: Callable[[str], None],
    ):
        self.endpoint, self.store, self.progress, self.say = endpoint, store, progress, say
        self.outcome = Outcome()
        self.refusals = Refusals(endpoint, store)
        self.resume_at = 0.0  # when the endpoint accepts requests again, as it says
        self.reserved = 0.0  # maximum cost in US dollars of the requests in flight
        self.in_flight = 0
        self.settled = asyncio.Event()  # set whenever a request is no longer in flight
        self.ending = asyncio.Event()  # set when no more requests are to be sent
        self.problem: BaseException | None = None  # why the run ends
        self.unanswered_in_a_row = 0
        self.thinking: int | None = 0  # replies without text so far; None once one has text
        self.workers: list[asyncio.Task] = []

    async def run(self, requests: Iterable[ChatRequest]) -> Outcome:
        missing = (request for request in requests if request.key not in self.store)
        async with openai.AsyncOpenAI(
            api_key=self.endpoint.api_key,
            base_url=self.endpoint.base_url,
            # `asyncio.timeout` bounds an attempt as a whole.
            timeout=httpx2.Timeout(None, connect=min(CONNECT_SECONDS, self.endpoint.timeout / 2)),
            max_retries=0,
            http_client=AsyncBoundedClient(),
        ) as client:
            self.workers = [asyncio.create_task(self._work(client, missing)) for _ in range(self.endpoint.concurrency)]
            with _signals(self._interrupt):
                await self._finish()
        error = self.refusals.end()
        if self.problem is None:
            self.problem = error
        if self.problem is not None and not isinstance(self.problem, (EndpointError, *Interrupt)):
            raise self.problem
        self.outcome.error = self.problem
        return self.outcome

    async def _finish(self) -> None:
        """Wait for the workers; when the run ends early, requests in flight get a bounded time."""
        ending = asyncio.create_task(self.ending.wait())
        working = asyncio.gather(*self.workers, return_exceptions=True)
        await asyncio.wait((ending, working), return_when=asyncio.FIRST_COMPLETED)
        interrupted = isinstance(self.problem, Interrupt)
        seconds = LAST_REPLIES_INTERRUPTED if interrupted else min(self.endpoint.timeout, LAST_REPLIES)
        await asyncio.wait(self.workers, timeout=seconds)
        for task in (ending, *self.workers):
            task.cancel()
        await asyncio.gather(ending, working, return_exceptions=True)

    def _end(self, problem: BaseException) -> None:
        """Send no more requests; only the first problem is reported."""
        self.problem = self.problem or problem
        self.ending.set()
        self.settled.set()

    def _interrupt(self, number: int) -> None:
        if self.ending.is_set():  # the second signal: requests in flight are lost
            for worker in self.workers:
                worker.cancel()
            return
        self._end(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        self.say(f"stopping: {self.in_flight} requests in flight have {LAST_REPLIES_INTERRUPTED:g} s to finish")

    async def _work(self, client: openai.AsyncOpenAI, requests: Iterable[ChatRequest]) -> None:
        try:
            for request in requests:  # one iterator, shared by all workers
                most = 0.0
                if self.endpoint.max_cost is not None:
                    most = self.endpoint.price.cost(*most_tokens(request.messages, request.parameters))
                if not await self._may_send(most):
                    return
                try:
                    reply = await self._ask(client, request)
                    if reply is not None:
                        self._take(request, reply)
                finally:
                    self.reserved -= most
                    self.in_flight -= 1
                    self.settled.set()
                self.progress(spent(self.endpoint.price, self.store))
        except Exception as problem:
            self._end(problem)

    def _take(self, request: ChatRequest, reply: Reply) -> None:
        fields = reply.model_dump()
        estimated = self.store.estimated
        self.store.add(request, fields)
        self.refusals.success()
        self.unanswered_in_a_row = 0
        if self.endpoint.price is not None and estimated == 0 < self.store.estimated:
            self.say("the endpoint does not count all tokens: the cost is estimated from the lengths of the texts")
        if not all_thinking(fields):
            self.thinking = None
        elif self.thinking is not None:
            self.thinking += 1
            if self.thinking >= ALL_THINKING:
                self._end(EndpointError(thinking_problem(self.endpoint, self.thinking)))

    async def _may_send(self, most: float) -> bool:
        """Wait until a request is certainly affordable and can be answered; return whether to send it."""
        while not self.ending.is_set() and self.outcome.stopped is None:
            affordable = self._affordable(most)
            if affordable and not self.refusals.all_refused:
                self.reserved += most
                self.in_flight += 1
                return True
            if self.in_flight == 0:  # no request in flight that could free budget or be answered
                if affordable:
                    self._end(self.refusals.end())
                else:
                    self.outcome.stopped = f"--max-cost {self.endpoint.max_cost:g} is reached"
                    self.settled.set()
                break
            self.settled.clear()
            await self.settled.wait()
        return False

    def _affordable(self, more: float) -> bool:
        """Return whether this maximum cost in US dollars may be added to that of the requests in flight."""
        if self.endpoint.max_cost is None:
            return True
        return spent(self.endpoint.price, self.store) + self.reserved + more <= self.endpoint.max_cost

    async def _ask(self, client: openai.AsyncOpenAI, request: ChatRequest) -> Reply | None:
        problem, attempts, unreadable, began = "", 0, 0, time.monotonic()
        while True:
            await self._sleep(self.resume_at - time.monotonic())
            if self.ending.is_set():
                if problem:
                    self.outcome.unanswered[request.key] = problem
                return None
            pause = min(LONGEST_PAUSE, 0.5 * 2**attempts) * random.uniform(0.75, 1.25)
            attempts += 1
            parameters = self.endpoint.dialect.translate(request.parameters)
            body = {"model": self.endpoint.model, "messages": request.messages} | parameters
            usage = None  # of an attempt that is perhaps paid for
            try:
                async with asyncio.timeout(self.endpoint.timeout):
                    return await _post(client, body)
            except ApiError as api_error:
                problem = str(api_error)
                if error := self.endpoint.error_for_all(api_error):
                    self.outcome.unanswered[request.key] = problem
                    self._end(error)
                    return None
                if self.endpoint.dialect.learn(api_error, body, self.say):
                    attempts -= 1
                    continue
                if api_error.refuses:
                    self.unanswered_in_a_row = 0  # the endpoint responds
                    self.refusals.add(request, api_error)
                    return None
                if api_error.status in (408, 504):  # the endpoint may have counted the reply
                    usage = Usage()
                wait = api_error.retry_after
                if wait is not None:
                    wait = min(wait, LONGEST_PAUSE)
                    if api_error.status != 429:
                        pause = max(pause, wait)
                    elif time.monotonic() + wait - began < RATE_LIMIT_PATIENCE:
                        # All requests wait, since more of them would be rejected too; this is not a failed attempt.
                        self.resume_at = max(self.resume_at, time.monotonic() + wait)
                        attempts -= 1
                        pause = random.uniform(0.0, 0.5)  # spread the requests afterwards
            except TimeoutError:  # the endpoint may go on, and count the reply
                problem, usage = f"no reply in {self.endpoint.timeout:g} s: raise --timeout for a slow model", Usage()
                unreadable += 1
            except asyncio.CancelledError:
                self.store.add_unread(request, "the run ended before the reply")
                raise
            except UnreadableReplyError as error:
                problem, usage = scrub(str(error), MAX_SHOWN), error.usage
                unreadable += 1
            except InputError as error:
                problem = scrub(str(error), MAX_SHOWN)
            if usage is not None:
                self.store.add_unread(request, problem, usage)
            if attempts >= self.endpoint.tries or unreadable >= UNREADABLE_TRIES or not self._affordable(0.0):
                break
            self.outcome.retries += 1
            await self._sleep(pause)
        self.outcome.unanswered[request.key] = problem
        self.outcome.given_up.add(request.key)
        self.unanswered_in_a_row += 1
        if self.unanswered_in_a_row >= GIVE_UP_AFTER:
            self._end(
                EndpointError(
                    f"{self.endpoint.address}: {GIVE_UP_AFTER} requests in a row had no reply ({problem}): "
                    "run again to resume when it responds"
                )
            )
        return None

    async def _sleep(self, seconds: float) -> None:
        """Sleep for this time, or until the run ends."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ending.wait(), seconds)


async def _post(client: openai.AsyncOpenAI, body: dict[str, Any]) -> Reply:
    """Send a request once.

    Raises:
        ApiError: if the endpoint rejects the request.
        UnreadableReplyError: if the request was perhaps served, but its response did not arrive or cannot be parsed.
        InputError: if the endpoint cannot be reached.
    """
    try:
        # Like `client.chat.completions.create` without its traversal of every field, a fifth of a request's time.
        response = await client.post("/chat/completions", cast_to=httpx2.Response, body=body)
    except openai.APIStatusError as error:
        response = error.response
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        # Not `httpx2.ConnectTimeout`, which also stands for a connection that was dropped after the request.
        unreached = isinstance(cause.__cause__, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError))
        raise (InputError if unreached else UnreadableReplyError)(first_line(cause)) from None
    except Exception as error:  # whatever error a server can trigger in an HTTP library
        raise UnreadableReplyError(f"a reply that cannot be read ({first_line(error)})") from None
    return read_answer(response.status_code, response.content, response.headers)


@contextlib.contextmanager
def _signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Call a function in the running event loop on Ctrl-C and SIGTERM."""
    loop = asyncio.get_running_loop()
    before = {}
    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not the main thread, or Windows
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            loop.add_signal_handler(number, handle, number)
            before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def spent(price: Price | None, store: ReplyStore) -> float | None:
    """Return the cost of the stored replies in US dollars, or None without a price."""
    return None if price is None else price.cost(store.prompt_tokens, store.completion_tokens)


def thinking_problem(endpoint: Endpoint, replies: int) -> str:
    """Return the message for when all replies so far reached the token limit before their text began."""
    return (
        f"{scrub(endpoint.model)}: the first {replies} replies have no text because the model spends the token limit "
        "on reasoning: raise --max-completion-tokens"
    )

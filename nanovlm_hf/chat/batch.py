"""The Batch API: requests are sent as files and answered within a day at half the price.

A file of requests is a job in the folder `batch`. The next run fetches the replies of a job that an earlier run has
sent; if that run was killed before it noted the id of the batch, the batch is found at the endpoint by the hash of the
file.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, Interrupt, scrub
from ..files import parse_json
from .answers import Reply, all_thinking, read_completion
from .api_errors import MAX_SHOWN, ApiError, parse_error_body
from .batch_api import ENDED, Batch, BatchApi
from .batch_jobs import JobFolder
from .client import ALL_THINKING, Outcome, spent, thinking_problem
from .endpoint import Endpoint, EndpointError
from .prices import BATCH_DISCOUNT, most_tokens
from .refusals import Refusals
from .replies import ChatRequest, ReplyStore
from .transport import MAX_LINE, lines_of

REQUESTS_PER_JOB = 20_000  # OpenAI takes 50,000 requests and 200 MB
BYTES_PER_REPLY = 2**18  # maximum average; larger output files are truncated


def ask_all_in_batches(
    endpoint: Endpoint,
    requests: Iterable[ChatRequest],
    store: ReplyStore,
    progress: Callable[[float | None], None] = lambda cost: None,
    say: Callable[[str], None] = lambda line: None,
    poll_seconds: float = 30.0,
) -> Outcome:
    """Send requests as `ask_all` does, but in batches; jobs of earlier runs are fetched as well.

    Args:
        endpoint: endpoint with a Batch API.
        requests: requests; those with a reply in the store are not sent.
        store: store for the replies.
        progress: called after each reply with the cost in US dollars of all replies in the store.
        say: called with a line when a job is sent or its status changes.
        poll_seconds: seconds between status requests.

    Raises:
        InputError: if a file in the folder `batch` is damaged.
        OSError: if a reply cannot be written.
    """
    api = BatchApi(endpoint)
    run = _Batches(endpoint, api, store, progress, say, poll_seconds)
    try:
        run.run(requests)
    except (EndpointError, *Interrupt) as error:
        run.outcome.error = error
    finally:
        api.close()
    refused = run.refusals.end()
    if run.outcome.error is None:
        run.outcome.error = refused
    return run.outcome


class _Batches:
    def __init__(
        self,
        endpoint: Endpoint,
        api: BatchApi,
        store: ReplyStore,
        progress: Callable[[float | None], None],
        say: Callable[[str], None],
        poll_seconds: float,
    ):
        self.endpoint, self.api, self.store = endpoint, api, store
        self.progress, self.say, self.poll_seconds = progress, say, poll_seconds
        self.jobs = JobFolder(store.path.parent / "batch")
        self.outcome = Outcome()
        self.refusals = Refusals(endpoint, store)
        self.thinking, self.replies = 0, 0

    def run(self, requests: Iterable[ChatRequest]) -> None:
        known = {request.key: request for request in requests}
        for path in self.jobs.unfetched():
            self._fetch(path, known)
        unknown = set(self.endpoint.dialect.unknown)
        self._ask(known)
        if self.endpoint.dialect.unknown != unknown:  # send refused requests again without these parameters
            self._ask(known)
        if self.replies >= ALL_THINKING and self.replies == self.thinking:
            raise EndpointError(thinking_problem(self.endpoint, self.replies))

    def _ask(self, known: dict[str, ChatRequest]) -> None:
        """Send the requests without a reply as jobs, and fetch the replies."""
        missing = (request for request in known.values() if request.key not in self.store)
        sent = []
        while part := list(itertools.islice(missing, REQUESTS_PER_JOB)):
            affordable = self._affordable(part)
            if affordable:
                sent.append(self.jobs.add(affordable, self.endpoint))
                self._send(sent[-1])
            if len(affordable) < len(part):
                self.outcome.stopped = f"--max-cost {self.endpoint.max_cost:g} is reached"
                break
        for path in sent:
            self._fetch(path, known)

    def _affordable(self, part: list[ChatRequest]) -> list[ChatRequest]:
        """Return the first requests whose maximum cost, with that of the pending jobs, stays within `max_cost`."""
        if self.endpoint.max_cost is None:
            return part
        left = self.endpoint.max_cost - spent(self.endpoint.price, self.store)
        for path in self.jobs.unfetched():
            left -= sum(map(self._max_cost, self.jobs.requests(path).values()))
        for number, request in enumerate(part):
            left -= self._max_cost(request)
            if left < 0:
                return part[:number]
        return part

    def _max_cost(self, request: ChatRequest) -> float:
        return BATCH_DISCOUNT * self.endpoint.price.cost(*most_tokens(request.messages, request.parameters))

    def _send(self, path: Path) -> str:
        """Send a job unless it was sent before, and return the id of its batch."""
        if (batch_id := self.jobs.state(path).batch_id) is not None:
            return batch_id
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:32]
        # The batch of another job with the same requests has failed: do not take its id for this job.
        noted = {state.batch_id for state in map(self.jobs.state, self.jobs.all()) if state.batch_id is not None}
        batch = self.api.find(digest, noted) or self.api.create(path.name, content, digest)
        self.jobs.note(path, batch_id=batch.id)
        count = content.count(b"\n")
        self.say(f"{path.name}: {count} requests were submitted to {self.endpoint.address} as {batch.id}")
        return batch.id

    def _fetch(self, path: Path, known: dict[str, ChatRequest]) -> None:
        """Wait for the batch of a job, and store its replies."""
        sent = self.jobs.requests(path)
        batch = self._wait(path, self._send(path))
        if batch.status == "failed":
            self.jobs.note(path, fetched=True)
            reason = scrub(parse_error_body(400, _problems(batch)).message, MAX_SHOWN)
            raise EndpointError(f"{batch.id}: the endpoint refuses {path.name} ({reason})")
        # Requests of an earlier run with another prompt or model are stored as well: they are paid for.
        left = {key: known.get(key, request) for key, request in sent.items() if key not in self.store}
        # Both files are optional and may hold replies; those of an expired batch hold what was answered in time.
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                with tempfile.TemporaryFile(dir=self.jobs.path) as file:
                    self.api.download(file_id, file, 16 * MAX_LINE + len(sent) * BYTES_PER_REPLY)
                    file.seek(0)
                    self._take_all(file, left, sent)
        for key in left.keys() & known.keys():
            self.outcome.unanswered.setdefault(key, f"in the batch: no reply ({batch.status})")
        self.jobs.note(path, fetched=True)

    def _wait(self, path: Path, batch_id: str) -> Batch:
        status = None
        while True:
            batch = self.api.retrieve(batch_id)
            if batch is None:
                raise EndpointError(
                    f"{path.with_suffix('.json')}: {self.endpoint.address} does not know the batch {batch_id}: remove "
                    "the file to send the requests again"
                )
            if batch.status != status:
                status = batch.status
                self.say(f"{batch_id}: {status}")
            if status in ENDED:
                return batch
            time.sleep(self.poll_seconds)

    def _take_all(self, file: BinaryIO, left: dict[str, ChatRequest], sent: dict[str, ChatRequest]) -> None:
        """Store the replies and refusals in an output file, and remove their requests from `left`."""
        for line in lines_of(file):
            try:
                row = parse_json(line.decode(errors="replace"), "a line")
                request = left.get(row["custom_id"])
            except (InputError, KeyError, TypeError):
                continue  # its request has no reply
            if request is not None and self._take(row, request, sent[request.key].parameters):
                del left[request.key]

    def _take(self, row: dict[str, Any], request: ChatRequest, sent: dict[str, Any]) -> bool:
        """Store the reply or refusal of a request; return whether there was one."""
        try:
            fields = _reply_of(row).model_dump()
        except ApiError as error:
            self.outcome.unanswered[request.key] = f"in the batch: {error}"
            if self.endpoint.dialect.learn(error, sent, self.say) or not error.refuses:
                return False
            self.outcome.unanswered.pop(request.key)
            self.refusals.add(request, error)
            return True
        except InputError as error:
            self.outcome.unanswered[request.key] = f"in the batch: {scrub(str(error), MAX_SHOWN)}"
            return False
        self.store.add(request, fields | {"batch": True})
        self.outcome.unanswered.pop(request.key, None)
        self.refusals.success()
        self.replies += 1
        self.thinking += all_thinking(fields)
        self.progress(spent(self.endpoint.price, self.store))
        return True


def _problems(batch: Batch) -> Any:
    return batch.errors.get("data") if isinstance(batch.errors, dict) else batch.errors


def _reply_of(row: dict[str, Any]) -> Reply:
    """Return the reply in a line of an output file.

    Raises:
        ApiError: if the line holds an error.
        InputError: if it cannot be parsed.
    """
    response = row.get("response")
    response = response if isinstance(response, dict) else {}
    status, body = response.get("status_code"), response.get("body")
    if status == 200:
        return read_completion(body)
    if row.get("error"):
        raise parse_error_body(status if isinstance(status, int) else None, row["error"])
    raise parse_error_body(status if isinstance(status, int) else None, body)

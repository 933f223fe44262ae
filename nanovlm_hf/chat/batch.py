"""The Batch API: requests are sent as files and answered within a day at half the price.

A file of requests is a job in the folder `batch`. The next run fetches the replies of a job that an earlier run has
sent; if that run was killed before it noted the id of the batch, the batch is found at the endpoint by the hash of the
file. A job that was never sent is removed: what is still wanted of it, and within the limits of this run, is a new job.
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
from .answers import Reply, UnreadableReplyError, all_thinking, read_completion, read_count
from .api_errors import MAX_SHOWN, ApiError, parse_error_body
from .batch_api import Batch, BatchApi
from .batch_jobs import FOLDER, LOST, JobFolder
from .client import ALL_THINKING, Outcome, spent, thinking_problem
from .endpoint import Endpoint, EndpointError
from .prices import BATCH_DISCOUNT, most_tokens
from .refusals import Refusals
from .replies import ChatRequest, ReplyStore
from .transport import MAX_LINE, lines_of

REQUESTS_PER_JOB = 20_000  # OpenAI takes 50,000 requests and 200 MB
BYTES_PER_REPLY = 2**18  # maximum average; larger output files are an error
ODD_POLLS = 20  # of a batch with an unknown status, or whose paid replies have no file yet


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
        self.jobs = JobFolder(store.path.parent / FOLDER)
        self.outcome = Outcome()
        self.refusals = Refusals(endpoint, store)
        self.lost: set[str] = set()  # ids of batches whose replies cannot be fetched, and whose notes the user removed
        self.thinking, self.replies = 0, 0

    def run(self, requests: Iterable[ChatRequest]) -> None:
        known = {request.key: request for request in requests}
        for path in self.jobs.unfetched():
            self._resume(path, known)
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
                path = self.jobs.add(affordable, self.endpoint)
                sent.append((path, self._send(path)))
            if len(affordable) < len(part):
                self.outcome.stopped = f"--max-cost {self.endpoint.max_cost:g} is reached"
                break
        for path, batch_id in sent:
            self._fetch(path, batch_id, known)

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

    def _resume(self, path: Path, known: dict[str, ChatRequest]) -> None:
        """Fetch the replies of a job of an earlier run; remove one that has no batch, or one whose replies are lost."""
        self.jobs.requests(path)  # a damaged file is reported, not removed
        noted = self.jobs.state(path).batch_id
        if noted is not None:
            self._fetch(path, noted, known)
        elif (batch := self.api.find(*self._identity(path))) is None:
            self.jobs.remove(path)
        else:
            told = path.with_suffix(LOST).exists()
            self.jobs.note(path, batch_id=batch.id)
            try:
                self._fetch(path, batch.id, known)
            except _LostError:
                if not told:  # the run was killed before it noted the batch, or the note was damaged
                    raise
                # The user has removed the note to send the requests again.
                self.lost.add(batch.id)
                self.jobs.remove(path)

    def _identity(self, path: Path) -> tuple[str, set[str]]:
        """Return the hash of a job, and the ids of batches that are not its own though they may have the same hash."""
        digest = hashlib.sha256(self.jobs.content(path)).hexdigest()[:32]
        states = map(self.jobs.state, self.jobs.all())
        return digest, self.lost | {state.batch_id for state in states if state.batch_id is not None}

    def _send(self, path: Path) -> str:
        """Send a job, unless a killed run has done so, and return the id of its batch."""
        digest, others = self._identity(path)
        content = self.jobs.content(path)
        batch = self.api.find(digest, others) or self.api.create(path.name, content, digest, others)
        self.jobs.note(path, batch_id=batch.id)
        count = content.count(b"\n")
        self.say(f"{path.name}: {count} requests were submitted to {self.endpoint.address} as {batch.id}")
        return batch.id

    def _fetch(self, path: Path, batch_id: str, known: dict[str, ChatRequest]) -> None:
        """Wait for the batch of a job, and store its replies."""
        sent = self.jobs.requests(path)
        batch = self._wait(path, batch_id)
        if batch.status == "failed" and batch.useless:
            self.jobs.note(path, fetched=True)
            reason = scrub(parse_error_body(400, _problems(batch)).message, MAX_SHOWN)
            raise EndpointError(f"{batch.id}: the endpoint refuses {path.name} ({reason})")
        # Requests of an earlier run with another prompt or model are stored as well: they are paid for.
        left = {key: known.get(key, request) for key, request in sent.items() if key not in self.store}
        # Both files are optional and may hold replies; those of an expired batch hold what was answered in time.
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                with tempfile.TemporaryFile(dir=self.jobs.path) as file:
                    found = self.api.download(file_id, file, 16 * MAX_LINE + len(sent) * BYTES_PER_REPLY)
                    file.seek(0)
                    lines = self._take_all(file, left, sent)
                # Nothing in a file of errors is paid for.
                if file_id == batch.output_file_id and not (found and (lines or not batch.answered)):
                    state = "is empty" if found else "is no longer available"
                    raise self._lost(path, f"the output file {file_id} of the batch {batch_id} {state}")
        for key in left.keys() & known.keys():
            self.outcome.unanswered.setdefault(key, f"in the batch: no reply ({batch.status})")
        self.jobs.note(path, fetched=True)

    def _lost(self, path: Path, problem: str) -> _LostError:
        path.with_suffix(LOST).touch()
        return _LostError(f"{path.with_suffix('.json')}: {problem}: remove the file to send the requests again")

    def _wait(self, path: Path, batch_id: str) -> Batch:
        """Return a batch when it has ended, with the file of its replies.

        Raises:
            _LostError: if the endpoint does not know it, or it has been in an unknown state for `ODD_POLLS` polls.
        """
        status, odd = None, 0
        while True:
            batch = self.api.retrieve(batch_id)
            if batch is None:
                raise self._lost(path, f"{self.endpoint.address} does not know the batch {batch_id}")
            if batch.status != status:
                status = batch.status
                self.say(f"{batch_id}: {status}")
            problem = batch.problem
            if problem is None and batch.ended:
                return batch
            odd = odd + 1 if problem else 0
            if odd >= ODD_POLLS:
                shown = f"the batch {batch_id} {scrub(problem)}"
                raise self._lost(path, f"{shown}: run again later, or if that does not help")
            time.sleep(self.poll_seconds)

    def _take_all(self, file: BinaryIO, left: dict[str, ChatRequest], sent: dict[str, ChatRequest]) -> int:
        """Store the replies and refusals in an output file, and remove their requests from `left`.

        Returns:
            The number of lines that belong to requests of the job.
        """
        lines = 0
        for line in lines_of(file):
            try:
                row = parse_json(line.decode("utf-8-sig", errors="replace"), "a line")
                request = left.get(row["custom_id"])
                lines += row["custom_id"] in sent
            except (InputError, KeyError, TypeError):
                continue  # its request has no reply
            if request is not None and self._take(row, request, sent[request.key].parameters):
                del left[request.key]
        return lines

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
        except UnreadableReplyError as error:
            self.store.add_unread(request, str(error), error.usage, batch=True)
            self.outcome.unanswered[request.key] = f"in the batch: {scrub(str(error), MAX_SHOWN)}"
            return False
        self.store.add(request, fields | {"batch": True})
        self.outcome.unanswered.pop(request.key, None)
        self.refusals.success()
        self.replies += 1
        self.thinking += all_thinking(fields)
        self.progress(spent(self.endpoint.price, self.store))
        return True


class _LostError(EndpointError):
    """The replies of a batch cannot be fetched."""


def _problems(batch: Batch) -> Any:
    return batch.errors.get("data") if isinstance(batch.errors, dict) else batch.errors


def _reply_of(row: dict[str, Any]) -> Reply:
    """Return the reply in a line of an output file.

    Raises:
        ApiError: if the line holds an error.
        UnreadableReplyError: if it cannot be parsed.
    """
    response = row.get("response")
    response = response if isinstance(response, dict) else {}
    status, body = read_count(response.get("status_code")), response.get("body")
    is_completion = isinstance(body, dict) and body.get("choices")
    if is_completion if status is None else 200 <= status < 300:
        return read_completion(body)
    raise parse_error_body(status, row.get("error") or body)

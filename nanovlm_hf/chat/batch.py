"""The Batch API: the same requests as files, answered within a day at half the price.

Each file of requests is a job in the folder `batch`: `00001.jsonl` is sent, `00001.json` says under which id. A job
that was sent is fetched by whichever run comes next; if a run was killed between sending a job and noting its id, the
id is found again at the endpoint by the hash of the file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from ..files import written_whole
from .client import Endpoint, EndpointError, Outcome, most_tokens, one_line, reply_of, spent, stop_if_hopeless
from .prices import BATCH_DISCOUNT
from .replies import ChatRequest, ReplyStore

REQUESTS_PER_JOB = 20_000  # OpenAI takes 50,000 requests and 200 MB
ENDED = ("completed", "failed", "expired", "cancelled")


def ask_all_in_batches(
    endpoint: Endpoint,
    requests: Iterable[ChatRequest],
    store: ReplyStore,
    progress: Callable[[float | None], None] = lambda cost: None,
    say: Callable[[str], None] = lambda line: None,
    poll_seconds: float = 30.0,
) -> Outcome:
    """As `ask_all`, through files; it also fetches what an earlier run has sent and not fetched.

    Args:
        say: called with a line whenever a job is sent or its state changes.
        poll_seconds: between two looks at a job.

    Raises:
        EndpointError: if the endpoint refuses a job, has no Batch API, or does not answer.
    """
    client = openai.OpenAI(
        api_key=endpoint.api_key, base_url=endpoint.base_url, timeout=600.0, max_retries=endpoint.tries
    )
    run = _Batches(endpoint, client, store, progress, say, poll_seconds)
    try:
        with client:
            return run.run(requests)
    except openai.NotFoundError:
        raise EndpointError(f"{endpoint.base_url}: it has no Batch API (404): go without --batch") from None
    except openai.APIStatusError as error:
        stop_if_hopeless(error, endpoint)
        raise EndpointError(f"{endpoint.base_url}: {error.status_code}: {one_line(error)}") from None
    except openai.APIConnectionError as error:
        problem = one_line(error.__cause__ or error)
        raise EndpointError(
            f"{endpoint.base_url}: {problem}: nothing is lost, the same command goes on with what was sent"
        ) from None


class _Batches:
    def __init__(self, endpoint, client, store, progress, say, poll_seconds):
        self.endpoint, self.client, self.store = endpoint, client, store
        self.progress, self.say, self.poll_seconds = progress, say, poll_seconds
        self.folder = store.path.parent / "batch"
        self.folder.mkdir(exist_ok=True)
        self.outcome = Outcome()

    def run(self, requests: Iterable[ChatRequest]) -> Outcome:
        known: dict[str, ChatRequest] = {}
        for request in requests:
            known[request.key] = request
        sent = [path for path in sorted(self.folder.glob("*.jsonl")) if not self._note_of(path).get("fetched")]
        for path in sent:
            self._fetch(path, known)
        missing = (request for request in known.values() if request.key not in self.store)
        jobs = []
        while part := list(itertools.islice(missing, REQUESTS_PER_JOB)):
            affordable = self._affordable(part)
            if affordable:
                jobs.append(self._write(affordable))
                self._send(jobs[-1])
            if len(affordable) < len(part):
                self.outcome.stopped = f"--max-cost {self.endpoint.max_cost:g} is reached"
                break
        for path in jobs:
            self._fetch(path, known)
        return self.outcome

    def _affordable(self, part: list[ChatRequest]) -> list[ChatRequest]:
        """As many as surely cost no more than what is left, those under way included."""
        if self.endpoint.max_cost is None:
            return part
        left = self.endpoint.max_cost - spent(self.endpoint.price, self.store) - self._reserved()
        for number, request in enumerate(part):
            left -= BATCH_DISCOUNT * self.endpoint.price.cost(*most_tokens(request.messages, request.parameters))
            if left < 0:
                return part[:number]
        return part

    def _reserved(self) -> float:
        """US dollars that jobs under way may cost at most."""
        reserved = 0.0
        for path in self.folder.glob("*.jsonl"):
            if not self._note_of(path).get("fetched"):
                bodies = (line["body"] for line in _lines(path.read_text(encoding="utf-8")))
                most = (self.endpoint.price.cost(*most_tokens(body["messages"], body)) for body in bodies)
                reserved += BATCH_DISCOUNT * sum(most)
        return reserved

    def _write(self, part: list[ChatRequest]) -> Path:
        number = 1 + max((int(path.stem) for path in self.folder.glob("*.jsonl")), default=0)
        path = self.folder / f"{number:05d}.jsonl"
        with written_whole(path) as file:
            for request in part:
                body = {"model": self.endpoint.model, "messages": request.messages} | request.parameters
                line = {"custom_id": request.key, "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return path

    def _note_of(self, path: Path) -> dict[str, Any]:
        note = path.with_suffix(".json")
        return json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}

    def _note(self, path: Path, **fields: Any) -> None:
        content = json.dumps(self._note_of(path) | fields)
        with written_whole(path.with_suffix(".json")) as file:
            file.write(content)

    def _send(self, path: Path) -> str:
        """Sends a job unless it was sent before; returns its id."""
        if (batch_id := self._note_of(path).get("batch_id")) is not None:
            return batch_id
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:32]
        for batch in self.client.batches.list(limit=100):
            if (batch.metadata or {}).get("nanovlm") == digest:
                break
        else:
            upload = self.client.files.create(file=(path.name, content), purpose="batch")
            batch = self.client.batches.create(
                input_file_id=upload.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"nanovlm": digest},
            )
        self._note(path, batch_id=batch.id)
        count = content.count(b"\n")
        self.say(f"{path.name}: {count} requests are at {self.endpoint.base_url} as {batch.id}")
        return batch.id

    def _fetch(self, path: Path, known: dict[str, ChatRequest]) -> None:
        """Waits for a job and stores its replies."""
        batch_id = self._send(path)
        state = None
        while True:
            batch = self.client.batches.retrieve(batch_id)
            if batch.status != state:
                state = batch.status
                self.say(f"{batch_id}: {state}")
            if state in ENDED:
                break
            time.sleep(self.poll_seconds)
        if state == "failed":
            problems = (batch.errors and batch.errors.data) or []
            reason = problems[0].message if problems else "no reason given"
            self._note(path, fetched=True)
            raise EndpointError(f"{batch_id}: the endpoint refuses {path.name} ({reason})")
        # Both files may hold replies, and neither need be there: of an expired job, what was answered in time.
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                for line in _lines(self.client.files.content(file_id).text):
                    self._take(line, known)
        self._note(path, fetched=True)

    def _take(self, line: dict[str, Any], known: dict[str, ChatRequest]) -> None:
        key = str(line.get("custom_id"))
        fingerprint, _, attempt = key.rpartition("-")
        response = line.get("response") or {}
        try:
            if response.get("status_code") != 200:
                raise ValueError((line.get("error") or response.get("body", {}).get("error") or {}).get("message"))
            reply = reply_of(ChatCompletion.model_validate(response["body"])) | {"batch": True}
            # A request of another prompt or model, sent by an earlier run, was paid for all the same.
            self.store.add(known.get(key) or ChatRequest(fingerprint, int(attempt), []), reply)
        except ValueError as error:  # pydantic's errors are of this kind too
            self.outcome.unanswered[key] = f"in the batch: {one_line(error)}"
        self.progress(spent(self.endpoint.price, self.store))


def _lines(text: str) -> Iterable[dict[str, Any]]:
    return (json.loads(line) for line in text.split("\n") if line.strip())

"""The five calls of the Batch API, with validated responses of bounded size.

The `openai` client sends and retries them (unlike `client.py`, which has its own retries for a pool of requests),
except the one that creates a batch: as a request without a response may have created it, the batch is looked for first.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, BinaryIO, TypeVar

import httpx2
import openai
from pydantic import BaseModel, BeforeValidator, Field

from ..errors import InputError, first_line
from ..files import parse_json, validate
from .answers import read_count
from .api_errors import parse_error_response
from .endpoint import Endpoint, EndpointError
from .transport import BodyError, BoundedClient, save

T = TypeVar("T")
ENDED = ("completed", "failed", "expired", "cancelled")
UNSUCCESSFUL = ("failed", "expired", "cancelled")
_PENDING = (
    *("validating", "in_progress", "finalizing", "cancelling", "canceling", "cancellation_requested"),
    *("created", "submitted", "accepted", "pending", "queued", "scheduled", "running", "processing"),
)
# Other servers' words for the statuses of OpenAI.
_SYNONYMS = {
    **dict.fromkeys(("complete", "succeeded", "success", "successful", "done", "finished", "ended"), "completed"),
    **dict.fromkeys(("error", "errored", "failure", "invalid", "rejected"), "failed"),
    **dict.fromkeys(("canceled", "aborted", "stopped"), "cancelled"),
    **dict.fromkeys(("timeout", "timed_out", "timeout_exceeded"), "expired"),
}
# The endpoint would refuse the same request again; 404 and 410 also mean that it has no such file or batch.
_REFUSED = (400, 404, 410, 422)
_UNCERTAIN = (408, 409, 425, 429)  # and 500 and above: the request may have been served
LONGEST_PAUSE = 60.0  # seconds between two attempts to create a batch
SECONDS_FOR_FILE = 6 * 3600.0  # for an output file
PAGES = 10  # of a hundred batches; older batches are not found, and their requests are sent again


def _or(default: Any, kind: type) -> BeforeValidator:
    return BeforeValidator(lambda value: value if isinstance(value, kind) else default)


def _status(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    word = re.sub(r"[\s-]+", "_", value.strip().casefold())
    return _SYNONYMS.get(word, word)


def _file_id(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(r"[\w:-][\w.:/-]{0,199}", value) else None


_FileId = Annotated[str | None, BeforeValidator(_file_id)]
BatchId = Annotated[str, Field(pattern=r"^[\w:-][\w.:-]{0,199}$")]  # a part of an address, so not `..`


class Batch(BaseModel):
    """The fields of a batch that are used."""

    id: BatchId
    status: Annotated[str, Field(max_length=100), BeforeValidator(_status)]
    metadata: Annotated[dict[str, Any], _or({}, dict)] = Field(default_factory=dict)
    request_counts: Annotated[dict[str, Any], _or({}, dict)] = Field(default_factory=dict)
    output_file_id: _FileId = None
    error_file_id: _FileId = None
    errors: Any = None

    @property
    def ended(self) -> bool:
        """Whether the batch will not change."""
        return self.status in ENDED

    @property
    def answered(self) -> int | None:
        """The number of requests with a reply, which is paid for; None if the endpoint did not report it."""
        return read_count(self.request_counts.get("completed"))

    @property
    def useless(self) -> bool:
        """Whether the batch ended without replies."""
        return self.status in UNSUCCESSFUL and self.output_file_id is None and not self.answered

    @property
    def problem(self) -> str | None:
        """Why the batch can be neither fetched nor waited for much longer, or None."""
        if not self.ended:
            return None if self.status in _PENDING else f"has the unknown status {self.status}"
        if self.output_file_id is not None or self.useless:
            return None
        if self.answered:
            return f"is {self.status}, but its {self.answered} replies have no file (output_file_id)"
        nothing_known = self.answered is None and self.error_file_id is None
        return f"is {self.status}, but has no file (output_file_id)" if nothing_known else None


class _Page(BaseModel):
    data: Annotated[list[Any], _or([], list)] = Field(default_factory=list)
    has_more: Annotated[bool, BeforeValidator(bool)] = False


class _File(BaseModel):
    id: str


class BatchApi:
    """The Batch API of an endpoint.

    All methods raise `EndpointError` if the endpoint refuses, has no Batch API, or does not respond.
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.client = openai.OpenAI(
            api_key=endpoint.api_key,
            base_url=endpoint.base_url,
            max_retries=endpoint.tries - 1,
            timeout=endpoint.timeout,
            http_client=BoundedClient(endpoint.timeout, timeout=endpoint.timeout),
        )

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def find(self, digest: str, exclude: set[str]) -> Batch | None:
        """Return the newest batch with a digest that may have replies, except those with the given ids."""
        for batch in self._listed():
            if batch.metadata.get("nanovlm") == digest and batch.id not in exclude and not batch.useless:
                return batch
        return None

    def _listed(self) -> Iterator[Batch]:
        after: dict[str, str] = {}
        for _ in range(PAGES):
            page = self._ask(_Page, self.client.batches.with_raw_response.list, limit=100, **after)
            batches = []
            for one in page.data:
                with contextlib.suppress(InputError):  # a batch of another program in an unknown format
                    batches.append(validate(one, Batch, "a batch"))
            yield from batches
            if not page.has_more or not batches:
                return
            after = {"after": batches[-1].id}

    def create(self, name: str, content: bytes, digest: str, exclude: set[str]) -> Batch:
        """Upload a file of requests and create a batch, which `find` finds by its digest.

        Args:
            name: name of the file.
            content: its content.
            digest: hash of the content.
            exclude: ids of batches with this digest that are not this one.
        """
        upload = self._ask(_File, self.client.files.with_raw_response.create, file=(name, content), purpose="batch")
        create = self.client.with_options(max_retries=0).batches.with_raw_response.create
        for attempt in range(self.endpoint.tries):
            try:
                return self._ask(
                    Batch,
                    create,
                    input_file_id=upload.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={"nanovlm": digest},
                )
            except _UncertainError as error:
                problem = error
            time.sleep(min(LONGEST_PAUSE, max(0.5 * 2**attempt, problem.retry_after)))
            if (batch := self.find(digest, exclude)) is not None:
                return batch
            if problem.served:
                break
        raise problem

    def retrieve(self, batch_id: str) -> Batch | None:
        """Return a batch, or None if the endpoint does not know it."""
        try:
            return self._ask(Batch, self.client.batches.with_raw_response.retrieve, batch_id)
        except _RefusedError:
            return None

    def download(self, file_id: str, file: BinaryIO, max_bytes: int) -> bool:
        """Stream an output file of a batch into a file; return False if the endpoint does not have it."""
        try:
            with self._errors(), self.client.files.with_streaming_response.content(file_id) as response:
                save(response.iter_bytes(), file, max_bytes, SECONDS_FOR_FILE)
        except _RefusedError:
            return False
        return True

    def _ask(self, kind: type[T], call: Callable[..., Any], *arguments: Any, **options: Any) -> T:
        with self._errors():
            content = call(*arguments, **options).http_response.content
            return validate(
                parse_json(content.decode("utf-8-sig", errors="replace"), "its response"), kind, "its response"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        address = self.endpoint.address
        try:
            yield
        except openai.APIStatusError as error:
            status = error.response.status_code
            api_error = parse_error_response(status, error.response.content, error.response.headers)
            if status in _REFUSED and not api_error.no_credit:
                no_api = "has no Batch API (404): omit --batch"
                raise _RefusedError(f"{address}: {no_api if status == 404 else api_error}") from None
            if (for_all := self.endpoint.error_for_all(api_error)) is not None:
                raise for_all from None
            if status in _UNCERTAIN or status >= 500:
                raise _UncertainError(f"{address}: {api_error}", retry_after=api_error.retry_after or 0.0) from None
            raise EndpointError(f"{address}: {api_error}") from None
        except (openai.APIConnectionError, httpx2.HTTPError, BodyError) as error:
            raise _UncertainError(
                f"{address}: {first_line(error.__cause__ or error)}: nothing is lost; the same command resumes "
                "from here"
            ) from None
        except InputError as error:
            message = f"{address}: the response of the Batch API is malformed ({error})"
            raise _UncertainError(message, served=True) from None


class _RefusedError(EndpointError):
    """The endpoint refuses the request, or does not have what it names."""


class _UncertainError(EndpointError):
    """The request may have been served.

    Args:
        message: for the user.
        retry_after: seconds to wait, as requested by the endpoint.
        served: whether it certainly was, with a response that cannot be read.
    """

    def __init__(self, message: str, retry_after: float = 0.0, served: bool = False):
        super().__init__(message)
        self.retry_after, self.served = retry_after, served

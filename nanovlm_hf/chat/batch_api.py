"""The five calls of the Batch API, with validated responses of bounded size.

The `openai` client sends and retries them (unlike `client.py`, which has its own retries for a pool of requests).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, BinaryIO, TypeVar

import httpx2
import openai
from pydantic import BaseModel, BeforeValidator, Field

from ..errors import InputError, first_line
from ..files import parse_json, validate
from .api_errors import parse_error_response
from .endpoint import Endpoint, EndpointError
from .transport import BodyError, BoundedClient, save

T = TypeVar("T")
ENDED = ("completed", "failed", "expired", "cancelled")
UNSUCCESSFUL = ("failed", "expired", "cancelled")
SECONDS = 600.0  # for a response
SECONDS_FOR_FILE = 6 * 3600.0  # for an output file
PAGES = 10  # of a hundred batches; older batches are not found, and their requests are sent again


def _or(default: Any, kind: type) -> BeforeValidator:
    return BeforeValidator(lambda value: value if isinstance(value, kind) else default)


class Batch(BaseModel):
    """The fields of a batch that are used."""

    id: str = Field(pattern=r"^[\w.:-]{1,200}$")
    status: str = Field(max_length=100)
    metadata: Annotated[dict[str, Any], _or({}, dict)] = Field(default_factory=dict)
    output_file_id: Annotated[str | None, _or(None, str)] = None
    error_file_id: Annotated[str | None, _or(None, str)] = None
    errors: Any = None

    @property
    def useless(self) -> bool:
        """Whether the batch ended without replies."""
        return self.status in UNSUCCESSFUL and self.output_file_id is None


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
            max_retries=endpoint.tries,
            http_client=BoundedClient(SECONDS, timeout=SECONDS),
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

    def create(self, name: str, content: bytes, digest: str) -> Batch:
        """Upload a file of requests and create a batch, which `find` finds by its digest."""
        upload = self._ask(_File, self.client.files.with_raw_response.create, file=(name, content), purpose="batch")
        return self._ask(
            Batch,
            self.client.batches.with_raw_response.create,
            input_file_id=upload.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"nanovlm": digest},
        )

    def retrieve(self, batch_id: str) -> Batch | None:
        """Return a batch, or None if the endpoint does not know it."""
        try:
            return self._ask(Batch, self.client.batches.with_raw_response.retrieve, batch_id)
        except _NotFoundError:
            return None

    def download(self, file_id: str, file: BinaryIO, max_bytes: int) -> None:
        """Stream an output file of a batch into a file."""
        with self._errors(), self.client.files.with_streaming_response.content(file_id) as response:
            save(response.iter_bytes(), file, max_bytes, SECONDS_FOR_FILE)

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
            if status == 404:
                raise _NotFoundError(f"{address}: has no Batch API (404): omit --batch") from None
            raise self.endpoint.error_for_all(api_error) or EndpointError(f"{address}: {api_error}") from None
        except (openai.APIConnectionError, httpx2.HTTPError, BodyError) as error:
            raise EndpointError(
                f"{address}: {first_line(error.__cause__ or error)}: nothing is lost; the same command resumes "
                "from here"
            ) from None
        except InputError as error:
            raise EndpointError(f"{address}: the response of the Batch API is malformed ({error})") from None


class _NotFoundError(EndpointError):
    """Status 404."""

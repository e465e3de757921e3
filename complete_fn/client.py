"""`Client` submits tables to a service as jobs, waits with a bar, and fetches the rows with their answers as Arrow."""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa

from complete_fn.engines.openai_chat import retry_after
from complete_fn.errors import CompleteError, EngineError, InputError, JobError
from complete_fn.logs import printable
from complete_fn.ports import PORTS, has_port
from complete_fn.progress import progress_for
from complete_fn.types import Usage

OVER = ("completed", "failed", "cancelled", "expired")
FIRST_WAIT, LONGEST_WAIT = 0.2, 2.0
WAIT_SHARE = 0.02  # wait between two looks as a share of the time so far, so that the end of a short job is seen soon
CHUNK = 1 << 20


class DeliveryWarning(UserWarning):
    """A job's results cannot be written to its sink now; the service goes on trying."""


class Client:
    """A service at `url` ("http://host:8000", with or without /v1).

    If the service is busy (429), the client asks again when its Retry-After says, for `timeout` seconds at most.

    Args:
        timeout: The most seconds that a reply may take.

    Raises:
        InputError: `url` is not a URL, or its port is no port.
        EngineError: Nothing answers at `url`, or the reply is not that of a service.
        CompleteError: The service refuses a request; the error's class is the one that the service's error code names.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 300.0) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        if not has_port(self.url):
            raise InputError(f"The service's address {url!r} is no URL: {PORTS}. Write http://HOST:PORT.")
        try:
            self.http = httpx.Client(base_url=f"{self.url}/v1", headers=headers, timeout=timeout)
        except httpx.InvalidURL as error:
            raise InputError(f"The service's address {url!r} is no URL ({error}). Write http://HOST:PORT.") from error

    def submit(
        self,
        source: Any,
        model: str,
        prompt: str,
        *,
        options: Mapping[str, Any] | None = None,
        column: str = "completion",
        sink: Mapping[str, Any] | None = None,
        max_cost: Decimal | float | str | None = None,
        query_tag: str | None = None,
        idempotency_key: str | None = None,
    ) -> RemoteJob:
        """Begin a job.

        Args:
            source: path of a .parquet, .csv or .jsonl file, an Arrow table, or a frame that Arrow can read (Polars,
                pandas, DuckDB): they are uploaded. Or what the service reads by itself: {"uri": ...} under a root that
                it allows, or {"connection": ..., "sql": ...}.
            sink: where the service is to write the results: {"uri": ...}, for a .csv also "escape_formulas", or
                {"connection": ..., "table": ..., "key": ...}.
            prompt: a template over the columns, as in `complete-fn run`.
        """
        file = None if isinstance(source, Mapping) else self.upload(source)
        body = {
            "model": model,
            "prompt": prompt,
            "source": dict(source) if file is None else {"file_id": file},
            "sink": None if sink is None else dict(sink),
            "options": dict(options or {}),
            "column": column,
            "max_cost": None if max_cost is None else str(max_cost),
            "query_tag": query_tag,
            "idempotency_key": idempotency_key,
        }
        try:
            return RemoteJob(self, self.told("POST", "/jobs", json=body)["id"])
        finally:
            if file is not None:
                with suppress(CompleteError):  # the job has begun, with its own copy
                    self.ask("DELETE", f"/files/{file}")

    def upload(self, source: Any) -> str:
        """Upload a table; returns its id."""
        name, content = contents(source)
        with content:
            reply = self.told("POST", "/files", files={"file": (name, content)}, data={"purpose": "user_data"})
        return str(reply["id"])

    def job(self, name: str) -> RemoteJob:
        """The job with this id. This sends no request."""
        return RemoteJob(self, name)

    def jobs(
        self,
        limit: int = 20,
        status: str | Sequence[str] | None = None,
        model: str | None = None,
        query_tag: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
    ) -> list[dict[str, Any]]:
        """The newest jobs, as `RemoteJob.state` gives them.

        Args:
            status: only jobs with this status, or one of these.
            created_after: only jobs submitted at this time or later; UTC if it names no zone.
            created_before: only jobs submitted before this time.
        """
        given: dict[str, Any] = {"limit": limit, "status": status, "model": model, "query_tag": query_tag}
        times = {"created_after": created_after, "created_before": created_before}
        given |= {name: None if at is None else at.isoformat() for name, at in times.items()}
        asked = {name: value for name, value in given.items() if value is not None}
        found: list[dict[str, Any]] = self.told("GET", "/jobs", params=asked)["data"]
        return found

    def told(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """The reply's object."""
        reply = self.ask(method, path, **more)
        try:
            found = reply.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EngineError(no_service(reply))
        return found

    def ask(self, method: str, path: str, stream: bool = False, **more: Any) -> httpx.Response:
        """The reply; with `stream` its body is yet to be read, and the reply to be closed."""
        until = time.monotonic() + self.timeout
        while True:
            try:
                reply = self.http.send(self.http.build_request(method, path, **more), stream=stream)
                if not reply.is_success:
                    reply.read()
            except httpx.InvalidURL as error:
                raise InputError(f"{self.url}/v1{path} is no URL ({error}).") from error
            except httpx.TransportError as error:
                remedy = "Start it with `complete-fn serve`."
                raise EngineError(f"Nobody answers at {self.url} ({error}). {remedy}") from error
            wait = retry_after(reply) or FIRST_WAIT
            if reply.status_code != httpx.codes.TOO_MANY_REQUESTS or time.monotonic() + wait > until:
                refuse(reply)
                return reply
            time.sleep(wait)

    def close(self) -> None:
        """End the connections to the service. Its jobs go on."""
        self.http.close()


@dataclass(frozen=True)
class RemoteJob:
    """A job of a service."""

    client: Client
    id: str

    def state(self) -> dict[str, Any]:
        """Status, rows, usage, cost, seconds left."""
        return self.client.told("GET", f"/jobs/{self.id}")

    def wait(self, progress: bool | None = None) -> dict[str, Any]:
        """Return the state once the job is over, and its results are in their sink.

        Args:
            progress: show a bar; None shows one when a person is looking.

        Raises:
            JobError: The job failed, or its results cannot be written to the sink; the message says why.
        """
        now = self.state()
        bar, began = progress_for(now["model"], progress), time.monotonic()
        bar.start(now["rows"]["total"])
        told = None
        shown, used, paid = 0, Usage(), Decimal(0)
        try:
            while True:
                rows, usage, cost = now["rows"]["done"], Usage(**now["usage"]), Decimal(now["cost"]["amount"])
                bar.advance(rows - shown, less(usage, used), cost - paid, now["cost"]["currency"])
                shown, used, paid = rows, usage, cost
                if now["status"] in OVER and (now["sink"] or {}).get("status") not in ("waiting", "writing"):
                    break
                if now["sink"] is not None and now["sink"]["error"] not in (None, told):
                    told = now["sink"]["error"]
                    text = f"The results of job {self.id} are not written yet, and will be tried again: {told}"
                    warnings.warn(printable(text), DeliveryWarning, stacklevel=2)
                time.sleep(min(max(FIRST_WAIT, WAIT_SHARE * (time.monotonic() - began)), LONGEST_WAIT))
                now = self.state()
        finally:
            bar.stop()
        if now["status"] == "failed":
            raise JobError(f"Job {self.id} failed: {now['error']}")
        if now["sink"] is not None and now["sink"]["status"] == "failed":
            raise JobError(f"Job {self.id} is {now['status']}; its results were not written: {now['sink']['error']}")
        return now

    def results(self, details: bool = False, partial: bool = False) -> pa.Table:
        """The rows with their answers.

        Args:
            partial: Fetch only the rows that are done, also before the job is over. A completed job gives all rows.
        """
        query = {"format": "arrow", "details": details, "partial": partial}
        reply = self.client.ask("GET", f"/jobs/{self.id}/results", params=query)
        return pa.ipc.open_stream(reply.content).read_all()

    def download(self, format: str, details: bool = False, escape_formulas: bool = False) -> Iterator[bytes]:
        """The results as a file of that format, in pieces.

        Args:
            escape_formulas: in a CSV, put an apostrophe before text that a spreadsheet would run as a formula.
        """
        query: dict[str, str | bool] = {"format": format, "details": details}
        if escape_formulas:
            query["escape_formulas"] = True
        with closing(self.client.ask("GET", f"/jobs/{self.id}/results", stream=True, params=query)) as reply:
            try:
                yield from reply.iter_bytes(CHUNK)
            except httpx.RequestError as error:
                again = f"Fetch them again: complete-fn jobs results {self.id} -o FILE."
                raise EngineError(f"The results of job {self.id} broke off ({error}). {again}") from error

    def cancel(self) -> None:
        """Stop the job; the rows that are done stay."""
        self.client.ask("POST", f"/jobs/{self.id}/cancel")

    def rerun(self, max_cost: Decimal | float | str | None = None) -> None:
        """Run the rows without an answer again; `max_cost` is a new cap for the whole job."""
        body = {"max_cost": None if max_cost is None else str(max_cost)}
        self.client.ask("POST", f"/jobs/{self.id}/rerun", json=body)

    def deliver(self) -> None:
        """Write its results to its sink again; nothing is asked or paid again."""
        self.client.ask("POST", f"/jobs/{self.id}/deliver")

    def delete(self) -> None:
        """Delete its input, results and stored answers."""
        self.client.ask("DELETE", f"/jobs/{self.id}")


def contents(source: Any) -> tuple[str, Any]:
    """(file name, open file) of the source to upload."""
    if isinstance(source, str | Path):
        try:
            return Path(source).name, Path(source).open("rb")
        except OSError as error:
            raise InputError(f"{str(source)!r} cannot be read: {error.strerror}.") from error
    from pyarrow import parquet

    try:
        table = source if isinstance(source, pa.Table) else pa.table(source)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(f"A {type(source).__name__} is neither a path nor a table that Arrow can read.") from error
    sink = io.BytesIO()
    parquet.write_table(without_views(table), sink)
    sink.seek(0)
    return "table.parquet", sink


def without_views(table: pa.Table) -> pa.Table:
    """The table with plain texts and bytes: pyarrow 20 writes no views to Parquet, and Polars gives text as views."""
    plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return table.cast(pa.schema([field.with_type(plain.get(field.type, field.type)) for field in table.schema]))


def refuse(reply: httpx.Response) -> None:
    """Raise the error that the error code names. An HTML page, or a redirect to one, is no reply of a service."""
    if reply.is_success and not reply.headers.get("content-type", "").startswith("text/html"):
        return
    try:
        error = {} if reply.is_success else reply.json()["error"]
        message, code = str(error["message"]), error["code"]
    except (ValueError, KeyError, TypeError):
        message, code = no_service(reply), None
    raise next((kind for kind in kinds(CompleteError) if kind.code == code), EngineError)(message)


def no_service(reply: httpx.Response) -> str:
    where = f" with a redirect to {reply.headers['location']}" if reply.has_redirect_location else ""
    return f"{reply.url} answers {reply.status_code}{where}; is a complete-fn service there?"


def kinds(root: type[CompleteError]) -> Iterator[type[CompleteError]]:
    yield root
    for kind in root.__subclasses__():
        yield from kinds(kind)


def less(a: Usage, b: Usage) -> Usage:
    return Usage(
        a.prompt_tokens - b.prompt_tokens,
        a.cached_tokens - b.cached_tokens,
        a.completion_tokens - b.completion_tokens,
    )

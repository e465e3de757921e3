"""An HTTP client that notes what a service answers, for the golden files of the API, and the engine behind it."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from typing import Any

import httpx
import pyarrow as pa
from pyarrow import parquet

from complete_fn import Completion, CompletionRequest, EchoEngine, Usage
from complete_fn.errors import EngineError
from tests.golden_files import as_json, check_golden, normalised

ID = re.compile(r"\b(chatcmpl-|cmpl-|file-|job_|batch_)([0-9a-f]{24})")
TIME = re.compile(r"created|[a-z_]+_at")
DULL = {"date", "server", "content-length", "connection", "transfer-encoding"}
CSV = b"id,text\n1,one\n2,\n3,two words\n4,one\n"
FAILURES = {"bad": "blocked", "late": "timeout", "misfit": "schema_mismatch"}
WAREHOUSES = ("snowflake", "bigquery", "redshift", "postgres")
OVER = ("completed", "failed", "cancelled", "expired")


class Moody(EchoEngine):
    """Answers a schema with an object of it. Some words bring failures: of a row, always or once, and of the engine."""

    def __init__(self) -> None:
        super().__init__(64)
        self.tried: set[str] = set()
        self.gate = threading.Event()

    def complete(self, request: CompletionRequest) -> Completion:
        text = "\n".join(m.content for m in request.prompt) if isinstance(request.prompt, tuple) else request.prompt
        words = text.split()
        if "held" in words:
            self.gate.wait(60)
        if "down" in words:
            raise EngineError("The engine is down.\nIts log's tail, which is not for callers.")
        if "broken" in words:
            raise ValueError("A fault of ours.")
        if request.response_format is not None:
            names = json.loads(request.response_format).get("properties", {})
            return Completion(json.dumps(dict.fromkeys(names, "x")), "stop", usage=Usage(len(words), 0, 4))
        failing = [word for word in words if word in FAILURES or (word == "once" and text not in self.tried)]
        self.tried.add(text)
        if not failing:
            return super().complete(request)
        code = FAILURES.get(failing[0], "timeout")
        return Completion.failed(code, f"Refused as {code}.", Usage(len(words), 0, 0))


class Recorder:
    """Asks a service and notes what it answers; ids become their number, times and measured seconds words."""

    def __init__(self, http: httpx.Client, names: dict[str, str] | None = None) -> None:
        self.http, self.names = http, names or {}
        self.exchanges: list[dict[str, Any]] = []
        self.ids: dict[str, str] = {}

    def ask(self, request: str, *, open_fields: tuple[str, ...] = (), **given: Any) -> httpx.Response:
        """Ask "METHOD PATH" and note the reply.

        Args:
            open_fields: what depends on how far the service is by then.
            given: as httpx takes it.
        """
        method, path = request.split(" ", 1)
        reply = self.http.request(method, path, **given)
        noted: dict[str, Any] = {"request": request}
        if given:
            noted["with"] = shown(given)
        noted["status"] = reply.status_code
        noted["headers"] = {name: header(name, value) for name, value in reply.headers.items() if name not in DULL}
        noted["body"] = without_time(body_of(reply), open_fields)
        self.exchanges.append(noted)
        return reply

    def wait(self, path: str) -> dict[str, Any]:
        """The job or batch, once it is over; not noted."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            found: dict[str, Any] = self.http.get(path).json()
            if found["status"] in OVER and (found.get("sink") or {}).get("status") not in ("waiting", "writing"):
                return found
            time.sleep(0.03)
        raise AssertionError(found)

    def upload(self, content: bytes = CSV, name: str = "rows.csv", purpose: str = "user_data") -> str:
        """A file's id; not noted."""
        reply = self.http.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose})
        return str(reply.json()["id"])

    def check(self, family: str) -> None:
        text = ID.sub(self.numbered, as_json(self.exchanges))
        check_golden(f"api/{family}.json", normalised(text, self.names))

    def numbered(self, found: re.Match[str]) -> str:
        return f"{found[1]}<{self.ids.setdefault(found[2], str(len(self.ids) + 1))}>"


def shown(value: Any) -> Any:
    """What was sent, as JSON can have it."""
    if isinstance(value, bytes):
        value = "<gzip>" if value.startswith(b"\x1f\x8b") else value.decode()
    if isinstance(value, str):
        return value if len(value) < 100 else f"{value[:20]}... of {len(value):,} characters"
    if isinstance(value, dict):
        return {name: shown(found) for name, found in value.items()}
    return [shown(found) for found in value] if isinstance(value, list | tuple) else value


def header(name: str, value: str) -> str:
    """A header; how long a rate limit has still to wait differs, and the text format of the library for metrics."""
    return "<seconds>" if name == "x-ratelimit-reset-tokens" else re.sub(r"version=[\d.]+", "version=<version>", value)


def body_of(reply: httpx.Response) -> Any:
    kind = reply.headers.get("content-type", "").partition(";")[0]
    if kind == "application/json":
        return reply.json()
    if kind == "text/event-stream":
        events = (line.removeprefix("data: ") for line in reply.text.split("\n\n") if line)
        return [json.loads(event) if event.startswith("{") else event for event in events]
    if reply.content[:4] == b"PAR1":
        return rows_of(parquet.read_table(io.BytesIO(reply.content)))
    if kind == "application/vnd.apache.arrow.stream":
        return rows_of(pa.ipc.open_stream(reply.content).read_all())
    return reply.text.splitlines()


def rows_of(table: pa.Table) -> dict[str, Any]:
    return {
        "schema": {f.name: str(f.type) for f in table.schema},
        "rows": json.loads(json.dumps(table.to_pylist(), default=str)),
    }


def without_time(found: Any, open_fields: tuple[str, ...]) -> Any:
    """The body with words for its times and measured seconds, and for the open fields."""
    if isinstance(found, list):
        return [without_time(value, open_fields) for value in found]
    if not isinstance(found, dict):
        return found
    plain: dict[str, Any] = {}
    for name, value in found.items():
        if name in open_fields:
            plain[name] = "<open>"
        elif TIME.fullmatch(name) and isinstance(value, int | float) and value:
            plain[name] = "<time>"
        elif name == "eta_seconds" and value is not None:
            plain[name] = "<seconds>"
        else:
            plain[name] = without_time(value, open_fields)
    return plain

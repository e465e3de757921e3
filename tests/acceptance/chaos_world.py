"""What `test_chaos2` adds to a `Site`: two APIs, three workers, tenants, a lying endpoint, a sink that goes away."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import redis
import sqlalchemy as sa

from complete_fn.errors import StoreError
from complete_fn.jobs.api_keys import KeyStore
from complete_fn.jobs.connections import Connections
from complete_fn.store.schema import HEAD
from deploy.servers import Postgres, Redis, free_port, running
from tests.acceptance.chaos import Site

APIS, WORKERS = ("api-1", "api-2"), ("worker-1", "worker-2", "worker-3")
FAILING_CHILD = Path(__file__).parents[1] / "integration" / "workers" / "engine" / "failing_child.py"
# At the start of a worker's interpreter: its clock is {seconds} s ahead, its embedded engine's child has no model.
CUSTOM = f"""
import sys, time
clock = time.time
time.time = lambda: clock() + {{seconds}}
from complete_fn_workers.engine import launch
find = launch.importlib.util.find_spec
launch.importlib.util.find_spec = lambda name, *more: name == "vllm" or find(name, *more)
real = launch.child_command
launch.child_command = lambda *given: [sys.executable, {str(FAILING_CHILD)!r}, *real(*given)[4:]]
"""
MODELS = """
[models.tiny]
engine = 'echo'
checkpoint = 'tiny'
max_model_len = 40
engine_args = {{ row_seconds = 0.02 }}
prices = {{ input = 1, cached_input = 1, output = 2 }}

[models.remote]
url = 'http://127.0.0.1:{port}/v1'
max_model_len = 200
prices = {{ input = 1, cached_input = 1, output = 2 }}

[models.frail]
checkpoint = '{folder}'
max_model_len = 200
prices = {{ input = 1, cached_input = 1, output = 2 }}
"""


class FaultyEndpoint(BaseHTTPRequestHandler):
    """Echoes the last message; drops the connection at `drop`, and reports a million tokens at `lie`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        if "drop" in text:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        count = len(text.split())
        usage = {"prompt_tokens": count, "completion_tokens": 1_000_000 if "lie" in text else count}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        reply = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        pass


class Gate:
    """A TCP port before a database. While it is shut nobody gets through, and open connections break."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, free_port()
        self.listener: socket.socket | None = None
        self.links: list[socket.socket] = []
        self.is_open = False
        self.open()

    def open(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.is_open = True
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def shut(self) -> None:
        self.is_open = False
        if self.listener is not None:
            with suppress(OSError):
                self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
        for link in self.links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self.links.clear()

    def accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                one, _ = listener.accept()
                other = socket.create_connection(("127.0.0.1", self.target))
                self.links += [one, other]
                for source, sink in ((one, other), (other, one)):
                    threading.Thread(target=pour, args=(source, sink), daemon=True).start()


def pour(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65_536):
            sink.sendall(piece)
    for link in (source, sink):
        with suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


@dataclass
class World(Site):
    """A `Site` of `APIS` and `WORKERS`, with what the faults of `WORLD_FAULTS` act on.

    Attributes:
        away: how long a process, a sink or the disk's space is away, in seconds.
    """

    storage: Path = Path()
    sink: str = ""  # the URL of the sink's database, past the gate
    gate: Gate | None = None
    ports: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    away: float = 3.0
    asked: int = 0
    ending: list[threading.Thread] = field(default_factory=list)

    def command(self, name: str) -> list[str]:
        if name in APIS:
            verb = ["serve", "--port", str(self.ports[name]), "--workers", "0"]
        else:
            verb = ["worker", "--poll-seconds", "2"]
        home = self.home if name == APIS[0] else self.home / name
        return [sys.executable, "-m", "complete_fn", *verb, "--home", str(home)]

    def environment_of(self, name: str) -> dict[str, str]:
        if name in APIS:
            return self.environment
        path = os.pathsep.join([str(self.home / name), self.environment.get("PYTHONPATH", "")])
        return {**self.environment, "PYTHONPATH": path}

    def port_of_api(self) -> int:
        """Each request goes to the other API than the one before."""
        self.asked += 1
        return self.ports[APIS[self.asked % len(APIS)]]

    def ask(self, method: str, path: str, tenant: str = "acme", **given: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}", **given.pop("headers", {})}
        return super().ask(method, path, headers=headers, **given)

    def later(self, what: Callable[[], object]) -> None:
        """Call `what` when the time of being away is over."""

        def go() -> None:
            time.sleep(self.away)
            what()

        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        self.ending.append(thread)

    def customise(self, name: str, clock: float) -> None:
        (self.home / name / "sitecustomize.py").write_text(CUSTOM.format(seconds=clock))

    def restart_with_clock(self, name: str, seconds: float) -> None:
        self.customise(name, seconds)
        self.kill(name)

    def suspend(self, name: str) -> None:
        """The process stands still for longer than its leases last, which others take."""
        child = self.processes[name]
        child.send_signal(signal.SIGSTOP)
        self.steal_leases()
        self.later(lambda: child.send_signal(signal.SIGCONT))

    def fill_disk(self) -> None:
        filler = self.storage / ".filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"\0" * 65_536)
        self.later(lambda: filler.unlink(missing_ok=True))

    def corrupt(self, choose: random.Random) -> None:
        found = sorted(self.storage.glob("**/result-*.parquet"))
        if found:
            with suppress(OSError):
                choose.choice(found).write_bytes(b"not what was written")

    def crash_postgres(self) -> None:
        """A backend is killed, at which PostgreSQL ends all sessions and recovers from its log."""
        with suppress(sa.exc.DBAPIError, StoreError), self.store.read() as connection:
            pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
            os.kill(pid, signal.SIGKILL)
            connection.execute(sa.text("SELECT 1"))

    def upgrade(self) -> None:
        """Processes of a newer version have come, and those of the old one must go; then they come back as the new."""
        self.set_version("9001")
        self.later(lambda: self.set_version(HEAD))

    def set_version(self, version: str) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(StoreError), self.store.write() as connection:
                connection.execute(sa.text("UPDATE alembic_version SET version_num = :v"), {"v": version})
                return

    def shut_sink(self) -> None:
        if self.gate is not None and self.gate.is_open:
            self.gate.shut()
            self.later(self.gate.open)

    def settle(self) -> None:
        for thread in self.ending:
            thread.join()


WORLD_FAULTS: dict[str, Callable[[World, random.Random], object]] = {
    "worker killed": lambda w, c: w.kill(c.choice(WORKERS)),
    "API killed": lambda w, c: w.kill(c.choice(APIS)),
    "engine killed": lambda w, c: w.kill_engine(c),
    "process suspended beyond its lease": lambda w, c: w.suspend(c.choice(WORKERS)),
    "clock a minute ahead": lambda w, c: w.restart_with_clock(WORKERS[0], 60),
    "clock a minute behind": lambda w, c: w.restart_with_clock(WORKERS[1], -60),
    "FLUSHALL": lambda w, c: redis.Redis.from_url(w.redis.url).flushall(),
    "Redis killed": lambda w, c: w.redis.restart(signal.SIGKILL, pause=0.5),
    "PostgreSQL killed": lambda w, c: w.crash_postgres(),
    "disk full": lambda w, c: w.fill_disk(),
    "part corrupt": lambda w, c: w.corrupt(c),
    "sink away": lambda w, c: w.shut_sink(),
    "store upgraded": lambda w, c: w.upgrade(),
    "leases stolen": lambda w, c: w.steal_leases(),
    "messages redelivered": lambda w, c: w.redeliver("tiny"),
}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, where this user may mount one; else the folder, whose disk is never full."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield folder
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def world(home: Path, model: Path, disk: str, away: float) -> Iterator[World]:
    home.mkdir(parents=True)
    with ExitStack() as stack:
        postgres, broker = stack.enter_context(running(Postgres)), stack.enter_context(running(Redis))
        sink = stack.enter_context(postgres.database())
        storage = stack.enter_context(small_disk(home / "storage", disk))
        endpoint = ThreadingHTTPServer(("127.0.0.1", 0), FaultyEndpoint)
        stack.callback(endpoint.server_close)
        stack.callback(endpoint.shutdown)
        threading.Thread(target=endpoint.serve_forever, daemon=True).start()
        gate = Gate(postgres.port)
        stack.callback(gate.shut)
        (home / "models.toml").write_text(MODELS.format(port=endpoint.server_port, folder=model))
        environment = {
            **os.environ,
            "COMPLETE_FN_DATABASE": postgres.url,
            "COMPLETE_FN_BROKER": broker.url,
            "COMPLETE_FN_MODELS": str(home / "models.toml"),
            "COMPLETE_FN_STORAGE": str(storage),
            "COMPLETE_FN_SINK_URL": sink.replace(f":{postgres.port}/", f":{gate.port}/"),
            "COMPLETE_FN_SECRET": "chaos",
        }
        ports = {name: free_port() for name in APIS}
        servers: dict[str, Any] = {"storage": storage, "sink": sink, "gate": gate, "ports": ports}
        found = World(home, postgres, broker, ports[APIS[0]], environment, **servers, away=away)
        keys = KeyStore(found.store)
        found.keys = {tenant: keys.create(tenant, "u") for tenant in ("acme", "bolt")}
        Connections(found.store).add("acme", "sink", "COMPLETE_FN_SINK_URL", True)
        stack.callback(found.end)
        for name in (*APIS, *WORKERS):
            (home / name).mkdir()
            found.customise(name, 0.0)
            found.start(name)
        threading.Thread(target=found.supervise, daemon=True).start()
        found.ask("GET", "/readyz")
        yield found
        found.settle()

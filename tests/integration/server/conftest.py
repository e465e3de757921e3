"""A real server in a thread of the test, on a port of its own, answered by engines that ship with the core."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import psycopg
import pytest

from complete_fn import EchoEngine
from complete_fn.server.app import make_app
from complete_fn.server.connection_guard import ConnectionBounds, make_server, run_server
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from complete_fn.worker.maintenance import Maintenance
from deploy.servers import binary
from tests.api_recorder import Moody, Recorder
from tests.golden_files import plain_environment

SQL = Path(__file__).parents[3] / "sql" / "complete_fn_sql"
MODELS = """
[models.echo]
checkpoint = 'echo'
max_model_len = 64
default_max_tokens = 8
prices = { input = 1, cached_input = 0.5, output = 2 }

[models.other]
checkpoint = 'other'
max_model_len = 64
prices = { input = 10, cached_input = 5, output = 20 }
"""


@dataclass
class Running:
    """A server that runs: its state, its address, and clients for it."""

    state: ServiceState
    url: str
    end: Callable[[], None] = lambda: None

    def http(self, key: str = "") -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=180)

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=180)


def write_models(folder: Path) -> Path:
    path = folder / "models.toml"
    path.write_text(MODELS)
    return path


@contextmanager
def at_service(
    engines: EngineHost,
    loopback: bool = True,
    maintenance: Maintenance | None = None,
    bounds: ConnectionBounds | None = None,
) -> Iterator[Running]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(make_app(engines, loopback, maintenance=maintenance), graceful_seconds=1)
    serving = (server, listener, bounds or ConnectionBounds())
    thread = threading.Thread(target=run_server, args=serving, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    yield Running(engines.state, f"http://127.0.0.1:{listener.getsockname()[1]}")
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def models_file(tmp_path: Path) -> Path:
    return write_models(tmp_path)


@pytest.fixture
def serve(tmp_path: Path, models_file: Path) -> Iterator[Callable[..., Running]]:
    """Call it for a server: `serve(engine=..., loopback=...)`; all end with the test."""
    with ExitStack() as stack:

        def start(
            engine: Any = None, loopback: bool = True, bounds: ConnectionBounds | None = None, **more: Any
        ) -> Running:
            engines = EngineHost(ServiceState(tmp_path / "home", models_file, engine or EchoEngine(64), **more))
            own = stack.enter_context(ExitStack())
            return replace(own.enter_context(at_service(engines, loopback, bounds=bounds)), end=own.close)

        yield start


@pytest.fixture
def running(serve: Callable[..., Running]) -> Running:
    """A server on EchoEngine, loopback, without keys."""
    return serve()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Such a server for all tests that leave nothing behind in it: no keys, no jobs."""
    folder = tmp_path_factory.mktemp("shared")
    with at_service(EngineHost(ServiceState(folder / "home", write_models(folder), EchoEngine(64)))) as found:
        yield found


@pytest.fixture(scope="module")
def plain_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For golden files: no setting of whoever runs the tests reaches the service."""
    with pytest.MonkeyPatch.context() as patch:
        plain_environment(patch, tmp_path_factory.mktemp("certificates"))
        yield


@pytest.fixture(scope="module")
def working(plain_settings: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service that runs its jobs itself. Each test is a tenant of its own, so none sees what another left."""
    folder = tmp_path_factory.mktemp("working")
    with at_service(EngineHost(ServiceState(folder / "home", write_models(folder), Moody()))) as running:
        yield running


@pytest.fixture(scope="module")
def waiting(plain_settings: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service whose workers would be other processes, of which there are none: its jobs stay queued."""
    folder = tmp_path_factory.mktemp("waiting")
    engines = EngineHost(ServiceState(folder / "home", write_models(folder), EchoEngine(64)))
    with at_service(engines, maintenance=Maintenance(engines)) as running:
        yield running


def recorded(running: Running, request: pytest.FixtureRequest) -> Iterator[Recorder]:
    tenant = re.sub(r"\W+", "-", request.node.name).strip("-")
    with running.http(running.state.keys.create(tenant, "ann")) as http:
        yield Recorder(http, {tenant: "<tenant>"})


@pytest.fixture
def record(working: Running, request: pytest.FixtureRequest) -> Iterator[Recorder]:
    """What notes the replies of `working` for a golden file."""
    yield from recorded(working, request)


@pytest.fixture
def queued(waiting: Running, request: pytest.FixtureRequest) -> Iterator[Recorder]:
    """What notes the replies of `waiting` for a golden file."""
    yield from recorded(waiting, request)


def psql(url: str, script: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [binary("psql"), "-X", "-q", "-d", url, "-f", str(SQL / script), *more]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def installed(postgres_url: str) -> Iterator[Callable[[Running, str], psycopg.Connection[Any]]]:
    """Call it with a service and its key for a superuser's connection to a database that has the functions."""
    opened: list[psycopg.Connection[Any]] = []

    def install(running: Running, key: str = "") -> psycopg.Connection[Any]:
        done = psql(postgres_url, "postgres_install.sql", COMPLETE_FN_URL=running.url, COMPLETE_FN_KEY=key)
        assert (done.returncode, done.stderr) == (0, "")
        # The superuser's name is complete_fn, so a new table would go into the schema of that name.
        opened.append(psycopg.connect(postgres_url, autocommit=True, options="-c search_path=public"))
        return opened[-1]

    yield install
    for connection in opened:
        connection.close()
    assert psql(postgres_url, "postgres_uninstall.sql").returncode == 0


Install = Callable[..., psycopg.Connection[Any]]

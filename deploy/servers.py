"""PostgreSQL and Redis of our own, for tests and `make service`: on free ports, gone with whoever starts them."""

from __future__ import annotations

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

READY_SECONDS = 60
MISSING = "{0!r} is neither in PATH nor in /usr/lib/postgresql/*/bin. `make services` brings it."


class Server:
    """A child process on a free port of 127.0.0.1, which ends with the process that started it.

    Its state is in `folder`, which is kept, by default in a new one.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.port = free_port()
        self.user = unprivileged()
        self.kept = folder is not None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="complete-fn-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        self.child: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def ready(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.child = STARTER.submit(
                subprocess.Popen,
                self.command(),
                cwd=self.folder,
                user=self.user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            ).result()
        until = time.monotonic() + READY_SECONDS
        while not self.ready():
            if self.child.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self.command()[0]} does not start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.child is None:
            return
        self.child.send_signal(how)
        try:
            self.child.wait(READY_SECONDS)
        finally:
            self.child.kill()
            self.child.wait()
            self.child = None

    def restart(self, how: signal.Signals = signal.SIGTERM, pause: float = 0.0) -> None:
        """End it as the signal says and, `pause` seconds later, start it again on the same port and folder."""
        self.stop(how)
        time.sleep(pause)
        self.start()

    def remove(self) -> None:
        """Stop it and forget all it held. Harmless twice."""
        self.stop(signal.SIGINT)
        shutil.rmtree(self.folder, ignore_errors=True)


class Postgres(Server):
    """SIGINT ends its sessions in order, SIGQUIT at once as a crash does; committed transactions survive both."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        secret = self.folder / "password"
        if (self.folder / "state").is_dir():
            self.password = secret.read_text()
            return
        self.password = secrets.token_hex(8)
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        if self.user is not None:
            shutil.chown(secret, self.user)
        options = ["-U", "complete_fn", "--auth=scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "--locale=C"]
        command = [binary("initdb"), "-D", str(self.folder / "state"), *options]
        command += [] if self.kept else ["--no-sync"]
        done = subprocess.run(command, cwd=self.folder, user=self.user, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"initdb fails: {done.stderr or done.stdout}")

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "on" if self.kept else "off",  # a test's machine does not crash, only the server does
            "max_connections": "200",
        }
        given = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [binary("postgres"), "-D", str(self.folder / "state"), "-p", str(self.port), *given]

    def ready(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    @property
    def url(self) -> str:
        """Of the database that every server has; tests take `database()`."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://complete_fn:{self.password}@127.0.0.1:{self.port}/{database}"

    @contextmanager
    def database(self) -> Iterator[str]:
        """URL of a new, empty database that goes at the end."""
        import psycopg

        name = f"test_{secrets.token_hex(6)}"
        self.run(f"CREATE DATABASE {name}")
        try:
            yield self.url_of(name)
        finally:
            with psycopg.connect(self.url, autocommit=True) as connection:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())

    def run(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement.encode())


class Redis(Server):
    """Keeps nothing on disk: a restart loses every message, as a broker's may."""

    def command(self) -> list[str]:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        return [binary("redis-server"), *options]

    def ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as link:
                link.sendall(b"PING\r\n")
                return link.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    @property
    def url(self) -> str:
        """Tests that share the server take a key prefix of their own, or another number than 0 (there are 0 to 15)."""
        return f"redis://127.0.0.1:{self.port}/0"


S = TypeVar("S", bound=Server)


@contextmanager
def running(kind: type[S]) -> Iterator[S]:
    """A server that has started; it is removed at the end, after a failure too."""
    server = kind()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@contextmanager
def kept(kind: type[S], folder: Path) -> Iterator[S]:
    """A server that has started; what it holds stays in `folder` for the next time."""
    server = kind(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGINT)


def binary(name: str) -> str:
    """Raises:
    RuntimeError: it is not installed; the message says what brings it.
    """
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, versions)])
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(MISSING.format(name))
    return found


def unprivileged() -> str | None:
    """Whom to run as: PostgreSQL refuses root."""
    if os.geteuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in names)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# The signal below comes when the *thread* ends that started the child, so one that lives as long as we do starts all.
STARTER = ThreadPoolExecutor(1)
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """In the new process: SIGINT when the one that started it dies, kill -9 included (Linux)."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGINT)

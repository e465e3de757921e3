"""The servers that tests start: they answer, survive a restart, and leave nothing behind."""

from __future__ import annotations

import signal
import socket
import tempfile
from pathlib import Path

import psycopg
import pytest

from deploy.servers import Postgres, Redis, binary, running


def query(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        done = connection.execute(statement.encode())
        return done.fetchall() if done.description else []


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_postgres_keeps_what_was_committed_over_a_restart(how: signal.Signals) -> None:
    with running(Postgres) as server, server.database() as url:
        query(url, "CREATE TABLE t AS SELECT 7 AS n")
        server.restart(how)
        assert query(url, "SELECT n FROM t") == [(7,)]
        folder, port = server.folder, server.port
    assert not folder.exists()
    assert not taken(port)


def test_what_is_kept_outlives_a_power_cut(postgres: Postgres) -> None:
    """The ledger of `make service` is written through to the disk; a test's own server need not."""
    kept = Postgres(Path(tempfile.mkdtemp(prefix="complete-fn-")))
    kept.start()
    try:
        assert query(kept.url, "SHOW fsync") == [("on",)]
    finally:
        kept.remove()
    assert query(postgres.url, "SHOW fsync") == [("off",)]


def test_a_test_gets_an_empty_database(postgres: Postgres) -> None:
    with postgres.database() as first, postgres.database() as second:
        query(first, "CREATE TABLE t AS SELECT 1")
        assert query(second, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        query(first, "SELECT 1")


def test_redis_forgets_in_a_restart() -> None:
    def ask(line: str) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as link:
            link.sendall(f"{line}\r\n".encode())
            return link.recv(64)

    with running(Redis) as server:
        assert ask("SET k v") == b"+OK\r\n"
        assert ask("GET k") == b"$1\r\nv\r\n"
        server.restart(signal.SIGKILL)
        assert ask("GET k") == b"$-1\r\n"
        folder = server.folder
    assert not folder.exists()


def test_a_server_that_does_not_start_says_why() -> None:
    class Broken(Redis):
        def command(self) -> list[str]:
            return [*super().command(), "--no-such-option", "1"]

    with pytest.raises(RuntimeError, match="no-such-option"), running(Broken):
        pass


def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(RuntimeError, match="make services"):
        binary("no-such-server")

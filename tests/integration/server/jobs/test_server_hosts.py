"""Hosts of one service whose clocks are wrong, and processes of an older version beside a newer one."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from complete_fn.store.schema import HEAD
from complete_fn.store.tables import attempts, ledger
from deploy.servers import Redis
from tests.clocks import shifted_clock
from tests.integration.server.jobs.test_server_workers import site, small_parts, until, whole

__all__ = ["small_parts"]  # the fixture


def test_workers_whose_clocks_are_a_minute_off_take_nothing_from_each_other(
    tmp_path: Path, redis_server: Redis, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPLETE_FN_DATABASE", postgres_url)
    began = time.time()
    with site(tmp_path / "home", redis_server.url) as found, (tmp_path / "log").open("w") as log:
        for seconds in (60, -60):
            found.work(own=shifted_clock(tmp_path / str(seconds), seconds), stderr=log)
        job = found.submit(600)
        until(lambda: len([b for b in found.beats() if b.in_flight]) == 2)
        time.sleep(6)  # a sweep of each
        found.finish(job)
        whole(found, job, 600)
        assert all(part.tries == 0 for part in found.state.jobs.parts(job))
        with found.state.store.read() as connection:
            assert "lost" not in set(connection.execute(sa.select(attempts.c.status)).scalars())
            times = list(connection.execute(sa.select(ledger.c.at)).scalars())
        assert began - 2 < min(times) <= max(times) < time.time() + 2
    told = (tmp_path / "log").read_text()
    assert "60.0 s ahead of the database's" in told
    assert "60.0 s behind the database's" in told


def test_processes_of_an_older_version_drain_once_the_store_is_upgraded(
    tmp_path: Path, redis_server: Redis, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPLETE_FN_DATABASE", store_url)
    with site(tmp_path / "home", redis_server.url) as found:
        old = found.work(stderr=subprocess.PIPE)
        job = found.submit(400)
        until(lambda: found.done(job) > 20)
        upgrade(found.state.store.engine, "9001")
        assert old.stderr is not None
        told = old.stderr.read().decode()
        assert old.wait(60) == 0
        assert "A newer complete-fn has upgraded the store." in told
        until(lambda: found.http.get("/readyz").status_code == 503)
        refused = found.http.get(f"/v1/jobs/{job}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_upgraded")
        parts = found.state.jobs.parts(job)
        assert {part.status for part in parts} == {"queued", "done"}
        upgrade(found.state.store.engine, HEAD)
        found.state.store.is_outdated = False  # as after a restart in the new version
        found.work()
        found.finish(job)
        whole(found, job, 400)


def upgrade(engine: sa.Engine, version: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :v"), {"v": version})

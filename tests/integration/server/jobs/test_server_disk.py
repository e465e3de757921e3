"""Disks that are full for a while, files that are lost or damaged: no paid answer is lost, none is paid twice."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from complete_fn import EchoEngine
from complete_fn.engines.prices import nano
from complete_fn.errors import JobError, StorageError
from complete_fn.jobs.job import Job
from complete_fn.rows.object_storage import Storage, storage_faults
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.job_files import part_file
from complete_fn.service.rerun import rerun
from complete_fn.service.state import ServiceState
from complete_fn.store.tables import attempts, ledger
from tests.integration.server.conftest import write_models
from tests.integration.server.jobs.test_server_jobs import parquet_bytes
from tests.integration.server.jobs.test_server_leases import rows_of, run_to_end, submit

ROOT = Path(__file__).parents[4]
PAID = ("input", "cached_input", "output")


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[EngineHost]:
    engines = EngineHost(ServiceState(tmp_path / "home", write_models(tmp_path), EchoEngine()))
    yield engines
    engines.close()


@pytest.fixture
def state(engines: EngineHost) -> ServiceState:
    return engines.state


class FullForAWhile(Storage):
    """A storage whose disk is full for some writes or reads of the keys that it is told."""

    def __init__(self, url: str, what: str, times: int) -> None:
        super().__init__(url)
        self.what, self.times, self.refused = what, times, 0

    def refuse(self, key: str) -> None:
        if self.what in key and self.refused < self.times:
            self.refused += 1
            with storage_faults("/operator/only", key):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/operator/only")

    @contextmanager
    def writing(self, key: str) -> Iterator[Any]:
        with super().writing(key) as sink:
            yield sink
            self.refuse(key)

    @contextmanager
    def reading(self, key: str) -> Iterator[Any]:
        with super().reading(key) as source:
            yield source
            self.refuse(key)


def billed(state: ServiceState) -> int:
    with state.store.read() as connection:
        paid = sa.select(sa.func.sum(ledger.c.tokens)).where(ledger.c.price_class.in_(PAID))
        return int(connection.execute(paid).scalar() or 0)


def tokens_of(rows: list[dict[str, Any]]) -> int:
    return sum(row["usage"]["prompt_tokens"] + row["usage"]["completion_tokens"] for row in rows)


@pytest.mark.parametrize("what", ["result-", "part-"])
def test_a_part_waits_at_its_end_until_the_storage_is_back(state: ServiceState, engines: EngineHost, what: str) -> None:
    job = submit(state, 50)
    state.storage = full = FullForAWhile(state.storage.url, what, 6)
    done = run_to_end(engines, job)
    assert (done.status, full.refused) == ("completed", 6)
    (part,) = state.jobs.parts(job.id)
    assert part.tries == 0
    with state.store.read() as connection:  # one claim of the part, which waited
        assert connection.execute(sa.select(sa.func.count()).select_from(attempts)).scalar() == 1
    rows = rows_of(state, done)
    assert [row["error"] for row in rows] == [None] * 50
    assert billed(state) == tokens_of(rows)
    assert nano(sum(row["cost"] for row in rows)) == state.jobs.counts(done).cost_nano


def test_a_storage_that_does_not_come_back_fails_the_job_in_words_for_tenants(
    state: ServiceState, engines: EngineHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.store.transactions.AWAY_SECONDS", 0.1)
    monkeypatch.setattr("complete_fn.worker.part_runner.RETRY_SECONDS", 0.001)
    job = submit(state, 5, who="acme")
    state.storage = FullForAWhile(state.storage.url, "result-", 1_000_000)
    failed = run_to_end(engines, job)
    assert failed.status == "failed"
    assert str(failed.error).startswith("Files cannot be read or written now: a disk is full, or")
    assert "/operator" not in str(failed.error)
    state.storage = Storage(state.storage.url)
    paid = billed(state)
    done = run_to_end(engines, rerun(state, failed))
    assert (done.status, billed(state)) == ("completed", paid)


def test_a_disk_that_is_full_when_a_table_is_uploaded_or_submitted_is_told_to_try_again(
    serve: Callable[..., Any],
) -> None:
    running = serve()
    good = running.state.storage
    table = {"file": ("t.parquet", parquet_bytes([{"text": "a"}]))}
    key = running.state.keys.create("acme", "u")
    with running.http(key) as client:
        for what in ("files/", "rows-"):
            running.state.storage = running.state.uploads.storage = good
            file = client.post("/v1/files", files=table, data={"purpose": "user_data"}).json()["id"]
            full = FullForAWhile(good.url, what, 1)
            running.state.storage = running.state.uploads.storage = full
            body = {"model": "echo", "prompt": "{text}", "source": {"file_id": file}}
            reply = client.post("/v1/jobs", json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "storage_unavailable")
            assert "/operator" not in reply.text
            assert reply.headers["Retry-After"]
            assert client.post("/v1/jobs", json=body).status_code == 201


# -- a real disk -------------------------------------------------------------------------------------------------------

FILLED = """
import json, sys, threading, time
from pathlib import Path

sys.path[:0] = [{root!r}, {root!r} + "/connectors", {root!r} + "/sql", {root!r} + "/workers"]
from complete_fn import EchoEngine
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from tests.integration.server.jobs import test_server_disk as disk
from tests.integration.server.jobs.test_server_leases import rows_of, run_to_end, submit

tiny, seconds = Path("tiny"), float(sys.argv[1])
state = ServiceState(sys.argv[2], "models.toml", EchoEngine(row_seconds=0.01))
engines = EngineHost(state)
job = submit(state, 300)

def fill():
    time.sleep(1)
    with open(tiny / "ballast", "wb", buffering=0) as ballast:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                ballast.write(b"x" * 4096)
            except OSError:
                time.sleep(0.01)
    (tiny / "ballast").unlink()

filler = threading.Thread(target=fill)
filler.start()
done = run_to_end(engines, job, 120)
filler.join()
rows = rows_of(state, done)
errors = sum(row["error"] is not None for row in rows)
print(json.dumps([done.status, done.error, len(rows), errors, disk.billed(state), disk.tokens_of(rows)]))
"""


@pytest.mark.parametrize(
    ("home", "seconds"),
    [("tiny/home", 6), ("home", 6), pytest.param("tiny/home", 16, marks=pytest.mark.long)],
)
def test_a_real_disk_that_is_full_when_a_part_ends(tmp_path: Path, home: str, seconds: int) -> None:
    """With `home` elsewhere only the files lie on the full disk, else the database too."""
    (tmp_path / "tiny").mkdir()
    write_models(tmp_path)
    (tmp_path / "filled.py").write_text(FILLED.format(root=str(ROOT)))
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path / "tiny")]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    script = f"""
        cd {shlex.quote(str(tmp_path))}
        mount -t tmpfs -o size=3m none tiny || exit 99
        COMPLETE_FN_STORAGE=$PWD/tiny/storage exec {shlex.quote(sys.executable)} filled.py {seconds} {home}
    """
    command = ["unshare", "-rm", "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    status, error, rows, errors, paid, used = json.loads(done.stdout)
    assert (status, error, rows, errors) == ("completed", None, 300, 0), done.stderr
    assert paid == used


# -- lost and damaged files --------------------------------------------------------------------------------------------


def result_key(state: ServiceState, job: Job) -> str:
    (part,) = (p for p in state.jobs.parts(job.id) if p.result and p.rows)
    return state.job_key(job.id, str(part.result))


def put(state: ServiceState, key: str, content: bytes) -> None:
    with state.storage.writing(key) as sink:
        sink.write(content)


def got(state: ServiceState, key: str) -> bytes:
    with state.storage.reading(key) as source:
        return source.read()


def lose(state: ServiceState, key: str, how: str) -> None:
    content = got(state, key)
    if how == "missing":
        state.storage.delete(key)
        return
    middle = len(content) // 3
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    put(state, key, {"empty": b"", "cut": content[:middle], "flipped": flipped, "other": b"PAR1 no PAR1"}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "flipped", "other"])
def test_a_lost_result_is_made_again_from_the_stored_answers(
    state: ServiceState, engines: EngineHost, how: str
) -> None:
    job = run_to_end(engines, submit(state, 60, different=40))
    before, paid = rows_of(state, job), billed(state)
    lose(state, result_key(state, job), how)
    assert rows_of(state, job) == before  # costs and sources too
    assert len(got(state, result_key(state, job))) > 100  # it was written again
    assert billed(state) == paid


def test_a_lost_result_is_given_although_it_cannot_be_written_again(state: ServiceState, engines: EngineHost) -> None:
    job = run_to_end(engines, submit(state, 20))
    before = rows_of(state, job)
    lose(state, result_key(state, job), "missing")
    state.storage = FullForAWhile(state.storage.url, "result-", 1)
    assert rows_of(state, job) == before


def test_no_flipped_byte_of_a_result_becomes_an_answer(state: ServiceState, engines: EngineHost) -> None:
    job = run_to_end(engines, submit(state, 20))
    key, before = result_key(state, job), rows_of(state, job)
    content = got(state, key)
    for place in range(0, len(content), max(1, len(content) // 150)):
        put(state, key, content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        assert rows_of(state, job) == before, place


def test_what_is_stored_nowhere_is_said_by_part_and_asked_again_by_a_rerun(
    state: ServiceState, engines: EngineHost
) -> None:
    job = run_to_end(engines, submit(state, 30, options={"temperature": 0.7}))  # nothing of it is kept elsewhere
    paid = billed(state)
    lose(state, result_key(state, job), "cut")
    for _ in range(2):
        with pytest.raises(JobError, match=f"part 0 of job {job.id} are lost.*/v1/jobs/{job.id}/rerun"):
            rows_of(state, job)
    again = run_to_end(engines, rerun(state, job))
    rows = rows_of(state, again)
    assert [row["error"] for row in rows] == [None] * 30
    assert billed(state) == 2 * paid
    with pytest.raises(JobError, match="nothing to run again"):
        rerun(state, again)


def test_a_rerun_of_a_lost_result_pays_for_failed_rows_alone(state: ServiceState, engines: EngineHost) -> None:
    job = run_to_end(engines, submit(state, 30, options={"max_tokens": 2}, max_cost="0.000150"))
    assert 0 < state.jobs.counts(job).failed < 30
    paid, asked = billed(state), len(state.engine.requests)  # type: ignore[union-attr]
    failed = state.jobs.counts(job).failed
    lose(state, result_key(state, job), "missing")
    again = run_to_end(engines, rerun(state, job, "1"))
    assert [row["error"] for row in rows_of(state, again)] == [None] * 30
    assert len(state.engine.requests) - asked == failed  # type: ignore[union-attr]
    assert billed(state) > paid


def test_a_storage_that_is_away_is_not_taken_for_damage(state: ServiceState, engines: EngineHost) -> None:
    job = run_to_end(engines, submit(state, 5, options={"temperature": 0.7}))
    state.storage = FullForAWhile(state.storage.url, "result-", 1)
    with pytest.raises(StorageError):
        rows_of(state, job)
    assert len(rows_of(state, job)) == 5


def test_lost_rows_and_prompts_are_named(state: ServiceState, serve: Callable[..., Any]) -> None:
    running = serve()
    with running.http() as client:
        upload = {"file": ("t.parquet", parquet_bytes([{"text": "a"}]))}
        file = client.post("/v1/files", files=upload, data={"purpose": "user_data"}).json()["id"]
        body = {"model": "echo", "prompt": "{text}", "source": {"file_id": file}}
        job = client.post("/v1/jobs", json=body).json()["id"]
        while client.get(f"/v1/jobs/{job}").json()["status"] != "completed":
            pass
        for name in ("rows-00000.parquet", "windows.json"):
            key = running.state.job_key(job, name)
            kept = got(running.state, key)
            put(running.state, key, b"{")
            reply = client.get(f"/v1/jobs/{job}/results")
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "file_damaged")
            assert f"The file {name} of {job} is missing or damaged. Submit" in reply.text
            put(running.state, key, kept)
        running.state.storage.delete(running.state.job_key(job, part_file(0)))
        assert client.get(f"/v1/jobs/{job}/results").status_code == 200

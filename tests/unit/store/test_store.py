"""The store's contract: a slice is there with its ledger lines or not at all, the file is private, faults are named."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from complete_fn.engines.base import EchoEngine, prompt_text
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model, Prices
from complete_fn.errors import StoreError
from complete_fn.execution.admission import Tools
from complete_fn.execution.commits import Slices
from complete_fn.execution.runner import run
from complete_fn.prompts.options import CacheMode
from complete_fn.store.attempts import StoredAnswer
from complete_fn.store.records import LedgerLine, money
from complete_fn.store.sqlite_backend import refuse_network
from complete_fn.store.store import Store
from complete_fn.store.tables import answers, attempts, ledger
from complete_fn.text import text_column
from complete_fn.types import Asker, Completion, CompletionRequest, SamplingParams, Usage

PRICES = Prices(Decimal("1.25"), Decimal("0.3"), Decimal("4.5"), "EUR", "yours")
MODEL = Model("m", "m", engine="echo", prices=PRICES)
WHO = Asker()


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    yield opened
    opened.close()


@pytest.fixture
def file_store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "home" / "state.sqlite3")
    yield opened
    opened.close()


def rows_of(store: Store, table: sa.Table, *where: Any) -> list[dict[str, Any]]:
    with store.read() as connection:
        return [dict(r) for r in connection.execute(sa.select(table).where(*where)).mappings()]


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def done(n: int, text: str = "x") -> StoredAnswer:
    return StoredAnswer(key(n), Completion(text, "stop", usage=Usage(3, 1, 2)))


def test_a_slice_is_found_again(store: Store) -> None:
    attempt = store.begin(WHO, "m", "EUR", "yours")
    text = "four bytes: \U0001f980, a NUL: \x00, an end\n"
    store.commit(attempt, [done(1, text), done(2)], [LedgerLine("input", 2, 6, 7)], 0, 0)
    found = store.look_up("local", [key(1), key(2), key(3)])
    assert set(found) == {key(1), key(2)}
    assert found[key(1)] == (Completion(text, "stop", usage=Usage(3, 1, 2), source="cache"), attempt.id)


def test_answers_are_never_shared_across_tenants(store: Store) -> None:
    attempt = store.begin(WHO, "m", "EUR", "yours")
    store.commit(attempt, [done(1)], [], 0, 0)
    assert store.look_up("other", [key(1)]) == {}
    assert not store.has_answers("other")


def test_a_slice_that_fails_leaves_nothing(store: Store) -> None:
    attempt = store.begin(WHO, "m", "EUR", "yours")
    broken = LedgerLine("input", 1, None)  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        store.commit(attempt, [done(1)], [broken], 0, 0)
    assert not rows_of(store, answers)
    assert not rows_of(store, ledger)


def test_files_are_private(file_store: Store) -> None:
    attempt = file_store.begin(WHO, "m", "EUR", "yours")
    file_store.commit(attempt, [done(1)], [], 0, 0)
    names = {p.name: stat.S_IMODE(p.stat().st_mode) for p in file_store.path.parent.iterdir()}
    assert names == dict.fromkeys(["state.sqlite3", "state.sqlite3-wal", "state.sqlite3-shm"], 0o600)
    assert stat.S_IMODE(file_store.path.parent.stat().st_mode) == 0o700


def test_an_open_mode_is_tightened(tmp_path: Path) -> None:
    Store(tmp_path / "s").close()
    os.chmod(tmp_path / "s", 0o644)
    Store(tmp_path / "s").close()
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"this was once a table of answers" * 100)
    with pytest.raises(StoreError, match=r"s cannot be used: file is not a database\. Move the file away"):
        Store(tmp_path / "s")


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    attempt = store.begin(WHO, "m", "EUR", "yours")
    store.commit(attempt, [done(n, "x" * 500) for n in range(2000)], [], 0, 0)
    store.close()
    with (tmp_path / "s").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    damaged = Store(tmp_path / "s")
    with pytest.raises(StoreError, match="Move the file away"):
        damaged.look_up("local", [key(n) for n in range(2000)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="COMPLETE_FN_HOME"):
        Store(tmp_path / "home" / "s")


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(StoreError, match="COMPLETE_FN_HOME"):
        Store(tmp_path / "home" / "s")


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p"])
def test_network_file_systems_are_refused(kind: str) -> None:
    share = "/mnt/my\\040share"
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {share} {kind} rw 0 0\n/dev/sdb {share}/disk xfs rw 0 0\n"
    with pytest.raises(StoreError, match=f"network file system \\({kind}\\)"):
        refuse_network(Path("/mnt/my share/home/state.sqlite3"), mounts)
    refuse_network(Path("/mnt/my share/disk/state.sqlite3"), mounts)
    refuse_network(Path("/mnt/my shared/state.sqlite3"), mounts)


def test_a_full_disk_keeps_what_was_committed(file_store: Store) -> None:
    class Long(EchoEngine):
        def complete(self, request: CompletionRequest) -> Completion:
            return replace(super().complete(request), text="x" * 2000)

    def small(connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA max_page_count = 600")

    sa.event.listen(file_store.engine, "connect", small)
    file_store.engine.dispose()
    prompts = text_column([f"prompt {n}" for n in range(2000)])
    with pytest.raises(StoreError, match=r"full\. Free some space: what was committed is safe"):
        run(Call(MODEL), prompts, Tools(Long(), file_store), WHO)
    sa.event.remove(file_store.engine, "connect", small)
    file_store.engine.dispose()
    kept = rows_of(file_store, answers)
    assert 256 <= len(kept) < 2000
    billed = [line for line in rows_of(file_store, ledger) if line["price_class"] in ("input", "output")]
    assert sum(line["tokens"] for line in billed) == sum(r["prompt_tokens"] + r["completion_tokens"] for r in kept)
    engine = Long()
    assert run(Call(MODEL), prompts, Tools(engine, file_store), WHO).text.null_count == 0
    assert len(engine.requests) == 2000 - len(kept)


def test_writers_in_many_threads_lose_nothing(store_url: str) -> None:
    def write(worker: int) -> None:
        store = Store(store_url)
        attempt = store.begin(WHO, f"m{worker}", "EUR", "yours")
        for n in range(20):
            store.admit(attempt, 1, 3)
            store.commit(attempt, [done(worker * 100 + n)], [LedgerLine("input", 1, 3, 5)], 1, 3)
        store.finish(attempt, "done")
        store.close()

    threads = [threading.Thread(target=write, args=(w,)) for w in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(store_url)
    assert len(rows_of(store, answers)) == len(rows_of(store, ledger)) == 120
    assert {(a["status"], a["reserved_rows"], a["reserved_tokens"]) for a in rows_of(store, attempts)} == {
        ("done", 0, 0)
    }


def test_a_dead_attempt_becomes_a_lost_line_once(store: Store) -> None:
    attempt = store.begin(Asker(job="j", query_tag="t"), "m", "EUR", "yours")
    store.admit(attempt, 10, 300)
    store.commit(attempt, [done(1)], [LedgerLine("input", 1, 3, 5)], 4, 120)
    assert store.sweep() == 0  # this process is alive
    with store.write() as connection:  # as another process that had this number would have left it
        connection.execute(attempts.update().values(pid_started=1.0))
    assert store.sweep() == 1
    assert store.sweep() == 0
    (line,) = rows_of(store, ledger, ledger.c.price_class == "lost")
    assert (line["rows"], line["tokens"], line["cost_nano"], line["query_tag"]) == (6, 180, 0, "t")
    assert (line["currency"], line["basis"]) == ("EUR", "yours")


def test_attempts_of_other_hosts_are_left_alone(store: Store) -> None:
    store.begin(WHO, "m", "EUR", "yours")
    with store.write() as connection:
        connection.execute(attempts.update().values(pid_started=1.0, host="another"))
    assert store.sweep() == 0


def test_a_job_keeps_its_answers_until_it_has_ended(store: Store) -> None:
    who, hot = Asker(job="j"), Call(MODEL, SamplingParams(temperature=1.0))
    prompts = text_column(["a", "b", "a"])
    for expected in (3, 0, 0):
        engine = EchoEngine()
        run(hot, prompts, Tools(engine, store), who)
        assert len(engine.requests) == expected
    store.end_job("local", "j")
    assert not rows_of(store, answers)
    engine = EchoEngine()
    run(hot, prompts, Tools(engine, store), who)
    assert len(engine.requests) == 3


def test_another_job_cannot_read_a_jobs_answers(store: Store) -> None:
    prompts = text_column(["a", "b"])
    run(Call(MODEL), prompts, Tools(EchoEngine(), store), Asker(job="j"), "off")
    engine = EchoEngine()
    run(Call(MODEL), prompts, Tools(engine, store), Asker(job="k"), "off")
    run(Call(MODEL), prompts, Tools(engine, store), WHO)
    assert len(engine.requests) == 4


class Stubborn(EchoEngine):
    """Breaks off after some rows, as Ctrl-C does."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__()
        self.after, self.error = after, error

    def stream(self, requests: Any, tenant: str) -> Iterator[tuple[int, Completion]]:
        for position, completion in super().stream(requests, tenant):
            if position == self.after:
                raise self.error
            yield position, completion


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x")])
def test_what_was_finished_before_an_interruption_is_committed(store: Store, error: BaseException) -> None:
    who, prompts = Asker(job="j"), text_column([f"p {n}" for n in range(1000)])
    with pytest.raises(type(error)):
        run(Call(MODEL), prompts, Tools(Stubborn(300, error), store), who, "off")
    assert len(rows_of(store, answers)) == 300
    (attempt,) = rows_of(store, attempts)
    assert attempt["status"] == ("failed" if isinstance(error, RuntimeError) else "cancelled")
    (lost,) = rows_of(store, ledger, ledger.c.price_class == "lost")
    assert 1 <= lost["rows"] <= 128
    engine = EchoEngine()
    again = run(Call(MODEL), prompts, Tools(engine, store), who, "off")
    assert (again.summary.computed, again.summary.resumed, len(engine.requests)) == (700, 300, 700)
    assert again.text.to_pylist() == [f"p {n}" for n in range(1000)]


def test_ctrl_c_never_falls_between_a_commit_and_its_note(store: Store) -> None:
    """Commits run on their own thread, where no signal is raised."""
    names = []
    original = store.commit

    def noting(*arguments: Any) -> None:
        names.append(threading.current_thread() is threading.main_thread())
        original(*arguments)

    store.commit = noting  # type: ignore[method-assign]
    run(Call(MODEL), text_column([f"p {n}" for n in range(600)]), Tools(EchoEngine(), store), WHO)
    assert names
    assert not any(names)


def test_refused_rows_do_not_hide_lost_ones(store: Store) -> None:
    """Rows that were never admitted give nothing back; a row that the engine never drew is not lost."""
    engine = Stubborn(1, KeyboardInterrupt())
    prompts = text_column(["a", "b", "c"] + ["\ud800" + str(n) for n in range(50)])
    with suppress(KeyboardInterrupt):
        run(Call(MODEL), prompts, Tools(engine, store), WHO)
    (lost,) = rows_of(store, ledger, ledger.c.price_class == "lost")
    assert lost["rows"] == 1  # "b": "a" has its answer, and "c" was not drawn


class Metered(EchoEngine):
    """Echo with cached tokens, cut rows that cost and failed rows that do not."""

    def complete(self, request: CompletionRequest) -> Completion:
        words = prompt_text(request).split()
        n = len(words)
        if n % 5 == 4:
            return Completion.failed("truncated", "cut", Usage(n, n // 2, 1))
        if n % 7 == 6:
            return Completion.failed("timeout", "late")
        return Completion("a " * n, "stop", usage=Usage(n * 17, n * 3, n))


run_of_rows = st.lists(st.one_of(st.none(), st.integers(0, 12)), max_size=40)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    columns=st.lists(run_of_rows, min_size=1, max_size=3),
    temperature=st.sampled_from([0.0, 0.7]),
    cache=st.sampled_from(["on", "off", "refresh"]),
    job=st.sampled_from([None, "j"]),
    price=st.decimals("0", "9.99", places=3),
)
def test_the_ledger_bills_what_was_computed(
    columns: list[list[int | None]],
    temperature: float,
    cache: CacheMode,
    job: str | None,
    price: Decimal,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    store = Store(tmp_path_factory.mktemp("s") / "s")
    model = replace(MODEL, prices=replace(PRICES, input=price))
    spent, computed, rows, shown = Decimal(0), Usage(), 0, Decimal(0)
    for column in columns:
        prompts = text_column([None if n is None else "w " * n for n in column])
        found = run(
            Call(model, SamplingParams(temperature=temperature)),
            prompts,
            Tools(Metered(), store),
            Asker(job=job),
            cache,
        )
        spent += found.summary.cost
        computed = computed + found.summary.usage
        for detail in found.details.to_pylist():
            if detail is not None:
                rows += 1
                shown += detail["cost"]
    lines = rows_of(store, ledger)
    sums = {c: sum(x["tokens"] for x in lines if x["price_class"] == c) for c in ("input", "cached_input", "output")}
    assert sums["cached_input"] == computed.cached_tokens
    assert sums["input"] + sums["cached_input"] == computed.prompt_tokens
    assert sums["output"] == computed.completion_tokens
    billed = money(sum(x["cost_nano"] for x in lines))
    assert billed == spent  # prices of three places make whole nano-units: nothing is rounded
    again = job is not None and len(columns) > 1  # a job's later attempt shows what its earlier ones paid for
    assert shown >= billed if again else shown == billed
    answered = sum(x["rows"] for x in lines if x["price_class"] in ("input", "duplicate", "reused", "resumed"))
    assert answered == rows
    assert all(x["cost_nano"] == 0 for x in lines if x["price_class"] not in ("input", "cached_input", "output"))
    store.close()


def test_rows_that_another_thread_computed_have_their_line(store: Store) -> None:
    class Slow(EchoEngine):
        def stream(self, requests: Any, tenant: str) -> Iterator[tuple[int, Completion]]:
            for position, completion in super().stream(requests, tenant):
                time.sleep(0.005)
                yield position, completion

    prompts = text_column([f"p {n}" for n in range(50)] + ["p 1"])
    runs = [threading.Thread(target=run, args=(Call(MODEL), prompts, Tools(Slow(), store), WHO)) for _ in range(3)]
    for each in runs:
        each.start()
    for each in runs:
        each.join()
    lines = rows_of(store, ledger)
    rows = {c: sum(x["rows"] for x in lines if x["price_class"] == c) for c in ("input", "duplicate", "reused")}
    assert rows["input"] == 50
    assert sum(rows.values()) == 3 * 51


def test_rounding_stays_below_a_nano_unit_a_line(store: Store) -> None:
    model = replace(MODEL, prices=Prices(Decimal("0.0123457"), Decimal("0.0031"), Decimal("0.77777")))
    found = run(Call(model), text_column([f"{'w ' * (n % 30)}{n}" for n in range(500)]), Tools(Metered(), store), WHO)
    lines = [line for line in rows_of(store, ledger) if line["cost_nano"]]
    billed = money(sum(line["cost_nano"] for line in lines))
    shown = sum(d["cost"] for d in found.details.to_pylist())
    assert abs(billed - found.summary.cost) <= Decimal("0.5e-9") * (len(lines) + 1)
    assert abs(billed - shown) <= Decimal("0.5e-9") * (500 + len(lines))


def test_slices_are_committed_by_time_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("complete_fn.execution.commits.SLICE_SECONDS", 0.05)
    seen = threading.Event()
    original = Slices.commit

    def noting(self: Slices, chosen: list[tuple[int, Completion]]) -> None:
        original(self, chosen)
        if chosen:
            seen.set()

    class Slow(EchoEngine):
        def stream(self, requests: Any, tenant: str) -> Iterator[tuple[int, Completion]]:
            for position, completion in super().stream(requests, tenant):
                yield position, completion
                if position == 0:
                    assert seen.wait(10), "the first row waited for the last"

    monkeypatch.setattr(Slices, "commit", noting)
    run(Call(MODEL), text_column(["a", "b"]), Tools(Slow(), store), WHO)

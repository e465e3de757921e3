"""The ledger's lines of what was saved and metered, and its export with FOCUS names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow.compute as pc
import pytest
from pyarrow import csv, parquet

from complete_fn.cli.main import main
from complete_fn.engines.base import EchoEngine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model, Prices
from complete_fn.errors import InputError
from complete_fn.execution.admission import Tools
from complete_fn.execution.runner import run
from complete_fn.history.device_time import DeviceTime
from complete_fn.ledger.focus_export import SCHEMA, charges, export
from complete_fn.ledger.usage import usage
from complete_fn.store.store import Store
from complete_fn.text import text_column
from complete_fn.types import Asker, Completion, CompletionRequest, Usage

MODEL = Model("m", "m", engine="echo", prices=Prices(Decimal("2"), Decimal("0.5"), Decimal("8")))


class Metered(EchoEngine):
    """Every row takes a quarter of a second of a device, 0.2 s of it for its prompt, half of which is cached."""

    def complete(self, request: CompletionRequest) -> Completion:
        return replace(super().complete(request), usage=Usage(100, 50, 10, 0.25, 0.2))

    def stream(self, requests: Iterable[CompletionRequest], tenant: str) -> Iterator[tuple[int, Completion]]:
        return super().stream(requests, tenant)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    who = Asker("acme", "ann", "job_1/0", "tag")
    for prompts in (["a", "b", "b", "b"], ["a"]):
        run(Call(MODEL), text_column(prompts), Tools(Metered(), opened), who)
    yield opened
    opened.close()


def test_what_was_metered_and_saved_is_told_by_job(store: Store) -> None:
    (line,) = usage(store, ("tenant", "user", "job", "query_tag"))
    assert line.group == ("acme", "ann", "job_1", "tag")
    assert (line.input, line.cached, line.output, line.device_seconds) == (200, 100, 20, 0.5)
    assert line.cost == Decimal("0.000410")
    assert line.cache_saved == Decimal("0.000150")
    assert line.saved == Decimal("0.000410")  # two copies of b; a was this job's own
    # two copies at 0.25 s each; 100 cached tokens at 0.4 s for the 100 tokens of prompts that were computed
    assert line.saved_seconds == pytest.approx(0.5 + 0.4, abs=2e-6)


def test_a_stored_answer_saves_what_making_it_took(store: Store) -> None:
    run(Call(MODEL), text_column(["d"]), Tools(Metered(), store), Asker("bolt"))
    run(Call(MODEL), text_column(["d"] * 3), Tools(Metered(), store), Asker("bolt", "again"))
    (line,) = usage(store, ("user",), tenant="bolt")[:1]
    assert (line.group, line.rows, line.device_seconds, line.saved_seconds) == (("again",), 3, 0.0, 0.75)


def test_an_engines_own_time_is_nobodys(store: Store) -> None:
    engine = Metered()
    engine.device_time = told = DeviceTime()  # type: ignore[attr-defined]
    told.name, told.skipped = "host/7", 0.5
    told.told(10.0, 8.0, 1.5)
    run(Call(MODEL), text_column(["x", "y"]), Tools(engine, store), Asker("bolt"))
    (own,) = usage(store, ("tenant", "user"), tenant="-")
    assert (own.group, own.rows, own.cost) == (("-", "-"), 0, 0)
    assert (own.idle_seconds, own.aborted_seconds, own.device_seconds) == (8.0, 1.5, 0.0)
    (of_engine,) = (line for line in usage(store, ("engine",)) if line.group == ("host/7",))
    assert (of_engine.device_seconds, of_engine.idle_seconds, of_engine.aborted_seconds) == (0.5, 8.0, 1.5)
    cached, skipped = 0.4, 0.4 * 0.5 / 0.5
    (theirs,) = usage(store, ("tenant",), tenant="bolt")
    assert theirs.saved_seconds == pytest.approx(cached + skipped, abs=2e-6)
    run(Call(MODEL), text_column(["z"]), Tools(engine, store), Asker("bolt"))
    assert usage(store, ("tenant",), tenant="-") == [replace(own, group=("-",))]  # told once


def test_lines_that_were_not_written_come_again() -> None:
    told = DeviceTime()
    told.told(3.0, 0.0000014, 2.0)
    lines = told.take()
    assert [(line.price_class, line.device_us) for line in lines] == [("idle", 1), ("aborted", 2_000_000)]
    assert told.take() == []
    told.put_back(lines)
    assert told.take() == lines


def test_the_export_has_focus_columns_and_the_ledgers_sums(store: Store, tmp_path: Path) -> None:
    table = charges(store)
    assert table.schema == SCHEMA
    assert pc.sum(table["BilledCost"]).as_py() == Decimal("0.000410")
    assert pc.sum(table["x_DeviceSeconds"]).as_py() == 0.5
    by_meter = {row["SkuMeter"]: row for row in table.to_pylist()}
    assert len(by_meter) == table.num_rows  # all lines of an hour are one charge
    assert set(by_meter) == {"input", "cached_input", "output", "prefix_cache", "duplicate", "resumed"}
    assert by_meter["output"]["PricingQuantity"] == Decimal("0.00002")
    assert by_meter["output"]["Tags"] == '{"user": "ann", "job": "job_1", "query_tag": "tag"}'
    first = by_meter["input"]
    assert first["ChargePeriodEnd"] - first["ChargePeriodStart"] == timedelta(hours=1)
    assert first["ChargePeriodStart"] <= datetime.now(UTC)
    assert first["ChargePeriodStart"].minute == 0
    assert first["BillingPeriodStart"].day == first["BillingPeriodEnd"].day == 1
    for name in ("usage.parquet", "usage.csv"):
        assert export(store, tmp_path / name) == table.num_rows
    assert parquet.read_table(tmp_path / "usage.parquet").equals(table)
    assert csv.read_csv(tmp_path / "usage.csv").column_names == SCHEMA.names
    assert charges(store, tenant="bolt").num_rows == 0


def test_a_month_ends_where_the_next_begins(store: Store) -> None:
    from complete_fn.ledger.focus_export import charge

    class Row:
        hour = datetime(2026, 12, 31, 23, tzinfo=UTC).timestamp()
        rows = tokens = cost_nano = saved_nano = device_us = saved_us = 0
        tenant = user = model = price_class = currency = basis = "x"
        job = query_tag = None

    assert charge(Row)["BillingPeriodEnd"] == datetime(2027, 1, 1, tzinfo=UTC)


def test_the_shell_writes_it_and_refuses_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path / "home")]
    assert main(["usage", "--focus", str(tmp_path / "u.parquet"), *home]) == 0
    assert "0 charges written" in capsys.readouterr().out
    store = Store(tmp_path / "home" / "state.sqlite3")
    with pytest.raises(InputError, match=r"must end in \.parquet or \.csv"):
        export(store, tmp_path / "u.xlsx")
    with pytest.raises(InputError, match="cannot be written"):
        export(store, tmp_path / "none" / "u.csv")
    store.close()

"""The service as the engine of DuckDB and Polars elsewhere: it names models by the catalogue, and it bills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from complete_fn import EchoEngine
from complete_fn.errors import EngineError
from complete_fn.ledger.usage import usage
from complete_fn.settings import load_settings
from complete_fn.store.store import Store
from complete_fn_connectors.duckdb import register
from complete_fn_connectors.functions import QuerySession
from complete_fn_connectors.polars import complete


def test_duckdb_asks_the_service_and_the_service_bills(
    serve: Callable[..., Any], tmp_path: Path, models_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EchoEngine(64)
    running = serve(engine)
    monkeypatch.setenv("COMPLETE_FN_URL", running.url)
    monkeypatch.setenv("COMPLETE_FN_KEY", running.state.keys.create("acme", "ann"))
    con = duckdb.connect()
    register(con, engine=f"{running.url}/v1", home=tmp_path / "mine", models_file=models_file, progress=False)
    rows = con.execute("SELECT complete('echo', 'say ' || i) FROM range(20) t(i) ORDER BY i").fetchall()
    assert rows == [(f"say {n}",) for n in range(20)]
    assert {r.priority for r in engine.requests} == {0}  # as bulk: flex
    session = QuerySession(engine=f"{running.url}/v1", home=tmp_path / "mine", models_file=models_file, progress=False)
    frame = pl.DataFrame({"i": ["a", "b"]}).with_columns(answer=complete("echo", pl.col("i"), session=session))
    assert frame["answer"].to_list() == ["a", "b"]
    (billed,) = usage(running.state.store, ["model"], tenant="acme")
    (noted,) = usage(Store(load_settings(tmp_path / "mine").store), ["model"])
    assert (billed.rows, billed.basis, noted.rows, noted.basis) == (22, "yours", 22, "service")
    assert (billed.cost, billed.output) == (noted.cost, noted.output)


def test_without_its_name_in_the_environment_no_key_is_sent_anywhere(
    serve: Callable[..., Any], tmp_path: Path, models_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve()
    monkeypatch.setenv("COMPLETE_FN_KEY", running.state.keys.create("acme", "ann"))
    monkeypatch.setenv("COMPLETE_FN_URL", "http://127.0.0.1:9")
    con = duckdb.connect()
    register(con, engine=f"{running.url}/v1", home=tmp_path / "mine", models_file=models_file, progress=False)
    with pytest.raises((EngineError, duckdb.Error), match="refuses the key"):
        con.execute("SELECT complete('echo', 'x')").fetchall()

"""Cortex's usage views over the ledger, and the shell's questions, on SQLite and PostgreSQL."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from complete_fn.cli.main import main
from complete_fn.engines.call import Call
from complete_fn.execution.admission import Tools
from complete_fn.execution.runner import run
from complete_fn.store.store import Store
from complete_fn.text import text_column
from complete_fn.types import Asker
from tests.unit.ledger.test_focus import MODEL, Metered

HISTORY = {
    "cortex_functions_usage_history": "START_TIME END_TIME FUNCTION_NAME MODEL_NAME WAREHOUSE_ID TOKEN_CREDITS TOKENS",
    "cortex_functions_query_usage_history": "QUERY_ID WAREHOUSE_ID MODEL_NAME FUNCTION_NAME TOKENS TOKEN_CREDITS",
    "cortex_aisql_usage_history": "USAGE_TIME FUNCTION_NAME MODEL_NAME QUERY_ID QUERY_TAG USER_ID WAREHOUSE_ID TOKENS "
    "TOKEN_CREDITS TOKENS_GRANULAR TOKEN_CREDITS_GRANULAR",
    "cortex_ai_functions_usage_history": "START_TIME END_TIME FUNCTION_NAME MODEL_NAME QUERY_ID WAREHOUSE_ID QUERY_TAG "
    "USER_ID METRICS CREDITS IS_COMPLETED",
}


@pytest.fixture
def home(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shell's `--home` for a state with two runs of two tenants: 3 rows computed, 1 copied."""
    if store_url.startswith("postgresql"):
        monkeypatch.setenv("COMPLETE_FN_DATABASE", store_url)
    store = Store(store_url)
    run(Call(MODEL), text_column(["a", "b", "b"]), Tools(Metered(), store), Asker("acme", "ann", "job_1/0", "tag"))
    run(Call(MODEL), text_column(["c"]), Tools(Metered(), store), Asker("bolt", "bob"))
    store.close()
    return ["--home", str(tmp_path / "home")]


def install(store_url: str, script: str) -> None:
    """As psql and sqlite3 do: all statements as one script."""
    if store_url.startswith("postgresql"):
        with psycopg.connect(store_url, autocommit=True) as connection:
            connection.execute(script.encode())
    else:
        with sqlite3.connect(store_url) as file:
            file.executescript(script)


def decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def test_the_views_have_the_names_and_sums_warehouse_users_know(
    home: list[str], store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["usage", "--views", *home]) == 0
    script = capsys.readouterr().out
    for _ in range(2):  # a second time replaces them
        install(store_url, script)
    store = Store(store_url)
    found: dict[str, list[dict[str, Any]]] = {}
    with store.read() as connection:
        for name, columns in HISTORY.items():
            listed = connection.execute(sa.text(f"SELECT {columns.replace(' ', ', ')}, tenant FROM {name}"))
            found[name] = [dict(row) for row in listed.mappings()]
    store.close()
    for rows in found.values():
        assert {row["tenant"] for row in rows} == {"acme", "bolt"}
        for column in ("token_credits", "credits"):
            if column in rows[0]:
                assert float(sum(row[column] for row in rows)) == pytest.approx(3 * 205e-6)
        if "tokens" in rows[0]:
            assert sum(row["tokens"] for row in rows) == 3 * 110
    hourly = found["cortex_functions_usage_history"][0]
    start, end = (datetime.fromisoformat(str(hourly[name])) for name in ("start_time", "end_time"))
    assert end - start == timedelta(hours=1)
    assert start <= datetime.now(UTC).replace(tzinfo=None)
    assert start.minute == 0
    assert (hourly["function_name"], hourly["model_name"]) == ("COMPLETE", "m")
    (mine,) = (row for row in found["cortex_aisql_usage_history"] if row["tenant"] == "acme")
    assert (mine["query_id"], mine["query_tag"], mine["user_id"]) == ("job_1", "tag", "ann")
    assert decoded(mine["tokens_granular"]) == {"input": 100, "cache_read_input": 100, "output": 20}
    assert sum(decoded(mine["token_credits_granular"]).values()) == pytest.approx(410e-6)
    (mine,) = (row for row in found["cortex_ai_functions_usage_history"] if row["tenant"] == "acme")
    metrics = [(m["key"]["metric"], m["key"]["unit"], m["value"]) for m in decoded(mine["metrics"])]
    assert metrics == [("input", "tokens", 100), ("cache_read_input", "tokens", 100), ("output", "tokens", 20)]
    assert mine["is_completed"]


def test_the_shell_sums_and_clears_either_kind(
    home: list[str], store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["usage", "--by", "tenant,user", "--json", *home]) == 0
    acme, bolt = json.loads(capsys.readouterr().out)
    assert (acme["tenant"], acme["user"], acme["rows"], acme["device_seconds"]) == ("acme", "ann", 3, 0.5)
    assert (bolt["tenant"], bolt["rows"], bolt["cost"]) == ("bolt", 1, 0.000205)
    assert main(["usage", "--csv", "--by", "day,engine", *home]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.startswith("day,engine,rows,input")
    assert line.startswith(datetime.now(UTC).date().isoformat() + ",-,4,")
    assert main(["cache", "stats", "--json", *home]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert (stored["answers"], stored["models"]) == (3, {"m": 3})
    assert main(["cache", "clear", "--model", "m", *home]) == 0
    assert "3 answers deleted" in capsys.readouterr().out
    assert main(["usage", "--json", *home]) == 0
    assert json.loads(capsys.readouterr().out)[0]["rows"] == 4  # the ledger stays


def test_the_shell_makes_and_revokes_keys_in_either_kind(home: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "--tenant", "acme", "--user", "ann", *home]) == 0
    key = next(word for word in capsys.readouterr().out.split() if word.startswith("cfn-"))
    name = key.split("-")[1]
    assert main(["keys", "list", *home]) == 0
    listed = capsys.readouterr().out
    assert name in listed
    assert key.split("-")[2] not in listed
    assert main(["keys", "budget", "acme", "1.5", *home]) == 0
    assert main(["keys", "revoke", name, *home]) == 0
    capsys.readouterr()
    assert main(["keys", "list", *home]) == 0
    assert "revoked" in capsys.readouterr().out

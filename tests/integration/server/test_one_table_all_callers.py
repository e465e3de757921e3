"""One table through all callers: same answers; call-outs, REST and PostgreSQL are paid once by a tenant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import psycopg
import pyarrow as pa
import pytest

from complete_fn.client import Client
from complete_fn_connectors.duckdb import register
from complete_fn_connectors.functions import QuerySession
from complete_fn_connectors.polars import complete
from tests.integration.server.conftest import Running
from tests.integration.server.test_postgres_functions import installed, one
from tests.integration.server.test_server_batches import lines_of, request, start, wait
from tests.integration.server.test_server_dialects import Counting, billed, post, values

__all__ = ["installed"]  # the fixture
ROWS = 100
TEXTS = [f"package {n} of section {n % 7}" for n in range(ROWS)]


def test_all_callers_get_the_same_answers_and_pay_once(
    serve: Callable[..., Running],
    installed: Callable[..., psycopg.Connection[Any]],
    models_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Counting()
    running = serve(engine=engine)
    keys = {tenant: running.service.keys.create(tenant, "ann") for tenant in ("a", "b")}
    con = installed(running, keys["a"])
    rows = [["echo", text] for text in TEXTS]

    def rest(key: str) -> list[Any]:
        client = Client(running.url, key)
        job = client.submit(pa.table({"text": TEXTS}), "echo", "{text}")
        job.wait(progress=False)
        found = list(job.results().column("completion").to_pylist())
        client.close()
        return found

    def table() -> list[Any]:
        query = "SELECT array_agg(completion ORDER BY (\"row\" ->> 'n')::int) FROM complete_table(%s, 'echo')"
        texts = "SELECT n, format('package %s of section %s', n, n %% 7) AS prompt FROM generate_series(0, 99) AS n"
        return list(one(con, query, texts.replace("%%", "%")))

    monkeypatch.setenv("COMPLETE_FN_URL", running.url)
    monkeypatch.setenv("COMPLETE_FN_KEY", keys["a"])

    def in_duckdb() -> list[Any]:
        with (
            duckdb.connect() as db,
            register(db, engine=f"{running.url}/v1", home=tmp_path / "duckdb", models_file=models_file, progress=False),
        ):
            db.execute("CREATE TABLE docs AS SELECT unnest(?) AS body", [TEXTS])
            return [row[0] for row in db.execute("SELECT complete('echo', body) FROM docs ORDER BY rowid").fetchall()]

    def in_polars() -> list[Any]:
        where = {"engine": f"{running.url}/v1", "home": tmp_path / "polars", "models_file": models_file}
        session = QuerySession(**where, progress=False)
        frame = pl.DataFrame({"body": TEXTS}).with_columns(answer=complete("echo", pl.col("body"), session=session))
        return frame["answer"].to_list()

    def openai_batch() -> list[Any]:
        client = running.openai(keys["a"])
        batch = wait(client, start(client, [request(str(n), text) for n, text in enumerate(TEXTS)]).id)
        lines = lines_of(client, batch.output_file_id)
        return [lines[str(n)]["response"]["body"]["choices"][0]["message"]["content"] for n in range(ROWS)]

    first = values("snowflake", post(running, "snowflake", rows, key=keys["a"]))
    paid = billed(running, "a")
    assert len(engine.asked) == ROWS
    assert paid > 0
    others = [values(w, post(running, w, rows, key=keys["a"])) for w in ("bigquery", "redshift")]
    assert [first] * 4 == [*others, rest(keys["a"]), table()]
    assert billed(running, "a") == paid
    assert len(engine.asked) == ROWS
    assert rest(keys["b"]) == first
    assert billed(running, "b") == paid
    assert len(engine.asked) == 2 * ROWS
    # Other questions, though the answers are the same: these chats name the model's default max_tokens, a batch is
    # sampled where it says nothing. DuckDB's are paid once for Polars too, the batch's again.
    assert [first] * 3 == [in_duckdb(), in_polars(), openai_batch()]
    assert billed(running, "a") == 3 * paid

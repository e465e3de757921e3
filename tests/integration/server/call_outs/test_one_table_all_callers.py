"""One table through all callers: same answers, paid once by a tenant."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import httpx
import polars as pl
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from complete_fn.client import Client
from complete_fn.engines.catalogue import find_model
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from complete_fn_connectors.duckdb import register
from complete_fn_connectors.functions import QuerySession
from complete_fn_connectors.polars import complete
from tests.integration.server.call_outs.test_postgres_functions import one
from tests.integration.server.call_outs.test_server_dialects import BATCH, Counting, billed, post, values
from tests.integration.server.conftest import Install, Running, at_service
from tests.integration.server.openai.test_server_batches import lines_of, request, start, wait

SAMPLE = Path(__file__).parents[4] / "sql" / "examples" / "packages.parquet"
REAL = """
[models.demo]
checkpoint = '{folder}'
max_model_len = 4096
prices = {{ input = 1, cached_input = 0.5, output = 2 }}
engine_args = {{ dtype = 'float32' }}
"""


class Callers:
    """Each caller's answers about `texts`, in their order."""

    def __init__(self, running: Running, model: str, texts: list[str], folder: Path, models_file: Path) -> None:
        self.running, self.model, self.texts, self.folder = running, model, texts, folder
        self.models_file = models_file

    def warehouse(self, name: str, key: str) -> list[Any]:
        rows = [[self.model, text] for text in self.texts]
        batches = [rows[low : low + 200] for low in range(0, len(rows), 200)]
        replies = (self.answered(name, rows, f"b{n}", key) for n, rows in enumerate(batches))
        return [value for reply in replies for value in values(name, reply)]

    def answered(self, name: str, rows: list[list[Any]], batch: str, key: str) -> httpx.Response:
        """As the warehouses do it: BigQuery sends a busy batch again, the others ask for it by its name."""
        reply, until = post(self.running, name, rows, batch, key), time.monotonic() + 300
        while reply.status_code in (202, 503) and time.monotonic() < until:
            time.sleep(0.1)
            if name == "bigquery":
                reply = post(self.running, name, rows, batch, key)
            else:
                with self.running.http(key) as http:
                    reply = http.get(f"/v1/dialects/{name}/complete", headers={BATCH[name]: batch})
        assert reply.status_code == 200, reply.text
        return reply

    def rest(self, key: str) -> list[Any]:
        client = Client(self.running.url, key)
        job = client.submit(pa.table({"text": self.texts}), self.model, "{text}")
        job.wait(progress=False)
        found = list(job.results().column("completion").to_pylist())
        client.close()
        return found

    def postgres(self, con: psycopg.Connection[Any]) -> list[Any]:
        con.execute("CREATE TEMP TABLE docs (n bigint, prompt text)")
        with con.cursor() as cursor:
            cursor.executemany("INSERT INTO docs VALUES (%s, %s)", list(enumerate(self.texts)))
        query = "SELECT array_agg(completion ORDER BY (\"row\" ->> 'n')::int) FROM complete_table(%s, %s)"
        return list(one(con, query, "SELECT n, prompt FROM docs", self.model))

    def duckdb(self) -> list[Any]:
        where: dict[str, Any] = {"engine": f"{self.running.url}/v1", "models_file": self.models_file}
        with duckdb.connect() as db, register(db, home=self.folder / "duckdb", progress=False, **where):
            db.execute("CREATE TABLE docs AS SELECT unnest(?) AS body", [self.texts])
            query = f"SELECT complete('{self.model}', body) FROM docs ORDER BY rowid"
            return [row[0] for row in db.execute(query).fetchall()]

    def polars(self) -> list[Any]:
        where: dict[str, Any] = {"engine": f"{self.running.url}/v1", "models_file": self.models_file}
        session = QuerySession(home=self.folder / "polars", progress=False, **where)
        asked = complete(self.model, pl.col("body"), session=session)
        return pl.DataFrame({"body": self.texts}).with_columns(answer=asked)["answer"].to_list()

    def openai_batch(self, key: str) -> list[Any]:
        as_a_job = {"model": self.model, "temperature": 0, "default_max_tokens": True}
        client = self.running.openai(key)
        asked = [request(str(n), text, **as_a_job) for n, text in enumerate(self.texts)]
        lines = lines_of(client, wait(client, start(client, asked).id).output_file_id)
        return [lines[str(n)]["response"]["body"]["choices"][0]["message"]["content"] for n in range(len(self.texts))]


def all_pay_once(
    callers: Callers, installed: Install, monkeypatch: pytest.MonkeyPatch, computed: Callable[[], int]
) -> list[Any]:
    """Two tenants: the first's answers come to all its callers for one payment, the second pays as much."""
    running = callers.running
    keys = {tenant: running.state.keys.create(tenant, "ann") for tenant in ("a", "b")}
    con = installed(running, keys["a"])
    monkeypatch.setenv("COMPLETE_FN_URL", running.url)
    monkeypatch.setenv("COMPLETE_FN_KEY", keys["a"])
    first = callers.warehouse("snowflake", keys["a"])
    paid, rows = billed(running, "a"), computed()
    assert paid > 0
    others = [
        *(callers.warehouse(name, keys["a"]) for name in ("bigquery", "redshift")),
        callers.rest(keys["a"]),
        callers.postgres(con),
        callers.duckdb(),
        callers.polars(),
        callers.openai_batch(keys["a"]),
    ]
    assert [first] * len(others) == others
    assert billed(running, "a") == paid
    assert computed() == rows
    assert callers.rest(keys["b"]) == first
    assert billed(running, "b") == paid
    assert computed() == 2 * rows
    return first


def test_all_callers_get_the_same_answers_and_pay_once(
    serve: Callable[..., Running],
    installed: Install,
    models_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Counting()
    texts = [f"package {n} of section {n % 7}" for n in range(100)]
    callers = Callers(serve(engine=engine), "echo", texts, tmp_path, models_file)
    all_pay_once(callers, installed, monkeypatch, lambda: len(engine.asked))
    assert len(engine.asked) == 200


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.timeout(900)
def test_so_it_is_with_a_thousand_rows_and_a_real_model(
    needs_vllm: None, installed: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models_file = tmp_path / "models.toml"
    models_file.write_text(REAL.format(folder=find_model("demo-llama-swiftkv").local_folder))
    table = pq.read_table(SAMPLE, columns=["description", "section"]).to_pylist()
    chosen = list({row["description"]: row for row in table}.values())[:1000]
    texts = ["Name the section: " + row["description"] for row in chosen]
    with at_service(EngineHost(ServiceState(tmp_path / "home", models_file))) as running:
        callers = Callers(running, "demo", texts, tmp_path, models_file)
        answers = all_pay_once(callers, installed, monkeypatch, lambda: billed(running, "a") + billed(running, "b"))
    assert len(answers) == 1000
    right = sum(answer == row["section"] for answer, row in zip(answers, chosen, strict=True))
    assert right > 600, "the model's own accuracy on new packages is 72 %"

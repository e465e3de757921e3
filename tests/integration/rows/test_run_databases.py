"""`complete-fn run` from and into real databases: rows streamed by cursor, answers upserted by key, resumed by key."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from complete_fn import EchoEngine
from complete_fn.errors import DatabaseAwayError, InputError
from complete_fn.execution.rehearsal import rehearse
from complete_fn.rows.databases import Query, open_database
from deploy.servers import Postgres

MODELS = '[models.echo]\ncheckpoint = "echo"\nengine = "echo"\nmax_model_len = 40\nprices = { input = 1, output = 1 }\n'
MARIADB = "mysql+pymysql://root@127.0.0.1:3306"
ROWS = 230
KINDS = ["postgresql", "mariadb", "sqlite", "duckdb"]
Run = Callable[..., int]


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a new database with a table `docs` of 230 rows (id, text, n, price, day, flag)."""
    if request.param == "mariadb":
        yield from mariadb()
        return
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        with server.database() as url:
            fill(url)
            yield url
        return
    url = f"{request.param}:///{tmp_path / 'rows.db'}"
    fill(url)
    yield url


def mariadb() -> Iterator[str]:
    try:
        socket.create_connection(("127.0.0.1", 3306), 2).close()
    except OSError:
        pytest.skip("no MariaDB listens on 127.0.0.1:3306")
    name = f"files_{secrets.token_hex(4)}"
    root = sa.create_engine(MARIADB)
    with root.begin() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
    url = f"mariadb://root@127.0.0.1:3306/{name}"
    fill(url)
    yield url
    with root.begin() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name}")
    root.dispose()


def ask(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """Run statements as somebody else's program would; the rows of the last."""
    found: list[Any] = []
    if url.startswith("duckdb"):
        with duckdb.connect(url.removeprefix("duckdb:///")) as connection:
            for statement in statements:
                found = connection.execute(statement).fetchall()
        return found
    driver = url.replace("postgresql:", "postgresql+psycopg:").replace("mariadb:", "mariadb+pymysql:")
    engine = sa.create_engine(driver)
    with engine.begin() as connection:
        for statement in statements:
            result = connection.exec_driver_sql(statement if "sqlite" in driver else statement.replace("%", "%%"))
            found = [tuple(row) for row in result] if result.returns_rows else []
    engine.dispose()
    return found


def fill(url: str) -> None:
    values = ", ".join(
        f"({n}, {'NULL' if n % 10 == 0 else repr(f'text {n}')}, {n / 2}, {n}.50, '2026-01-02', {n % 3})"
        for n in range(ROWS)
    )
    ask(
        url,
        "CREATE TABLE docs (id BIGINT PRIMARY KEY, text VARCHAR(200), n DOUBLE PRECISION, price DECIMAL(10, 2), "
        "day DATE, empty_one INTEGER)",
        f"INSERT INTO docs {'(id, text, n, price, day, empty_one)'} VALUES {values}",
        "UPDATE docs SET empty_one = NULL",
    )


@pytest.fixture
def shell(open_shell: Callable[..., Run]) -> Run:
    return open_shell(MODELS, 50)


RUN = ("run", "-m", "echo", "-p", "Say {text}", "--quiet")


def test_from_a_table_into_a_file(database: str, shell: Run) -> None:
    assert shell(*RUN, database, "--table", "docs", "--key", "id", "-o", "out.parquet") == 0
    found = pq.read_table("out.parquet")
    assert found.column("id").to_pylist() == list(range(ROWS))
    assert found.column("completion").to_pylist() == [None if n % 10 == 0 else f"Say text {n}" for n in range(ROWS)]
    first = found.slice(3, 1).to_pylist()[0]
    assert (first["n"], first["price"], first["empty_one"]) == (1.5, Decimal("3.50"), None)
    assert str(first["day"])[:10] == "2026-01-02"


def test_from_a_table_into_another_and_again(database: str, shell: Run) -> None:
    into = (*RUN, database, "--table", "docs", "--key", "id", "-o", database, "--into", "answers", "--details")
    assert shell(*into) == 0
    everything = "SELECT id, completion, completion_error, completion_prompt_tokens FROM answers ORDER BY id"
    first = ask(database, everything)
    assert [(r[0], r[1]) for r in first] == [(n, None if n % 10 == 0 else f"Say text {n}") for n in range(ROWS)]
    assert {r[3] for r in first} == {3, None}
    ask(database, "UPDATE docs SET text = 'changed' WHERE id = 7", "DELETE FROM docs WHERE id = 8")
    assert shell(*into) == 0
    again = ask(database, everything)
    assert (again[7][1], again[8][1], len(again)) == ("Say changed", "Say text 8", ROWS)


def test_a_broken_run_goes_on_behind_the_last_key(database: str, shell: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    stream = EchoEngine.stream

    def breaking(self: EchoEngine, requests: Any, tenant: str) -> Iterator[Any]:
        for found in stream(self, requests, tenant):
            asked.append(str(found[1].text))
            if len(asked) == 120:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(EchoEngine, "stream", breaking)
    into = (*RUN, database, "--table", "docs", "--key", "id", "-o", database, "--into", "answers", "--cache", "off")
    assert shell(*into) == 130
    half = ask(database, "SELECT count(*) FROM answers")[0][0]
    assert half == 100
    ask(database, "UPDATE docs SET text = 'later' WHERE id < 100")  # behind the mark: not even read again
    assert shell(*into) == 0
    assert ask(database, "SELECT count(*), count(completion) FROM answers") == [(ROWS, ROWS - 23)]
    assert not any("later" in text for text in asked)
    assert len(asked) <= ROWS - 23 + 50  # at most the broken window's uncommitted rows are asked twice
    assert not list(Path("home/runs").glob("*"))


def test_a_select_with_percent_signs_colons_and_types(database: str, shell: Run) -> None:
    sql = "SELECT id, text, 'a:b 100%' AS odd FROM docs WHERE text LIKE '%1%' AND id < 30"
    assert shell(*RUN, database, "--sql", sql, "--key", "id", "-o", "out.jsonl") == 0
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [1, 11, 12, 13, 14, 15, 16, 17, 18, 19, 21]
    assert {line["odd"] for line in lines} == {"a:b 100%"}


@pytest.mark.parametrize("key", ["select", "per cent %s", "o'clock"])
def test_reserved_words_and_signs_are_names(database: str, shell: Run, key: str) -> None:
    def named(name: str) -> str:
        return f"`{name}`" if database.startswith("mariadb") else f'"{name}"'

    table, column = named("order"), named(key)
    texts = "(1, 'one'), (2, 'two'), (3, 'three')"
    ask(
        database,
        f"CREATE TABLE {table} ({column} BIGINT PRIMARY KEY, text VARCHAR(20))",
        f"INSERT INTO {table} VALUES {texts}",
    )
    assert shell(*RUN, database, "--table", "order", "--key", key, "-o", database, "--into", "group") == 0
    found = ask(database, f"SELECT {column}, completion FROM {named('group')} ORDER BY 1")
    assert found == [(1, "Say one"), (2, "Say two"), (3, "Say three")]
    after = list(open_database(database).batches(Query(f"SELECT * FROM {table}", key, after=1)))
    assert [row[key] for batch in after for row in batch.to_pylist()] == [2, 3]


def test_a_table_is_named_with_its_schema(shell: Run, postgres: Postgres) -> None:
    with postgres.database() as url:
        ask(url, 'CREATE SCHEMA "user"', """CREATE TABLE "user"."order" AS SELECT 1 AS id, 'one' AS text""")
        assert shell(*RUN, url, "--table", "user.order", "--key", "id", "-o", "out.jsonl") == 0
    assert json.loads(Path("out.jsonl").read_text())["completion"] == "Say one"


def test_keys_that_look_alike_stay_apart(database: str, shell: Run) -> None:
    pq.write_table(pa.table({"k": ["a", "A", "a ", "ä", "🦀"], "text": ["1", "2", "3", "4", "5"]}), "in.parquet")
    assert shell(*RUN, "in.parquet", "-o", database, "--into", "answers", "--key", "k") == 0
    found = dict(ask(database, "SELECT k, completion FROM answers"))
    assert found == {"a": "Say 1", "A": "Say 2", "a ": "Say 3", "ä": "Say 4", "🦀": "Say 5"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--table", "nothing", "--key", "id", "-o", "o.csv"), ""),
        (("--sql", "SELEC 1", "-o", "o.csv"), ""),
        (("--table", "docs; DROP TABLE docs", "-o", "o.csv"), "no name of a table"),
        (("-o", "o.csv"), "say --table NAME or --sql"),
        (("--table", "docs", "-o", "DB"), "--into TABLE and --key"),
        (("--table", "docs", "-o", "DB", "--into", "answers", "--key", "empty_one"), "NULL in"),
        (("--table", "docs", "-o", "DB", "--into", "docs", "--key", "id"), "no column 'completion'"),
        (("--table", "docs", "-o", "DB", "--into", "a b", "--key", "id"), "no name of a table"),
    ],
)
def test_what_cannot_run(
    database: str, shell: Run, capsys: pytest.CaptureFixture[str], change: tuple[str, ...], words: str
) -> None:
    given = [database if word == "DB" else word for word in change]
    assert shell(*RUN, database, *given) == 1
    told = capsys.readouterr().err
    assert told.startswith("complete-fn: ")
    assert words in told
    assert ask(database, "SELECT count(*) FROM docs") == [(ROWS,)]


def test_a_select_of_somebody_else_writes_nothing(database: str) -> None:
    opened = open_database(database, read_only=True, seconds=20)
    for sql in ("DELETE FROM docs", "DROP TABLE docs", "INSERT INTO docs (id) VALUES (900)", "CREATE TABLE x (a INT)"):
        with pytest.raises(InputError):
            list(opened.batches(Query(sql)))
    assert ask(database, "SELECT count(*) FROM docs") == [(ROWS,)]


def test_a_query_has_its_time(database: str) -> None:
    slow = "SELECT sum(a.id * b.id * c.id * d.id) AS s FROM docs a, docs b, docs c, docs d"
    with pytest.raises(InputError) as caught:
        list(open_database(database, read_only=True, seconds=1).batches(Query(slow)))
    assert "docs a" not in str(caught.value)


def test_passwords_are_not_told(
    tmp_path: Path, shell: Run, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    for url in ("postgresql://u:hushhush@127.0.0.1:1/x", "mysql://u:hushhush@127.0.0.1:1/x", "oracle://u:hushhush@h/x"):
        monkeypatch.setenv("MY_DATABASE", url)
        assert shell(*RUN, "env:MY_DATABASE", "--table", "docs", "-o", "o.csv") == 1
        assert "hushhush" not in capsys.readouterr().err
    assert shell(*RUN, "env:NOT_SET_AT_ALL", "--table", "docs", "-o", "o.csv") == 1
    assert "not set" in capsys.readouterr().err


def test_values_of_every_kind_come_through(tmp_path: Path) -> None:
    from complete_fn.rows.databases import batch_of, plain

    values = [Decimal("1.5"), datetime(2026, 1, 2), date(2026, 1, 2), {"a": 1}, [1], b"x", memoryview(b"y"), None]
    assert [plain(v) for v in values] == [*values[:3], '{"a": 1}', "[1]", b"x", b"y", None]
    with pytest.raises(InputError, match=r"Column 'c' has values of several types .* CAST"):
        batch_of(["c"], [["a", "b"]], [pa.int64()])


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_write_does_not_wait_for_ever_behind_a_lock(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("complete_fn.rows.databases.LOCK_SECONDS", 1)
    opened = contextmanager(mariadb)() if kind == "mariadb" else request.getfixturevalue("postgres").database()
    with opened as url:
        database = open_database(url)
        rows = pa.table({"id": pa.array([1, 2]), "answer": pa.array(["a", "b"])})
        database.upsert("answers", "id", rows)
        engine = sa.create_engine(
            url.replace("postgresql:", "postgresql+psycopg:").replace("mariadb:", "mysql+pymysql:")
        )
        with engine.begin() as holder:
            holder.exec_driver_sql("UPDATE answers SET answer = 'x'")
            began = time.monotonic()
            with pytest.raises(DatabaseAwayError, match="cannot be used now"):
                database.upsert("answers", "id", rows)
            assert time.monotonic() - began < 20
        database.upsert("answers", "id", rows)
        database.close()
        engine.dispose()


# What can never take the answers of `id`, by what is wrong with it.
UNFIT = {
    "a column too few": ["CREATE TABLE t (id BIGINT PRIMARY KEY, answer TEXT)"],
    "no unique key": ["CREATE TABLE t AS SELECT id, text AS answer, text AS answer_error FROM docs WHERE id < 0"],
    "a column of its own that is NOT NULL": ["CREATE TABLE t ({columns}, owner VARCHAR(9) NOT NULL)"],
    "an answer that is NOT NULL": ["CREATE TABLE t ({columns})", "NOT NULL"],
    "a number for a text": ["CREATE TABLE t ({columns})", "BIGINT"],
    "a view": ["CREATE VIEW t AS SELECT id, text AS answer FROM docs"],
}
OF_ANSWERS = (
    "answer_error_message TEXT, answer_finish_reason VARCHAR(99), answer_prompt_tokens BIGINT, answer_cached_tokens "
    "BIGINT, answer_completion_tokens BIGINT, answer_cost DECIMAL(18,9), answer_source VARCHAR(99)"
)


@pytest.mark.parametrize("what", list(UNFIT))
def test_a_table_that_cannot_take_answers_is_found_before_they_are_paid(database: str, what: str) -> None:
    if what == "a number for a text" and database.startswith("sqlite"):
        pytest.skip("a column of SQLite takes any type")
    made, *more = UNFIT[what]
    error = f"answer_error VARCHAR(99) {more[0]}" if more == ["NOT NULL"] else "answer_error VARCHAR(99)"
    text = "answer BIGINT" if more == ["BIGINT"] else "answer TEXT"
    ask(database, made.format(columns=f"id BIGINT PRIMARY KEY, {text}, {error}, {OF_ANSWERS}"))
    opened = open_database(database)
    with pytest.raises(InputError) as caught:
        rehearse(opened, "t", "id", pa.array([1, 2]), "answer", True)
    opened.close()
    assert not isinstance(caught.value, DatabaseAwayError)
    left = "SELECT count(*) FROM docs WHERE text = 'text'" if what == "a view" else "SELECT count(*) FROM t"
    assert ask(database, left) == [(0,)]


def test_a_rehearsal_leaves_nothing_behind(database: str) -> None:
    opened, keys = open_database(database), pa.array([1, 2])
    rehearse(opened, "t", "id", keys, "answer", False)
    if not database.startswith("mariadb"):  # which cannot take back a new table
        with pytest.raises(Exception, match="t"):
            ask(database, "SELECT * FROM t")
    opened.upsert("t", "id", pa.table({"id": keys, "answer": ["a", "b"]}))
    rehearse(opened, "t", "id", keys, "answer", False)
    opened.close()
    assert ask(database, "SELECT id, answer FROM t ORDER BY id") == [(1, "a"), (2, "b")]


def test_a_rehearsal_writes_no_row_that_cannot_be_taken_back() -> None:
    with contextmanager(mariadb)() as url:
        ask(url, "CREATE TABLE t (id BIGINT PRIMARY KEY, answer TEXT) ENGINE = MyISAM", "INSERT INTO t VALUES (1, 'a')")
        opened = open_database(url)
        rehearse(opened, "t", "id", pa.array([1]), "answer", False)
        opened.close()
        assert ask(url, "SELECT id, answer FROM t") == [(1, "a")]


def test_a_database_that_is_away_is_told_from_one_that_refuses(tmp_path: Path) -> None:
    for url in ("postgresql://u@127.0.0.1:1/x", "mysql://u@127.0.0.1:1/x", f"sqlite:///{tmp_path}/none/x.db"):
        opened = open_database(url)
        with pytest.raises(DatabaseAwayError):
            opened.upsert("t", "id", pa.table({"id": [1], "answer": ["a"]}))
        opened.close()

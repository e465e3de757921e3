"""complete() and its like inside a real PostgreSQL, against a real service: rows, rights, errors, cancel, jobs."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from complete_fn import EchoEngine
from complete_fn.store.tables import attempts
from deploy.servers import Postgres
from tests.integration.server.call_outs.test_server_dialects import Counting
from tests.integration.server.conftest import Install, Running, psql

FINE, BAD = "SELECT complete('echo', 'hello world')", "SELECT complete('nope', 'x')"


def one(connection: psycopg.Connection[Any], query: str, *values: Any) -> Any:
    row = connection.execute(query.encode(), values).fetchone()
    assert row is not None
    return row[0] if len(row) == 1 else row


def test_rows_come_back_in_order_and_nulls_stay(shared: Running, installed: Install) -> None:
    con = installed(shared)
    assert one(con, FINE) == "hello world"
    assert one(con, "SELECT complete('echo', NULL), complete(NULL, 'x')") == (None, None)
    assert one(con, "SELECT complete_many('echo', ARRAY['a', NULL, 'b', repeat('word ', 99)])") == [
        "a",
        None,
        "b",
        None,
    ]
    assert one(con, "SELECT complete_many('echo', '{}'), complete_many('echo', NULL)") == ([], None)
    details = one(con, "SELECT complete_details('echo', repeat('word ', 99))")
    assert details["error"]["code"] == "prompt_too_long"
    assert one(con, "SELECT complete('echo', 'a b c', '{\"max_tokens\": 2}')") == "a b"
    found = con.execute(
        "SELECT * FROM complete_table($$SELECT g AS id, nullif('row ' || g, 'row 2') AS prompt"
        " FROM generate_series(1, 3) AS g ORDER BY g DESC;$$, 'echo')"
    ).fetchall()
    assert found == [({"id": 3}, "row 3", None), ({"id": 2}, None, None), ({"id": 1}, "row 1", None)]
    long = con.execute(
        "SELECT completion, error ->> 'code' FROM complete_table($$SELECT repeat('word ', 99) AS prompt$$, 'echo')"
    ).fetchall()
    assert long == [(None, "prompt_too_long")]


def test_the_example_runs_as_it_is(serve: Callable[..., Running], installed: Install, postgres_url: str) -> None:
    engine = Counting()
    con = installed(serve(engine=engine))
    con.execute(
        "CREATE TABLE packages AS SELECT 'p' || g AS package, 'does ' || g AS description FROM generate_series(1, 9) g"
    )
    con.execute("UPDATE packages SET description = NULL WHERE package = 'p5'")
    done = psql(postgres_url, "../examples/warehouses/postgres.sql")
    assert (done.returncode, done.stderr) == (0, "")
    assert " p1      | Name the section: does 1\n" in done.stdout
    assert re.search(r" p5 +\| +\| *\n", done.stdout)
    (job,) = re.findall(r"job_\w+", done.stdout)
    deadline = time.monotonic() + 30
    while len(found := con.execute("SELECT completion FROM complete_result(%s)", [job]).fetchall()) < 9:
        assert time.monotonic() < deadline, (len(found), found)
        time.sleep(0.1)
    assert len(engine.asked) == 8  # the job asks what the table has paid for


def test_a_table_is_one_submission_and_rows_are_one_each(serve: Callable[..., Running], installed: Install) -> None:
    engine = Counting()
    con = installed(serve(engine=engine))
    con.execute("CREATE TABLE docs AS SELECT g AS id, 'row ' || g AS body FROM generate_series(1, 40) AS g")
    one(con, "SELECT count(completion) FROM complete_table('SELECT id, body AS prompt FROM docs', 'echo')")
    assert engine.streams == 1
    one(con, "SELECT count(complete('echo', 'again ' || body)) FROM docs WHERE id <= 10")
    assert engine.streams == 11
    assert len(engine.asked) == 50
    plan = con.execute(
        "EXPLAIN SELECT complete('echo', 'planned') FROM docs WHERE complete('echo', 'x') = 'x'"
    ).fetchall()
    assert plan
    assert len(engine.asked) == 50
    con.execute("SELECT * FROM docs WHERE complete('echo', 'guarded ' || body) <> '' AND id = 7").fetchall()
    assert len(engine.asked) == 51  # the cheap condition first


def test_faults_are_errors_with_a_hint(serve: Callable[..., Running], installed: Install) -> None:
    running = serve()
    key = running.state.keys.create("acme", "ann")
    con = installed(running, key)

    def refused(query: str) -> psycopg.Error:
        with pytest.raises(psycopg.Error) as caught:
            con.execute(query.encode())
        assert caught.value.diag.message_hint
        assert key not in str(caught.value)
        return caught.value

    assert refused(BAD).sqlstate == "22023"
    assert "'nope'" in str(refused(BAD))
    assert "temperature = 9" in str(refused("SELECT complete('echo', 'x', '{\"temperature\": 9}')"))
    assert refused("SELECT * FROM complete_table('SELECT 1 AS id', 'echo')").sqlstate == "42703"
    assert refused("SELECT complete('echo', repeat('x', 17000000))").sqlstate == "54000"
    assert refused("SELECT complete_submit('SELECT 1 AS a', 'echo', 'no column')").sqlstate == "22023"
    con.execute("UPDATE complete_fn.service SET key = 'cfn-wrong'")
    assert refused(FINE).sqlstate == "28000"
    con.execute("UPDATE complete_fn.service SET url = 'http://127.0.0.1:1'")
    assert refused(FINE).sqlstate == "08001"
    with pytest.raises(psycopg.errors.UndefinedFunction):  # wrong arity
        con.execute("SELECT complete('echo')")


def test_users_reach_the_functions_and_nothing_behind_them(
    shared: Running, installed: Install, postgres: Postgres, postgres_url: str
) -> None:
    con = installed(shared)
    for role in ("dialects_ann", "dialects_bob", "dialects_eve"):
        con.execute(f"DROP ROLE IF EXISTS {role}".encode())
        con.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'".encode())
    con.execute("GRANT complete_fn_user TO dialects_ann, dialects_bob")
    con.execute("CREATE TABLE public.private AS SELECT 'secret' AS prompt")
    place = postgres_url.split("@")[1]
    try:
        with (
            psycopg.connect(f"postgresql://dialects_ann:x@{place}", autocommit=True) as ann,
            psycopg.connect(f"postgresql://dialects_bob:x@{place}", autocommit=True) as bob,
            psycopg.connect(f"postgresql://dialects_eve:x@{place}", autocommit=True) as eve,
        ):
            assert one(ann, FINE) == "hello world"
            forbidden = [
                "SELECT * FROM complete_fn.service",
                "SELECT * FROM complete_fn.jobs",
                "SELECT * FROM complete_fn.ask('GET', '/v1/jobs', NULL)",
                "SELECT complete_fn.call('GET', '/v1/jobs')",
                "SELECT * FROM complete_usage()",
                "SELECT * FROM complete_table('SELECT prompt FROM public.private', 'echo')",
                "SELECT * FROM complete_table('SELECT key AS prompt FROM complete_fn.service', 'echo')",
                "SELECT complete_submit('SELECT * FROM public.private', 'echo', '{prompt}')",
            ]
            for query in forbidden:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    ann.execute(query.encode())
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                eve.execute(FINE)
            job = one(ann, "SELECT complete_submit('SELECT 1 AS id', 'echo', 'row {id}')")
            assert finished(ann, job)[0] == "completed"
            for function in ("complete_result", "complete_progress", "complete_cancel"):
                with pytest.raises(psycopg.errors.UndefinedObject, match="no job"):
                    bob.execute(f"SELECT * FROM {function}('{job}')".encode())
    finally:
        con.execute("REVOKE complete_fn_user FROM dialects_ann, dialects_bob")
        con.execute("DROP ROLE dialects_ann, dialects_bob, dialects_eve")


def finished(con: psycopg.Connection[Any], job: str) -> Any:
    until = time.monotonic() + 60
    while True:
        found = con.execute("SELECT * FROM complete_progress(%s)", [job]).fetchone()
        assert found is not None
        if found[0] not in ("queued", "running", "stopping") or time.monotonic() > until:
            return found
        time.sleep(0.1)


def test_a_job_is_submitted_left_and_come_back_to(
    serve: Callable[..., Running], installed: Install, postgres_url: str
) -> None:
    con = installed(serve())
    con.execute("CREATE TABLE docs AS SELECT g AS id, 'row ' || g AS body FROM generate_series(1, 5) AS g")
    job = one(con, "SELECT complete_submit('SELECT * FROM docs', 'echo', 'say {body}', NULL, 1.0)")
    con.close()
    with psycopg.connect(postgres_url, autocommit=True) as later:
        status, rows, done, failed = finished(later, job)[:4]
        assert (status, rows, done, failed) == ("completed", 5, 5, 0)
        found = later.execute("SELECT \"row\" ->> 'id', completion FROM complete_result(%s)", [job]).fetchall()
        assert found == [(str(n), f"say row {n}") for n in range(1, 6)]


def test_a_job_shows_what_is_done_and_can_be_cancelled(serve: Callable[..., Running], installed: Install) -> None:
    gate = threading.Event()
    con = installed(serve(engine=Counting(gate)))
    job = one(con, "SELECT complete_submit('SELECT 1 AS id', 'echo', 'row {id}')")
    assert con.execute("SELECT * FROM complete_result(%s)", [job]).fetchall() == []
    assert one(con, "SELECT complete_cancel(%s)", job) in ("stopping", "cancelled")
    assert finished(con, job)[0] == "cancelled"
    gate.set()


def attempts_of(running: Running) -> set[str]:
    """How the runs of the service have ended."""
    with running.state.store.read() as connection:
        return set(connection.execute(sa.select(attempts.c.status)).scalars())


def test_cancelling_a_statement_stops_its_rows(serve: Callable[..., Running], installed: Install) -> None:
    gate = threading.Event()
    engine = Counting(gate)
    running = serve(engine=engine)
    con = installed(running)
    timer = threading.Timer(1.0, con.cancel)
    timer.start()
    with pytest.raises(psycopg.errors.QueryCanceled):
        con.execute("SELECT complete_many('echo', ARRAY['a', 'b'])")
    until = time.monotonic() + 30
    while (states := attempts_of(running)) != {"cancelled"} and time.monotonic() < until:
        time.sleep(0.05)
    assert states == {"cancelled"}
    gate.set()
    con.execute("SET statement_timeout = '500ms'")
    gate.clear()
    with pytest.raises(psycopg.errors.QueryCanceled):
        con.execute("SELECT complete('echo', 'c')")
    gate.set()


def test_characters_that_postgresql_does_not_take(serve: Callable[..., Running], installed: Install) -> None:
    class Odd(EchoEngine):
        def complete(self, request: Any) -> Any:
            from dataclasses import replace

            return replace(super().complete(request), text='nul \x00, slash \\u0000, "ü€😀"\n')

    con = installed(serve(engine=Odd(64)))
    assert one(con, "SELECT complete('echo', 'x')") == 'nul \ufffd, slash \\u0000, "ü€😀"\n'
    details = one(con, "SELECT complete_details('echo', 'x')")
    assert details["value"] == 'nul \ufffd, slash \\u0000, "ü€😀"\n'


def test_installing_again_changes_the_address_and_uninstalling_leaves_nothing(
    shared: Running, installed: Install, postgres_url: str
) -> None:
    con = installed(shared)
    installed(shared)
    assert one(con, FINE) == "hello world"
    assert psql(postgres_url, "postgres_uninstall.sql").returncode == 0
    left = "SELECT count(*) FROM pg_proc WHERE starts_with(proname, 'complete')"
    assert one(con, left) == 0
    assert one(con, "SELECT count(*) FROM pg_namespace WHERE nspname = 'complete_fn'") == 0
    missing = psql(postgres_url, "postgres_install.sql")
    assert missing.returncode == 3
    assert "COMPLETE_FN_URL is not set" in missing.stderr


@pytest.fixture
def mallory(postgres_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A role that may log in and create in public, as everybody might before PostgreSQL 15, and no more."""
    with psycopg.connect(postgres_url, autocommit=True) as con:
        con.execute("CREATE ROLE mallory LOGIN PASSWORD 'x'")
        con.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
        with psycopg.connect(f"postgresql://mallory:x@{postgres_url.split('@')[1]}", autocommit=True) as opened:
            yield opened
        con.execute("DROP OWNED BY mallory CASCADE")
        con.execute("DROP ROLE mallory")


TAKE = """CREATE FUNCTION public.take() RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) THEN
        ALTER ROLE mallory SUPERUSER;
    END IF;
END $$"""
TRAPS = {
    "format(a text, b regprocedure) RETURNS text": "pg_catalog.format(a, b)",
    "format(a text, b text) RETURNS text": "pg_catalog.format(a, b)",
    "array_append(a jsonb[], b jsonb) RETURNS jsonb[]": "pg_catalog.array_append(a, b)",
    "to_jsonb(a record) RETURNS jsonb": "pg_catalog.to_jsonb(a)",
    "minus(a jsonb, b jsonb) RETURNS jsonb": "a - (b #>> '{}')",
    "arrow(a jsonb, b jsonb) RETURNS jsonb": "a -> (b #>> '{}')",
}


def test_whoever_may_create_in_the_schema_gets_nothing(
    shared: Running, installed: Install, mallory: psycopg.Connection[Any], postgres_url: str
) -> None:
    mallory.execute(TAKE)
    for head, result in TRAPS.items():
        body = f"BEGIN PERFORM public.take(); RETURN {result}; END"
        mallory.execute(f"CREATE FUNCTION public.{head} LANGUAGE plpgsql AS $${body}$$".encode())
    for operator, function in (("-", "minus"), ("->", "arrow")):
        mallory.execute(
            f"CREATE OPERATOR public.{operator} (LEFTARG = jsonb, RIGHTARG = jsonb, FUNCTION = {function})".encode()
        )
    con = installed(shared, "cfn-secret")
    con.execute("UPDATE complete_fn.service SET key = ''")
    found = con.execute("SELECT * FROM complete_table('SELECT 1 AS id, ''row'' AS prompt', 'echo')").fetchall()
    assert found == [({"id": 1}, "row", None)]
    job = one(con, "SELECT complete_submit('SELECT 1 AS id', 'echo', 'row {id}')")
    assert finished(con, job)[0] == "completed"
    assert not one(con, "SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        mallory.execute(FINE)
    assert psql(postgres_url, "postgres_uninstall.sql").returncode == 0


def test_functions_of_others_are_left_as_they_are(
    shared: Running, installed: Install, mallory: psycopg.Connection[Any], postgres_url: str
) -> None:
    mallory.execute(
        "CREATE FUNCTION public.complete(number int) RETURNS text LANGUAGE sql AS 'SELECT ''order '' || $1'"
    )
    mallory.execute(
        "CREATE FUNCTION public.complete_cancel(x int) RETURNS text LANGUAGE plpgsql SECURITY DEFINER"
        " AS $$ BEGIN RETURN (SELECT key FROM complete_fn.service); END $$"
    )
    con = installed(shared, "cfn-secret")
    con.execute("GRANT complete_fn_user TO mallory")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        mallory.execute("SELECT complete_cancel(1)")
    assert psql(postgres_url, "postgres_uninstall.sql").returncode == 0
    assert one(mallory, "SELECT complete(7)") == "order 7"


@pytest.mark.parametrize(
    "taken",
    [
        "CREATE FUNCTION public.complete(a text, b text, c jsonb) RETURNS text LANGUAGE sql AS 'SELECT $1'",
        "CREATE SCHEMA complete_fn",
    ],
)
def test_names_that_are_taken_are_refused(mallory: psycopg.Connection[Any], postgres_url: str, taken: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as con:
        con.execute(f"GRANT CREATE ON DATABASE {con.info.dbname} TO mallory".encode())
    mallory.execute(taken.encode())
    done = psql(
        postgres_url, "postgres_install.sql", COMPLETE_FN_URL="http://127.0.0.1:1", COMPLETE_FN_KEY="cfn-secret"
    )
    assert done.returncode == 3
    assert re.search(
        r"public.complete\(text,text,jsonb\) belongs to mallory|schema complete_fn belongs to mallory", done.stderr
    )
    assert "HINT:  Rename or drop it." in done.stderr
    assert "cfn-secret" not in done.stderr


def test_uninstalling_never_drops_answers(shared: Running, installed: Install, postgres_url: str) -> None:
    con = installed(shared)
    con.execute("CREATE MATERIALIZED VIEW paid AS SELECT complete('echo', 'an answer') AS answer")
    con.execute("CREATE VIEW report AS SELECT * FROM paid")
    done = psql(postgres_url, "postgres_uninstall.sql")
    assert done.returncode == 3
    assert "materialized view public.paid depends on function public.complete(text,text,jsonb)" in done.stderr
    assert "CREATE TABLE ... AS" in done.stderr
    assert one(con, "SELECT answer FROM report") == "an answer"
    assert one(con, FINE) == "hello world"
    con.execute("DROP MATERIALIZED VIEW paid CASCADE")
    con.execute("CREATE TABLE complete_fn.docs AS SELECT 1 AS id")
    done = psql(postgres_url, "postgres_uninstall.sql")
    assert done.returncode == 3
    assert "table complete_fn.docs depends on schema complete_fn" in done.stderr
    con.execute("DROP TABLE complete_fn.docs")


def test_another_schema(shared: Running, installed: Install, postgres_url: str) -> None:
    con = installed(shared)
    con.execute('CREATE SCHEMA "my Own"')
    again = ["-v", "schema=my Own"]
    assert psql(postgres_url, "postgres_install.sql", *again, COMPLETE_FN_URL=shared.url).returncode == 0
    assert one(con, """SELECT "my Own".complete('echo', 'x')""") == "x"
    refused = psql(postgres_url, "postgres_install.sql", "-v", "schema=complete_fn", COMPLETE_FN_URL=shared.url)
    assert refused.returncode == 3
    assert "Give another one" in refused.stderr
    assert psql(postgres_url, "postgres_uninstall.sql").returncode == 0
    assert one(con, "SELECT count(*) FROM pg_proc WHERE starts_with(proname, 'complete')") == 0

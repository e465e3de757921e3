"""Generated queries: `sql` has the result of the plain run and never pays for a prompt that the plain run would not."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from complete_fn import Completion, CompletionRequest, EchoEngine, Usage
from complete_fn_connectors.duckdb import register, sql

TABLES = """
CREATE TABLE docs AS SELECT i AS id, 'doc ' || (i * 7 % 400) AS text, i % 5 AS k FROM range(3000) r(i);
CREATE TABLE tags AS SELECT i AS id, 'tag ' || i AS name, i % 7 AS k FROM range(30) r(i);
"""


VIEWS = """
CREATE VIEW seen AS SELECT complete('m', text) AS a, id, k, text FROM docs;
CREATE VIEW liked(n, said, k) AS SELECT id, upper(a), k FROM seen WHERE a <> 'no';
"""


class Opinionated(EchoEngine):
    """Says yes, no or the prompt itself, and refuses some prompts: by the prompt alone."""

    def complete(self, request: CompletionRequest) -> Completion:
        prompt = str(request.prompt)
        kind = zlib.crc32(f"{request.model} {prompt}".encode()) % 5
        if kind == 4:
            return Completion.failed("blocked", "The content filter refused the row.")
        return Completion(["yes", "yes", "no", prompt][kind], "stop", usage=Usage(1, 0, 1))


def texts(alias: str, column: str) -> st.SearchStrategy[str]:
    return st.sampled_from([f"{alias}.{column}", f"{alias}.{column} || '!'", f"'about ' || {alias}.k", "'same'"])


@st.composite
def calls(draw: Any, alias: str, column: str, depth: int = 1) -> str:
    prompt = draw(texts(alias, column))
    if depth and draw(st.integers(0, 3)) == 0:
        inner = draw(calls(alias, column, 0))
        prompt = draw(st.sampled_from([inner, f"'on ' || {inner}", f"CASE WHEN {inner} = 'no' THEN {prompt} END"]))
    return f"complete('{draw(st.sampled_from('mn'))}', {prompt})"


@st.composite
def conditions(draw: Any, alias: str, column: str, depth: int = 2) -> str:
    kind = draw(st.integers(0, 8 if depth else 5))
    if kind < 2:
        return str(
            draw(
                st.sampled_from(
                    [f"{alias}.k = 1", f"{alias}.id < 900", f"length({alias}.{column}) > 6", f"{alias}.id % 3 = 0"]
                )
            )
        )
    if kind < 6:
        call = draw(calls(alias, column))
        return str(
            draw(
                st.sampled_from(
                    [f"{call} = 'yes'", f"{call} IS NULL", f"{call} <> 'no'", f"coalesce({call}, 'yes') = 'yes'"]
                )
            )
        )
    left, right = draw(conditions(alias, column, depth - 1)), draw(conditions(alias, column, depth - 1))
    if kind == 8:
        return f"NOT ({left})"
    return f"({left} {'AND' if kind == 6 else 'OR'} {right})"


@st.composite
def values(draw: Any, alias: str, column: str) -> str:
    call, other = draw(calls(alias, column)), draw(calls(alias, column))
    condition = draw(conditions(alias, column, 1))
    return str(
        draw(
            st.sampled_from(
                [
                    f"{alias}.id",
                    call,
                    f"upper({call})",
                    f"coalesce({call}, {other})",
                    f"CASE WHEN {condition} THEN {call} ELSE {other} END",
                    f"CASE {call} WHEN 'yes' THEN {other} WHEN 'no' THEN 'never' END",
                ]
            )
        )
    )


@st.composite
def queries(draw: Any) -> str:
    where, value = draw(conditions("d", "text")), draw(values("d", "text"))
    other, call = draw(conditions("t", "name", 1)), draw(calls("d", "text"))
    grouped = draw(st.sampled_from(["complete('m', 'about ' || d.k) = 'yes'", "complete('n', 'k' || d.k) <> 'no'"]))
    tag, few = draw(calls("t", "name")), draw(st.sampled_from([3, 60]))
    cte = f"WITH c AS (SELECT {value} AS a, id, k, text FROM docs d WHERE d.k < 3)"
    row_number = "row_number() OVER (PARTITION BY d.k ORDER BY d.id)"
    shapes = [
        f"SELECT {value} AS a, d.id FROM docs d WHERE {where}",
        f"SELECT {value} AS a FROM docs d WHERE {where} LIMIT {draw(st.sampled_from([1, 7, 2500]))}",
        f"SELECT {value} AS a, d.id FROM docs d WHERE {where} ORDER BY d.id DESC LIMIT {few}",
        f"SELECT {value} AS a, d.id FROM docs d WHERE d.k = 2 ORDER BY {call}, d.id LIMIT 5",
        f"{cte} SELECT a, {call} AS b FROM c d WHERE {where}",
        f"SELECT {call} AS a, count(*) AS n FROM docs d WHERE {where} GROUP BY {call}",
        f"SELECT d.k, max({call}) AS a FROM docs d WHERE {where} GROUP BY d.k HAVING min({value}) IS NOT NULL",
        f"SELECT d.k, count(*) AS n FROM docs d WHERE {where} GROUP BY d.k HAVING {grouped}",
        f"SELECT d.k, count(*) AS n FROM docs d WHERE d.id < 2900 AND {where} GROUP BY d.k HAVING {grouped} AND n > 3",
        f"SELECT d.id, d.k FROM docs d WHERE d.id < 2900 AND {where} QUALIFY {row_number} < 3 AND {grouped}",
        f"SELECT {call} AS a, d.id FROM docs d WHERE {where} AND a <> 'no'",
        f"SELECT {call} AS a, d.id FROM docs d WHERE d.id < 2900 AND a <> 'no' AND {grouped}",
        f"SELECT d.id, t.name, {value} AS a FROM docs d JOIN tags t ON d.id = t.id WHERE {where} AND {other}",
        f"SELECT d.id, {tag} AS a FROM docs d LEFT JOIN tags t ON d.id = t.id AND {other} WHERE d.k = 3 AND {where}",
        f"SELECT d.id FROM docs d JOIN tags t ON {call} = {tag} WHERE d.k = 1 AND {other}",
        f"SELECT d.id FROM docs d WHERE d.text IN (SELECT 'doc ' || t.id FROM tags t WHERE {other}) AND {where}",
        f"SELECT d.id FROM docs d WHERE EXISTS (SELECT 1 FROM tags t WHERE t.id = d.id AND {other}) AND {where}",
        f"SELECT d.id, rank() OVER (PARTITION BY {call} ORDER BY d.id) AS r FROM docs d WHERE {where}",
        f"SELECT * FROM (SELECT {value} AS a, d.id FROM docs d) WHERE a::VARCHAR = 'yes' AND id % 4 = 1",
        f"SELECT {call} AS a FROM docs d WHERE {where} UNION SELECT {tag} FROM tags t WHERE {other}",
        f"SELECT (SELECT max({tag}) FROM tags t WHERE t.k = d.k) AS a, d.id FROM docs d WHERE {where}",
        f"SELECT a FROM (SELECT {value} AS a, id n FROM docs d WHERE {where}) WHERE n % 7 = 1 AND a::VARCHAR <> 'no'",
        f"SELECT a, name FROM (SELECT {value} AS a, id FROM docs d) v JOIN tags t USING (id) WHERE t.k < 4 AND {other}",
        f"{cte} SELECT c.a, t.name FROM c, tags t WHERE c.id = t.id AND c.k = 2 AND {other}",
        f"{cte} SELECT a, id, id FROM c WHERE id % 5 = 2 AND upper(a::VARCHAR) <> 'NO'",
        f"{cte}, e AS (SELECT *, {call} AS b FROM c d WHERE id % 3 = 1) SELECT id, a, b FROM e WHERE abs(k) = 1",
        f"{cte} SELECT x.id FROM c x JOIN c y ON x.id = y.k WHERE x.id % 2 = 1 AND y.id % 2 = 0",
        f"SELECT d.a, d.id FROM seen d WHERE d.id % 4 = 3 AND {where}",
        f"SELECT s.a, t.name FROM seen s LEFT JOIN tags t ON s.id = t.id AND {other} WHERE s.id % 9 = 0",
        f"SELECT t.name, s.a FROM tags t LEFT JOIN seen s ON s.id = t.id WHERE {other} AND s.id % 9 = 0",
        f"SELECT said FROM liked WHERE n % 6 = 0 AND said <> 'YES' UNION ALL SELECT a FROM seen WHERE id % 90 = {few}",
        f"SELECT l.said, t.name FROM liked l JOIN tags t ON l.n = t.id + 1 WHERE l.k = 2 AND {other}",
    ]
    return str(draw(st.sampled_from(shapes)))


@contextmanager
def connection() -> Iterator[tuple[duckdb.DuckDBPyConnection, Opinionated]]:
    home = Path(tempfile.mkdtemp())
    engine = Opinionated()
    with duckdb.connect() as con:
        con.execute(TABLES)
        with register(con, engine=engine, home=home, progress=False):
            con.execute(VIEWS)
            yield con, engine
    shutil.rmtree(home)


def paid(engine: Opinionated) -> Counter[tuple[str, str]]:
    return Counter((r.model, str(r.prompt)) for r in engine.requests)


def check(query: str) -> None:
    with connection() as (con, engine):
        plain = con.execute(query).fetchall()
        plain_paid = paid(engine)
    with connection() as (con, engine):
        planned = sql(con, query)
        assert sorted(planned.fetchall(), key=repr) == sorted(plain, key=repr)
        extra = paid(engine) - plain_paid
        assert not extra, f"{extra.total()} of {plain_paid.total()} prompts more than the plain run"


@pytest.mark.filterwarnings("ignore::complete_fn.CompletionWarning")
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False)
@given(queries())
def test_a_planned_query_has_the_plain_result_and_pays_for_nothing_else(query: str) -> None:
    check(query)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::complete_fn.CompletionWarning")
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(queries())
def test_many_more(query: str) -> None:
    check(query)

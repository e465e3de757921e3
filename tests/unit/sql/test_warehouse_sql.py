"""The SQL for warehouses that cannot run here: every statement parses in its dialect, placeholders are explained."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import sqlglot
from sqlglot import exp

ROOT = Path(__file__).parents[3] / "sql"
PLACEHOLDER = re.compile(r"<(\w+)>")
# https://docs.aws.amazon.com/redshift/latest/dg/r_CREATE_EXTERNAL_FUNCTION.html, which sqlglot does not know.
EXTERNAL = re.compile(
    r"CREATE OR REPLACE EXTERNAL FUNCTION \w+\((?P<types>.*)\) RETURNS (?P<result>\S+)\s+(VOLATILE|STABLE)\s+"
    r"LAMBDA '[\w-]+' IAM_ROLE '\w+' RETRY_TIMEOUT \d+ MAX_BATCH_ROWS \d+ MAX_BATCH_SIZE \d+ (KB|MB)"
)


def statements(path: Path) -> list[str]:
    text = "\n".join(line.partition("--")[0] for line in path.read_text().splitlines())
    return [s.strip() for s in PLACEHOLDER.sub(r"x_\1", text).split(";") if s.strip()]


def trees(path: Path, dialect: str) -> list[exp.Expression | None]:
    logging.getLogger("sqlglot").setLevel(logging.ERROR)
    return [sqlglot.parse_one(s, dialect=dialect) for s in statements(path)]


@pytest.mark.parametrize("dialect", ["snowflake", "bigquery"])
def test_definitions_parse(dialect: str) -> None:
    found = trees(ROOT / "complete_fn_sql" / f"{dialect}.sql", dialect)
    made = [t for t in found if isinstance(t, exp.Create)]
    assert len(made) >= 3
    assert all(t.kind == "FUNCTION" for t in made)
    rest = [t.sql() for t in found if t is not None and not isinstance(t, exp.Create)]
    assert all(r.startswith("CREATE OR REPLACE API INTEGRATION") for r in rest)  # sqlglot takes it as it is


def test_redshift_definitions_have_the_documented_form() -> None:
    found = statements(ROOT / "complete_fn_sql" / "redshift.sql")
    assert len(found) == 3
    for statement in found:
        match = EXTERNAL.fullmatch(statement)
        assert match is not None, statement
        for kind in [*re.split(r", ", match["types"]), match["result"]]:
            assert exp.DataType.build(kind, dialect="redshift").this == exp.DataType.Type.VARCHAR


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "warehouses").glob("*.sql")), ids=lambda p: p.stem)
def test_examples_parse(path: Path) -> None:
    found = trees(path, path.stem)
    assert len(found) >= 2
    assert all(isinstance(t, exp.Select) for t in found)


@pytest.mark.parametrize("dialect", ["snowflake", "bigquery", "redshift"])
def test_every_placeholder_is_explained(dialect: str) -> None:
    text = (ROOT / "complete_fn_sql" / f"{dialect}.sql").read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("--"))
    used = {name for line in text.splitlines() if not line.startswith("--") for name in PLACEHOLDER.findall(line)}
    assert used
    assert used <= set(PLACEHOLDER.findall(head))

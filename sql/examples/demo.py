"""`make demo`: classify and summarise real Debian package descriptions through DuckDB, on vLLM's CPU build."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import duckdb

from complete_fn_connectors.duckdb import register

SAMPLE = Path(__file__).with_name("packages.parquet")
MODEL = "demo-llama-swiftkv"

QUERIES = {
    "Cortex's own spelling, eight packages": f"""
        SELECT package, section,
               SNOWFLAKE.CORTEX.COMPLETE('{MODEL}', 'Name the section: ' || description) AS answer
        FROM packages ORDER BY md5(package) LIMIT 8
    """,
    "One-line synopses, and who really wrote what": f"""
        SELECT synopsis AS maintainers_own,
               complete('{MODEL}', 'Write a one-line synopsis: ' || description) AS answer
        FROM packages ORDER BY hash(package) LIMIT 8
    """,
    "Answers as JSON that is valid by construction": f"""
        SELECT package,
               complete('{MODEL}', 'Describe as JSON: ' || description, {{'response_format': {{
                   'type': 'object', 'required': ['section', 'synopsis'],
                   'properties': {{'section': {{'type': 'string'}}, 'synopsis': {{'type': 'string'}}}}}}}})::JSON
                   AS answer
        FROM packages ORDER BY hash(source) LIMIT 4
    """,
    "400 packages that the model never saw: how often it names the section": f"""
        WITH asked AS (SELECT * FROM packages ORDER BY hash(package) LIMIT 400),
        answered AS (SELECT section, complete('{MODEL}', 'Name the section: ' || description) AS answer FROM asked)
        SELECT count(*) AS packages, count(*) FILTER (answer = section) AS named_right,
               round(100.0 * count(*) FILTER (answer = section) / count(*), 1) AS percent
        FROM answered
    """,
    "The same 400 again, three times over: merged and known, so nothing is computed or paid": f"""
        WITH asked AS (SELECT * FROM packages ORDER BY hash(package) LIMIT 400)
        SELECT complete('{MODEL}', 'Name the section: ' || description) AS answer, count(*) AS rows
        FROM asked, range(3) GROUP BY answer ORDER BY rows DESC LIMIT 5
    """,
}


def main() -> None:
    con = duckdb.connect()
    con.execute(f"CREATE VIEW packages AS FROM '{SAMPLE}'")
    registered = register(con, cortex=True)
    print("Starting vLLM in a child process (its first start takes longest) ...", file=sys.stderr)
    for title, query in QUERIES.items():
        print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n# {title}")
        print(textwrap.indent(textwrap.dedent(query).strip(), "    "))
        con.sql(query).show(max_width=150, max_col_width=66)
        print(registered.summary())
    print("\nEvery token is in the ledger: COMPLETE_FN_HOME=.cache/demo .venv/bin/complete-fn usage")
    registered.close()


if __name__ == "__main__":
    main()

"""Calls with constant arguments only are answered before the query is planned, in the order in which DuckDB meets
them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import duckdb

from complete_fn_connectors.duckdb_query.call_sites import Tagged, tag_calls
from complete_fn_connectors.duckdb_query.collect import (
    Batch,
    Collector,
    Constant,
    ask_batch,
)
from complete_fn_connectors.duckdb_query.dependencies import optimised_plan, read_plan, refuse_volatile
from complete_fn_connectors.duckdb_query.json_versions import Tree
from complete_fn_connectors.duckdb_query.syntax_tree import (
    Parameters,
    RunsPlainly,
    Statement,
    nodes,
    put_values_in,
    to_text,
)

WORD = re.compile(r"\w+")
CONSTANTS = 40  # each costs a submission of one prompt; a query with more of them runs plainly


def outside_views(statement: Statement, called: Mapping[str, str], run: str) -> Tree:
    """The statement's own SELECT with its calls numbered; unchanged if all its calls are in views."""
    try:
        return tag_calls(statement.tree, statement.select, called, run).tree
    except RunsPlainly:
        return statement.tree


def refuse_hidden(con: duckdb.DuckDBPyConnection, tagged: Tree, called: Mapping[str, str]) -> None:
    """Refuse a query with calls that got no number: DuckDB could evaluate them while it plans, which would ask them.

    Raises:
        RunsPlainly: a function of `called` is called inside a macro, a lambda or with named arguments.
    """
    asking = {name.rpartition(".")[2] for name in called}
    query = (
        "SELECT lower(function_name), lower(macro_definition) FROM duckdb_functions() WHERE macro_definition NOT NULL"
    )
    macros = con.execute(f"{query} AND NOT internal").fetchall()
    for _ in macros:  # macros may call macros
        more = {name for name, text in macros if asking & {*WORD.findall(text)}} - asking
        if not more:
            break
        asking |= more
    for node in nodes(tagged):
        name = node.get("function_name", "").lower() if node.get("class") == "FUNCTION" else ""
        if name in asking:
            raise RunsPlainly(f"{name}() is called inside a macro, a lambda or with named arguments")


class OpenConstants(Exception):
    """DuckDB needs the answers of constant calls before it can plan. This exception never leaves this package.

    Attributes:
        tagged: the query with its calls numbered.
        sites: of the constant calls that DuckDB met, in its order.
    """

    def __init__(self, tagged: Tagged, constants: list[Constant]) -> None:
        super().__init__()
        self.tagged, self.constants = tagged, constants
        self.sites = list(dict.fromkeys(constant.site for constant in constants))


def answer_constants(
    con: duckdb.DuckDBPyConnection,
    tagged: Tagged,
    parameters: Parameters,
    names: set[str],
    collector: Collector,
    learn: Callable[[Constant], bool],
) -> None:
    """Answer the constant calls of a query that DuckDB evaluates while it plans: the plan depends on their values.

    Only the first call without an answer is answered; then DuckDB plans again. The plain query is planned in the same
    way up to that call, so it pays for the call too. After a refusal, DuckDB may try calls that the plain query never
    makes.

    Raises:
        RunsPlainly: There are too many constant calls, or the query may be run only once.
        OpenConstants: `learn` does not know an answer.
    """
    constant = put_values_in(con, tagged.tree, parameters)
    for _ in range(CONSTANTS):
        collector.constants.clear()
        try:
            written = read_plan(con, to_text(con, constant), optimise=False)
            refuse_volatile(con, written, names)  # first: to optimise calls that it hides would ask them
            optimised_plan(con, constant)
        except RunsPlainly:
            if not collector.constants:
                raise
        if not collector.constants:
            return
        if not learn(collector.constants[0]):
            raise OpenConstants(tagged, collector.constants)
    raise RunsPlainly(f"more than {CONSTANTS} of its calls have constant arguments")


def ask_constant(collector: Collector, constant: Constant) -> bool:
    """Ask the prompts of a constant call.

    Raises:
        RunsPlainly: The answer may not be reused.
    """
    if not constant.is_reusable:
        raise RunsPlainly("a constant call's answers may not be reused")
    ask_batch(collector, Batch({constant.asked.key: (constant.asked, constant.texts)}))
    return True

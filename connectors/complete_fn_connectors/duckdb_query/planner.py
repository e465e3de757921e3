"""A whole query as one plan: `run_query` is what `duckdb.sql` does. Read it first.

number the calls --DuckDB's plan--> what waits for what --guards--> run in collect mode, ask what was noted, again until
nothing new is asked --> the query itself, with every answer in memory. What is in doubt, the query itself asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import duckdb

from complete_fn.errors import CompleteError
from complete_fn_connectors.duckdb_query.call_sites import NAMED, Site, Tagged, tag_calls
from complete_fn_connectors.duckdb_query.collect import (
    Asked,
    Collector,
    Constant,
    Functions,
    Memory,
    Remembering,
    Round,
    ask,
    to_ask,
)
from complete_fn_connectors.duckdb_query.constants import (
    answer_constants,
    ask_constant,
    outside_views,
    refuse_hidden,
)
from complete_fn_connectors.duckdb_query.dependencies import Order, optimised, read_order, read_plan
from complete_fn_connectors.duckdb_query.guards import Guarding
from complete_fn_connectors.duckdb_query.json_versions import Tree, read_batches
from complete_fn_connectors.duckdb_query.materialise import RUNS, ends, finish, is_query
from complete_fn_connectors.duckdb_query.may_fail import may_fail
from complete_fn_connectors.duckdb_query.pushdown import narrowed
from complete_fn_connectors.duckdb_query.syntax_tree import (
    Parameters,
    RunsPlainly,
    Statement,
    nodes,
    read_statement,
    replaced,
    to_text,
    with_values,
)
from complete_fn_connectors.duckdb_query.views import with_views
from complete_fn_connectors.functions import QuerySession

ROUNDS = 40  # a query under LIMIT that needs more of them goes on plainly
COLLECTING: dict[str, Collector] = {}  # by the run's name, which every numbered call carries


@dataclass
class Planned:
    """A query that is planned as a whole.

    Attributes:
        collecting: the SELECT with numbered calls and guards, run in collect mode.
        final: the whole statement with guards, run at the end.
        guards: by site, the conditions before it as text.
    """

    collecting: str
    final: str
    sites: list[Site]
    order: Order
    guards: dict[int, list[str]] = field(default_factory=dict)


def run_query(con: duckdb.DuckDBPyConnection, functions: Functions, query: str, parameters: Parameters) -> Any:
    """Run a statement with its completions planned as a whole.

    Returns:
        A relation over the rows of a SELECT; what `con.execute` returns for other statements.
    """
    memory, guarded = Memory(), False
    with collecting(functions.session, memory) as (run, collector):
        try:
            statement = read_statement(con, query)
            planned = plan_query(
                con, functions, statement, parameters, run, collector, partial(ask_constant, collector)
            )
            collector.order, collector.phase = planned.order, "collect"
            collect(con, planned, collector, parameters)
            final, selects = planned.final, statement.returns_rows
            guarded = final != statement.text
        except RunsPlainly:
            final, selects = query, is_query(con, query)
        except (duckdb.Error, CompleteError) as error:
            if ends(con, error):
                raise
            final, selects = query, is_query(con, query)
    with remembering(functions, memory):
        try:
            return finish(con, functions, final, selects, parameters)
        except duckdb.Error as error:
            if not guarded or ends(con, error):
                raise
        # A guard failed for a row that a completion would have spared.
        return finish(con, functions, query, selects, parameters)


@contextlib.contextmanager
def collecting(session: QuerySession, memory: Memory) -> Iterator[tuple[str, Collector]]:
    run, collector = f"run{next(RUNS)}", Collector(session, memory)
    COLLECTING[run] = collector
    try:
        yield run, collector
    finally:
        del COLLECTING[run]


@contextlib.contextmanager
def remembering(functions: Functions, memory: Memory) -> Iterator[None]:
    """The functions answer from memory first. Queries at the same time see each other's answers, as from the store."""
    functions.answering.append(memory)
    try:
        yield
    finally:
        functions.answering.remove(memory)


def plan_query(
    con: duckdb.DuckDBPyConnection,
    functions: Functions,
    statement: Statement,
    parameters: Parameters,
    run: str,
    collector: Collector,
    learn: Callable[[Constant], bool],
) -> Planned:
    """Put views in, answer the constants, narrow what is asked, number the calls, read what waits for what, put guards.

    Args:
        learn: gives the memory the answer of a constant call; False if it cannot without paying.

    Raises:
        RunsPlainly: something in the query does not allow it.
        OpenConstants: DuckDB needs the answer of a constant call, which `learn` does not give.
        duckdb.Error: what is around the SELECT is at fault, as an INSERT into a table that is not there.
    """
    names = functions.planned_names
    called = {name: names[name] for name in names.keys() - macros(con)}
    tree, text = with_views(con, statement.tree, statement.select, called)
    as_it_is = tag_calls(tree, text, called, run)
    refuse_hidden(con, as_it_is.tree, called)
    answer_constants(con, as_it_is, parameters, {*names.values()}, collector, learn)
    if tree is not statement.tree:
        read_plan(
            con, to_text(con, with_values(con, outside_views(statement, called, run), parameters)), optimise=False
        )
    fewer = narrowed(con, tree, called)
    found = None
    if fewer is not tree:
        with contextlib.suppress(RunsPlainly, duckdb.Error):
            tagged = tag_calls(fewer, text, called, run)
            found = plan_tree(con, tagged, statement, parameters, collector, True)
    if found is None:
        found = plan_tree(con, as_it_is, statement, parameters, collector, False)
    if collector.constants:  # only what the plain query pays for too may be asked
        raise RunsPlainly("a guard or narrower subquery has a constant call of its own")
    return found


def plan_tree(
    con: duckdb.DuckDBPyConnection,
    tagged: Tagged,
    statement: Statement,
    parameters: Parameters,
    collector: Collector,
    changed: bool,
) -> Planned:
    """Read what waits for what, put guards. `changed`: whether the tree asks less than the statement."""
    constant = with_values(con, tagged.tree, parameters)
    written = read_plan(con, to_text(con, constant), optimise=False)
    if not statement.returns_rows:
        tried = statement.with_select(to_text(con, tagged.tree))
        with collector.checking():
            con.execute(f"EXPLAIN {tried}", parameters or []).fetchall()

    def final_text(tree: Tree) -> str:
        return statement.with_select(to_text(con, with_names(con, tagged.untagged(tree), statement.tree)))

    plan = optimised(con, constant)
    if in_transaction(con) and (failing := may_fail(written, plan)):
        raise RunsPlainly(f"inside a transaction, which {failing} would abort where it fails")
    order = read_order(plan)
    guarding = Guarding(order)
    guarded = guarding.apply(tagged.tree)
    if guarded != tagged.tree:
        after = read_order(optimised(con, with_values(con, guarded, parameters)))
        if keeps(order, after):
            return Planned(
                to_text(con, guarded), final_text(guarded), tagged.sites, after, shown(con, tagged, guarding)
            )
    return Planned(
        to_text(con, tagged.tree), final_text(tagged.tree) if changed else statement.text, tagged.sites, order
    )


def with_names(con: duckdb.DuckDBPyConnection, tree: Any, written: Any) -> Any:
    """The tree with the names that the columns of all its SELECTs have as written: DuckDB names an expression by its
    text. What stands in place of something else, as a subquery for a view, has its own names."""
    if tree == written or type(tree) is not type(written):
        return tree
    if isinstance(tree, list):
        return (
            [with_names(con, *pair) for pair in zip(tree, written, strict=True)] if len(tree) == len(written) else tree
        )
    if not isinstance(tree, dict) or tree.get("type") != written.get("type"):
        return tree
    named = {k: with_names(con, v, written.get(k)) for k, v in tree.items()}
    if tree.get("type") == "SELECT_NODE":
        pairs = zip(named["select_list"], written["select_list"], strict=True)
        named["select_list"] = [
            now if keeps_name(now, was) else {**now, "alias": text_of(con, was)} for now, was in pairs
        ]
    return named


def keeps_name(now: Tree, before: Tree) -> bool:
    """Whether an item of a SELECT has the name that it had: one with a star is named by its columns."""
    own = replaced(before, lambda node: {} if node.get("class") == "SUBQUERY" else None)
    return now == before or bool(before["alias"]) or any(n.get("class") == "STAR" for n in nodes(own))


def macros(con: duckdb.DuckDBPyConnection) -> set[str]:
    """Names that a user's macro has, which hides a function. Those of `cortex` are the functions by other names."""
    query = "SELECT lower(function_name), database_name FROM duckdb_functions() WHERE function_type = 'macro'"
    found = con.execute(f"{query} AND NOT internal AND database_name <> 'snowflake'").fetchall()
    return {name for name, database in found if database != "temp" or name not in NAMED}


def keeps(before: Order, after: Order) -> bool:
    """Whether all that a site waited for without guards it waits for with them, and none comes to be evaluated, or
    to be evaluated earlier.

    DuckDB pushes conditions of HAVING, of aliases and of joined tables into the filter that is guarded, where a guard
    would turn their order round; and it sees contradictions that a guard hides.
    """
    if after.early - before.early:
        return False
    more = (set(after.rank) - set(before.rank)) | (set(after.unranked) - set(before.unranked))
    return not more and all(waits <= after.waits.get(site, set()) for site, waits in before.waits.items())


def shown(con: duckdb.DuckDBPyConnection, tagged: Tagged, guarding: Guarding) -> dict[int, list[str]]:
    """The guards as SQL."""
    return {site: [text_of(con, tagged.untagged(g)) for g in found] for site, found in guarding.guards.items()}


def text_of(con: duckdb.DuckDBPyConnection, tree: Tree) -> str:
    """An expression as DuckDB writes it."""
    select = {"node": {**EMPTY_SELECT, "select_list": [tree]}, "named_param_map": []}
    return to_text(con, select).removeprefix("SELECT ")


EMPTY_SELECT: Tree = {
    "type": "SELECT_NODE",
    "modifiers": [],
    "cte_map": {"map": []},
    "from_table": {"type": "EMPTY", "alias": "", "sample": None},
    "where_clause": None,
    "group_expressions": [],
    "group_sets": [],
    "aggregate_handling": "STANDARD_HANDLING",
    "having": None,
    "sample": None,
    "qualify": None,
}


def collect(con: duckdb.DuckDBPyConnection, planned: Planned, collector: Collector, parameters: Parameters) -> None:
    """Run in collect mode and ask what was noted, until there is nothing new that may be asked."""
    for _ in range(ROUNDS):
        round_ = run_round(con, planned, collector, parameters)
        batch = to_ask(round_, planned.order)
        if not batch.prompts:
            return
        ask(collector, batch)
        if not batch.held_back:
            return


def run_round(con: duckdb.DuckDBPyConnection, planned: Planned, collector: Collector, parameters: Parameters) -> Round:
    """Run in collect mode once.

    Raises:
        CompleteError: a call is at fault.
        duckdb.Error: the query is, or a placeholder made it fail.
    """
    round_ = collector.begin()
    relation = con.sql(planned.collecting, params=parameters or None)
    try:
        for rows in read_batches(relation, 10_000):  # only counted: some types take a library to become Python's
            round_.passed += rows.num_rows
    except OSError as error:  # pyarrow's, about a type that Arrow has not
        raise duckdb.NotImplementedException(str(error)) from error
    if collector.fault is not None:
        raise collector.fault
    return round_


def in_transaction(con: duckdb.DuckDBPyConnection) -> bool:
    """Whether the user has begun a transaction: its number stays, else every statement has its own."""
    first, second = (con.execute("SELECT txid_current()").fetchall() for _ in range(2))
    return first == second


def why_plainly(con: duckdb.DuckDBPyConnection, error: Exception) -> str:
    """The reason for `explain` where a round failed, after which `sql` runs the query plainly.

    Raises:
        duckdb.Error: the error itself, where no plain run can follow.
    """
    if ends(con, error):
        raise error
    return f"it fails before its answers are known: {str(error).splitlines()[0].rstrip('.')}"


__all__ = ["COLLECTING", "Asked", "Remembering", "run_query"]

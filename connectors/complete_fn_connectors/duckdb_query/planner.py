"""`sql(con, query)` plans the completions of a whole query: `run_query` is the main path. Read it first.

1. Number the calls, and read from DuckDB's plan which call waits for which.
2. Put guards, so that conditions without a call decide first.
3. Run the query in collect mode and ask the prompts that were noted, until no new prompt is asked.
4. Run the query itself, with every answer in memory. Calls that could not be planned are asked by this run.
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
    ask_batch,
    choose_prompts,
)
from complete_fn_connectors.duckdb_query.constants import (
    answer_constants,
    ask_constant,
    outside_views,
    refuse_hidden,
)
from complete_fn_connectors.duckdb_query.dependencies import Order, optimised_plan, read_order, read_plan
from complete_fn_connectors.duckdb_query.guards import Guarding
from complete_fn_connectors.duckdb_query.json_versions import Tree, read_batches
from complete_fn_connectors.duckdb_query.materialise import RUNS, forbids_another_run, is_query, run_at_last
from complete_fn_connectors.duckdb_query.may_fail import may_fail
from complete_fn_connectors.duckdb_query.pushdown import push_conditions_down
from complete_fn_connectors.duckdb_query.syntax_tree import (
    Parameters,
    RunsPlainly,
    Statement,
    nodes,
    put_values_in,
    read_statement,
    replace_nodes,
    to_text,
)
from complete_fn_connectors.duckdb_query.views import inline_views
from complete_fn_connectors.functions import QuerySession

ROUNDS = 40  # a query with a LIMIT that needs more of them runs plainly from there
COLLECTING: dict[str, Collector] = {}  # by the name of the run, which each numbered call has in its first argument


@dataclass
class Planned:
    """A query that is planned as a whole.

    Attributes:
        collecting: The SELECT with numbered calls and guards, for collect mode.
        final: The whole statement with guards, for the final run.
        guards: By site, the conditions before it as text.
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
            ask_in_rounds(con, planned, collector, parameters)
            final, selects = planned.final, statement.returns_rows
            guarded = final != statement.text
        except RunsPlainly:
            final, selects = query, is_query(con, query)
        except (duckdb.Error, CompleteError) as error:
            if forbids_another_run(con, error):
                raise
            final, selects = query, is_query(con, query)
    with remembering(functions, memory):
        try:
            return run_at_last(con, functions, final, selects, parameters)
        except duckdb.Error as error:
            if not guarded or forbids_another_run(con, error):
                raise
        # A guard failed for a row that a completion would have spared.
        return run_at_last(con, functions, query, selects, parameters)


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
    """Let the functions answer from memory first. Queries that run at the same time see each other's answers."""
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
    """Inline views, answer constant calls, push conditions down, number the calls, read their order, put guards.

    Args:
        learn: Brings the answer of a constant call into memory. Returns False if that would cost money.

    Raises:
        RunsPlainly: The query cannot be planned; the text says why.
        OpenConstants: DuckDB needs the answer of a constant call, and `learn` does not know it.
        duckdb.Error: The statement around the SELECT is wrong, such as an INSERT into a table that does not exist.
    """
    names = functions.planned_names
    called = {name: names[name] for name in names.keys() - macro_names(con)}
    tree, text = inline_views(con, statement.tree, statement.select, called)
    as_it_is = tag_calls(tree, text, called, run)
    refuse_hidden(con, as_it_is.tree, called)
    answer_constants(con, as_it_is, parameters, {*names.values()}, collector, learn)
    if tree is not statement.tree:
        read_plan(
            con, to_text(con, put_values_in(con, outside_views(statement, called, run), parameters)), optimise=False
        )
    fewer = push_conditions_down(con, tree, called)
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
    """Read the order of the calls and put guards. `changed`: whether conditions were pushed down in the tree."""
    constant = put_values_in(con, tagged.tree, parameters)
    written = read_plan(con, to_text(con, constant), optimise=False)
    if not statement.returns_rows:
        tried = statement.with_select(to_text(con, tagged.tree))
        with collector.checking():
            con.execute(f"EXPLAIN {tried}", parameters or []).fetchall()

    def final_text(tree: Tree) -> str:
        return statement.with_select(to_text(con, restore_column_names(con, tagged.untagged(tree), statement.tree)))

    plan = optimised_plan(con, constant)
    if in_transaction(con) and (failing := may_fail(written, plan)):
        raise RunsPlainly(f"inside a transaction, which {failing} would abort where it fails")
    order = read_order(plan)
    guarding = Guarding(order)
    guarded = guarding.apply(tagged.tree)
    if guarded != tagged.tree:
        after = read_order(optimised_plan(con, put_values_in(con, guarded, parameters)))
        if keeps_dependencies(order, after):
            return Planned(
                to_text(con, guarded), final_text(guarded), tagged.sites, after, guard_texts(con, tagged, guarding)
            )
    return Planned(
        to_text(con, tagged.tree), final_text(tagged.tree) if changed else statement.text, tagged.sites, order
    )


def restore_column_names(con: duckdb.DuckDBPyConnection, tree: Any, written: Any) -> Any:
    """The tree with the column names of the written query. DuckDB names a column by the text of its expression.

    A part that stands for something else, such as a subquery for a view, keeps its own names.
    """
    if tree == written or type(tree) is not type(written):
        return tree
    if isinstance(tree, list):
        return (
            [restore_column_names(con, *pair) for pair in zip(tree, written, strict=True)]
            if len(tree) == len(written)
            else tree
        )
    if not isinstance(tree, dict) or tree.get("type") != written.get("type"):
        return tree
    named = {k: restore_column_names(con, v, written.get(k)) for k, v in tree.items()}
    if tree.get("type") == "SELECT_NODE":
        pairs = zip(named["select_list"], written["select_list"], strict=True)
        named["select_list"] = [
            now if has_same_name(now, was) else {**now, "alias": expression_text(con, was)} for now, was in pairs
        ]
    return named


def has_same_name(now: Tree, before: Tree) -> bool:
    """Whether an item of a SELECT still has its name. An item with a star gets its names from the columns."""
    own = replace_nodes(before, lambda node: {} if node.get("class") == "SUBQUERY" else None)
    return now == before or bool(before["alias"]) or any(n.get("class") == "STAR" for n in nodes(own))


def macro_names(con: duckdb.DuckDBPyConnection) -> set[str]:
    """The names of the user's macros, which hide functions of the same name. Cortex's macros are ours."""
    query = "SELECT lower(function_name), database_name FROM duckdb_functions() WHERE function_type = 'macro'"
    found = con.execute(f"{query} AND NOT internal AND database_name <> 'snowflake'").fetchall()
    return {name for name, database in found if database != "temp" or name not in NAMED}


def keeps_dependencies(before: Order, after: Order) -> bool:
    """Whether each site still waits for all sites that it waited for without guards, and no site is evaluated earlier
    or anew.

    DuckDB pushes conditions of HAVING, of aliases and of joined tables into the guarded filter, where a guard could
    turn their order round. It also sees contradictions that a guard would hide.
    """
    if after.early - before.early:
        return False
    more = (set(after.rank) - set(before.rank)) | (set(after.unranked) - set(before.unranked))
    return not more and all(waits <= after.waits.get(site, set()) for site, waits in before.waits.items())


def guard_texts(con: duckdb.DuckDBPyConnection, tagged: Tagged, guarding: Guarding) -> dict[int, list[str]]:
    """The guards as SQL."""
    return {site: [expression_text(con, tagged.untagged(g)) for g in found] for site, found in guarding.guards.items()}


def expression_text(con: duckdb.DuckDBPyConnection, tree: Tree) -> str:
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


def ask_in_rounds(
    con: duckdb.DuckDBPyConnection, planned: Planned, collector: Collector, parameters: Parameters
) -> None:
    """Run in collect mode and ask the prompts that were noted, until there are no new ones."""
    for _ in range(ROUNDS):
        round_ = run_round(con, planned, collector, parameters)
        batch = choose_prompts(round_, planned.order)
        if not batch.prompts:
            return
        ask_batch(collector, batch)
        if not batch.held_back:
            return


def run_round(con: duckdb.DuckDBPyConnection, planned: Planned, collector: Collector, parameters: Parameters) -> Round:
    """Run in collect mode once.

    Raises:
        CompleteError: A call is wrong.
        duckdb.Error: The query is wrong, or a placeholder made it fail.
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
    """Whether the user has begun a transaction. Outside of one, each statement has a transaction number of its own."""
    first, second = (con.execute("SELECT txid_current()").fetchall() for _ in range(2))
    return first == second


def why_plainly(con: duckdb.DuckDBPyConnection, error: Exception) -> str:
    """The reason that `explain` shows for a query of which a round failed. `sql` then runs it plainly.

    Raises:
        duckdb.Error: The error forbids a plain run.
    """
    if forbids_another_run(con, error):
        raise error
    return f"it fails before its answers are known: {str(error).splitlines()[0].rstrip('.')}"


__all__ = ["COLLECTING", "Asked", "Remembering", "run_query"]

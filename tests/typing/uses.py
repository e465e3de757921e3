"""What a user's type checker sees; checked by test_typing.py, never run."""

from __future__ import annotations

from typing import assert_type

import duckdb
import polars as pl

from complete_fn import CompleteError, Completion, EchoEngine, Engine, Session, Usage
from complete_fn.execution.answers import Answers
from complete_fn_connectors.duckdb import register
from complete_fn_connectors.polars import complete


def uses(con: duckdb.DuckDBPyConnection) -> None:
    engine: Engine = EchoEngine()
    registered = register(con, engine=engine, max_cost=1)
    assert_type(registered.summary(), str)
    assert_type(complete("demo-llama", pl.col("x"), temperature=0.5), pl.Expr)
    answers = Session(engine=engine).complete("demo-llama", ["x"])
    assert_type(answers, Answers)
    assert_type(answers.completions[0], Completion)
    assert_type(answers.completions[0].usage, Usage)
    fault: type[Exception] = CompleteError
    raise fault

"""Polars: several columns of answers as one plan.

Polars evaluates each expression for itself, so two `complete()` of one frame are two plans that reach the engine at the
same time. `complete_columns` is one expression over all their prompts instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from complete_fn.errors import InputError
from complete_fn.prompts.options import parse_options
from complete_fn.session import Session
from complete_fn_connectors.arrow import prompt_column
from complete_fn_connectors.concurrent_runs import WantedRun, complete_together


@dataclass(frozen=True)
class Ask:
    """One column of answers: `complete(model, prompt, **options)` as part of `complete_columns`."""

    model: str
    prompt: pl.Expr
    options: Mapping[str, Any]

    def check(self, session: Session) -> None:
        session.model(self.model)
        parse_options(self.options)

    @property
    def key(self) -> tuple[str, str]:
        return self.model, json.dumps(self.options, sort_keys=True, default=str)


def answer_together(session: Session, asks: Mapping[str, Ask], prompts: pl.DataFrame) -> pl.DataFrame:
    """[n] rows with a String column for each name.

    Columns of equal model and options are one run. The runs of one model go through its engine together.

    Args:
        prompts: [n] rows, a column of prompts for each name of `asks`.
    """
    together: dict[tuple[str, str], list[str]] = {}
    for name, ask in asks.items():
        together.setdefault(ask.key, []).append(name)
    wanted = [as_one_run([prompts[name] for name in names], asks[names[0]]) for names in together.values()]
    found: dict[str, pl.Series] = {}
    for names, answers in zip(together.values(), complete_together(session, wanted), strict=True):
        for number, name in enumerate(names):
            part = answers.text.slice(number * len(prompts), len(prompts))
            found[name] = series_of(name, part, pl.String())
    return pl.DataFrame([found[name] for name in asks])


def as_one_run(prompts: list[pl.Series], ask: Ask) -> WantedRun:
    """The prompts of several columns as one run."""
    apart = ask.options.get("reorder_fields") is True
    columns = [prompt_column(arrow_of(column), reorder_fields=apart) for column in prompts]
    whole = pa.chunked_array([c for column in columns for c in chunks(column)], pa.large_string())
    return WantedRun(ask.model, whole, ask.options)


def arrow_of(column: pl.Series) -> Any:
    """Raises InputError: Arrow has no such type (128-bit integers)."""
    try:
        return column.to_arrow()
    except pa.ArrowInvalid as error:
        raise InputError(f"Arrow has no {column.dtype}. Cast it: pl.col('x').cast(pl.String).") from error


def chunks(column: Any) -> list[Any]:
    return list(column.chunks) if isinstance(column, pa.ChunkedArray) else [column]


def series_of(name: str, values: Any, dtype: pl.DataType) -> pl.Series:
    """An Arrow column as a Series."""
    whole = values if isinstance(values, pa.Array) else values.combine_chunks()
    return pl.Series(name, maps_as_lists(whole), dtype)


def maps_as_lists(values: Any) -> Any:
    """Maps become lists of structs, also inside structs: old versions of Polars cannot read maps."""
    kind = values.type
    if pa.types.is_map(kind):
        entries = pa.StructArray.from_arrays([values.keys, values.items], ["key", "value"])
        starts = pc.if_else(values.is_null(), None, values.offsets[:-1])
        return pa.ListArray.from_arrays(pa.concat_arrays([starts, values.offsets[-1:]]), entries)
    if pa.types.is_struct(kind):
        fields = [maps_as_lists(field) for field in values.flatten()]
        return pa.StructArray.from_arrays(fields, list(kind.names), mask=values.is_null())
    return values

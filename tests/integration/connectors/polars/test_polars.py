"""Polars: eager, lazy, streaming and async; types in the schema; NULLs, templates, bad input."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from complete_fn import Completion, CompletionRequest, CompletionWarning, EchoEngine
from complete_fn.errors import InputError, InvalidOptionError, RowFailedError, UnknownModelError
from complete_fn_connectors.polars import expressions as llm


class Blocking(EchoEngine):
    """An EchoEngine whose content filter refuses what contains `bad`."""

    def complete(self, request: CompletionRequest) -> Completion:
        if "bad" in str(request.prompt):
            return Completion.failed("blocked", "The content filter refused the row.")
        return super().complete(request)


@pytest.fixture
def engine() -> Blocking:
    return Blocking()


@pytest.fixture(autouse=True)
def session(engine: Blocking, tmp_path: Path) -> Iterator[llm.QuerySession]:
    opened = llm.configure(engine=engine, home=tmp_path)
    yield opened
    opened.close()
    llm.DEFAULT.clear()


TEXTS = ["a b", "c", None, "a b", "", "d e f"]
DF = pl.DataFrame({"text": TEXTS, "n": range(6)})


def asked(engine: Blocking) -> list[Any]:
    return sorted(str(r.prompt) for r in engine.requests)


async def collected(frame: pl.LazyFrame) -> pl.DataFrame:
    return await frame.collect_async()


WAYS: dict[str, Any] = {
    "eager": lambda *e: DF.select(*e),
    "lazy": lambda *e: DF.lazy().select(*e).collect(),
    "streaming": lambda *e: DF.lazy().select(*e).collect(engine="streaming"),
    "async": lambda *e: asyncio.run(collected(DF.lazy().select(*e))),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_column_is_answered_in_row_order_by_every_engine(way: str, engine: Blocking) -> None:
    found = WAYS[way](pl.col("n"), llm.complete("m", "text").alias("answer"))
    assert found["n"].to_list() == list(range(6))
    assert found["answer"].to_list() == TEXTS
    assert asked(engine) == ["", "a b", "c", "d e f"]  # each distinct prompt once, NULL never


@pytest.mark.parametrize("way", WAYS)
def test_the_schema_is_known_before_and_true_after(way: str) -> None:
    expressions = {
        "answer": pl.col("text").llm.complete("m", max_tokens=1),  # type: ignore[attr-defined]
        "perhaps": pl.col("text").llm.try_complete("m"),  # type: ignore[attr-defined]
        "details": pl.col("text").llm.complete_details("m"),  # type: ignore[attr-defined]
        "tokens": pl.col("text").llm.count_tokens("m"),  # type: ignore[attr-defined]
    }
    named = [e.alias(name) for name, e in expressions.items()]
    expected = {"answer": pl.String, "perhaps": pl.String, "details": llm.DETAILS, "tokens": pl.Int64}
    assert dict(DF.lazy().select(named).collect_schema()) == expected
    found = WAYS[way](*named)
    assert dict(found.schema) == expected
    assert found["answer"].to_list() == ["a", "c", None, "a", "", "d"]
    assert found["tokens"].to_list() == [2, 1, None, 2, 0, 3]


def test_details_have_every_field_and_null_for_null() -> None:
    prompts = pl.Series("p", ["Name the section: a b", None, "Name the section: a b"])
    rows = prompts.to_frame().select(llm.complete_details("demo-llama", "p")).to_series().to_list()
    assert rows[0] == {
        "value": "Name the section: a b",
        "error": None,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 5},
        "cost": Decimal("0.000000300"),
        "source": "computed",
        "scores": None,
        "field_order": None,
    }
    assert rows[1] is None
    assert (rows[2]["source"], rows[2]["cost"]) == ("duplicate", 0)


def test_an_empty_frame_asks_nothing(engine: Blocking) -> None:
    found = DF.head(0).select(llm.complete_details("m", "text"), answer=llm.complete("m", "text"))
    assert found.is_empty()
    assert found.schema["answer"] == pl.String
    assert engine.requests == []


def test_a_template_takes_columns_expressions_and_braces() -> None:
    shown = llm.prompt("{n}: {text} {{{up}}}", up=pl.col("text").str.to_uppercase())
    assert DF.head(3).select(llm.complete("m", shown)).to_series().to_list() == ["0: a b {A B}", "1: c {C}", None]
    assert DF.head(1).select(llm.complete("m", llm.prompt("no field"))).item() == "no field"


def test_messages_are_a_list_of_structs(engine: Blocking) -> None:
    system = pl.struct(role=pl.lit("system"), content=pl.lit("brief"))
    user = pl.struct(role=pl.lit("user"), content=pl.col("text"))
    assert DF.select(llm.complete("m", pl.concat_list(system, user))).to_series().to_list()[:3] == [
        "brief a b",
        "brief c",
        None,
    ]
    assert all(isinstance(r.prompt, tuple) for r in engine.requests)


@pytest.mark.parametrize("dtype", [pl.Categorical, pl.Enum(["a b", "c", "", "d e f"])])
def test_encoded_text_is_text(dtype: Any) -> None:
    assert DF.select(llm.complete("m", pl.col("text").cast(dtype))).to_series().to_list() == TEXTS


def test_filters_groups_windows_and_joins(engine: Blocking) -> None:
    answer = llm.complete("m", "text")
    assert DF.filter(answer == "a b")["n"].to_list() == [0, 3]
    grouped = DF.group_by("text", maintain_order=True).agg(answer.alias("answers"))
    assert grouped["answers"].to_list()[0] == ["a b", "a b"]
    assert DF.select(answer.first().over("text")).height == 6
    assert DF.lazy().with_columns(answer.alias("k")).join(DF.lazy(), left_on="k", right_on="text").collect().height == 7
    assert DF.select(pl.when(pl.col("n") > 0).then(answer).otherwise(pl.lit("-"))).to_series()[0] == "-"
    assert len(engine.requests) == 4


def test_chunks_of_the_streaming_engine_share_what_is_known(engine: Blocking) -> None:
    frame = pl.LazyFrame({"p": [f"p {i % 100}" for i in range(50_000)]})
    found = frame.select(llm.complete("m", "p")).collect(engine="streaming")
    assert found.to_series().to_list() == [f"p {i % 100}" for i in range(50_000)]
    assert len(engine.requests) == 100


def test_row_errors_are_null_with_one_counted_warning() -> None:
    frame = pl.DataFrame({"p": ["good", *[f"bad {i}" for i in range(30)]]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = frame.select(llm.complete("m", "p")).to_series().to_list()
    assert answers == ["good"] + [None] * 30
    mine = [w for w in caught if w.category is CompletionWarning]  # others' garbage may be collected meanwhile
    assert [str(w.message)[:44] for w in mine] == ["Rows without an answer so far: 30 (30 blocke"]
    with pytest.warns(CompletionWarning):
        details = frame.select(llm.complete_details("m", "p")).to_series()
    assert details.struct.field("error").struct.field("code").value_counts().height == 2


def test_strict_raises_for_a_failed_row() -> None:
    with pytest.raises(RowFailedError, match=r"1 of 1 rows have no answer \(1 blocked\)"):
        pl.DataFrame({"p": ["bad"]}).select(llm.complete("m", "p", strict=True))


def test_query_faults_are_told_when_the_expression_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=r"Unknown option 'temprature'\. Did you mean 'temperature'"):
        llm.complete("m", "text", temprature=1)
    with pytest.raises(InvalidOptionError, match="not a valid JSON schema"):
        llm.complete("m", "text", response_format={"type": "no_such_type"})
    with pytest.raises(InvalidOptionError, match=r"only {name} is replaced"):
        llm.prompt("{a.b}")
    with pytest.raises(InvalidOptionError, match=r"does not name \{txt\}, which is given"):
        llm.prompt("{text}", txt="n")
    with pytest.raises(InputError, match="The predicate is of type Expr; it must be one text for all rows"):
        llm.complete_filter("m", pl.col("text"), "text")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="The language is of type NoneType"):
        llm.complete_translate("m", "text", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="The model is of type Expr"):
        llm.complete(pl.col("text"), "text")  # type: ignore[arg-type]
    llm.configure(home=tmp_path)
    with pytest.raises(UnknownModelError, match="Did you mean 'demo-llama'"):
        llm.complete("demo-lama", "text")


def test_try_complete_turns_query_faults_into_null() -> None:
    with pytest.warns(CompletionWarning, match="Unknown option 'temprature'"):
        assert DF.select(llm.try_complete("m", "text", temprature=1)).to_series().null_count() == 6


@pytest.mark.parametrize(("column", "kind"), [(pl.col("n"), "int64"), (pl.col("text").cast(pl.Binary), "binary")])
def test_a_column_that_is_no_text_is_refused(column: pl.Expr, kind: str, engine: Blocking) -> None:
    with pytest.raises(InputError, match=rf"The prompt is (large_)?{kind}.*cast\(pl.String\)"):
        DF.select(llm.complete("m", column))
    assert engine.requests == []


@pytest.mark.parametrize("column", [pl.col("n").cast(pl.Int128), llm.prompt("{n}", n=pl.col("n").cast(pl.Int128))])
def test_a_type_that_arrow_lacks_is_refused(column: pl.Expr, engine: Blocking) -> None:
    with pytest.raises(InputError, match=r"Arrow has no .*Int128.* Cast it"):
        DF.select(llm.complete("m", column))
    assert engine.requests == []


def test_no_such_column_is_polars_own_error() -> None:
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="nope"):
        DF.select(llm.complete("m", "nope"))
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="nope"):
        DF.lazy().select(llm.complete("m", llm.prompt("{nope}"))).collect()


@pytest.mark.parametrize("text", ["", "😀 𝄞 四", "a\x00b", "x" * 1_000_000])
def test_any_text_comes_through_as_it_is(text: str, engine: Blocking) -> None:
    pl.DataFrame({"p": [text]}).select(llm.complete("m", "p"))
    assert [r.prompt for r in engine.requests] == [text]


def test_polars_refuses_a_lone_surrogate_itself() -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        pl.DataFrame({"p": ["\ud800"]})


def test_a_session_of_its_own_has_its_own_cap_and_summary(tmp_path: Path, engine: Blocking) -> None:
    capped = llm.QuerySession(engine=EchoEngine(), home=tmp_path / "other", max_cost=0)
    with pytest.warns(CompletionWarning, match="budget_exceeded"):
        found = DF.select(pl.col("text").llm.complete("demo-llama", session=capped))  # type: ignore[attr-defined]
    assert found.to_series().null_count() == 6
    assert engine.requests == []
    assert "4 distinct" in capped.take_summary()
    assert llm.summary().startswith("0 rows")
    capped.close()


@pytest.mark.parametrize("how", ["in-memory", "streaming"])
def test_several_columns_are_one_plan(engine: Blocking, how: Any) -> None:
    submissions: list[int] = []
    stream = engine.stream

    def counted(requests: Any, tenant: str) -> Any:
        found = list(stream(requests, tenant))
        submissions.append(len(found))
        return iter(found)

    engine.stream = counted  # type: ignore[method-assign]
    columns = llm.complete_columns(
        first=llm.ask("m", "text"),
        second=llm.ask("m", pl.col("text") + "!"),
        third=llm.ask("m", llm.prompt("{text}!")),
        short=llm.ask("m", "text", max_tokens=1),
    )
    found = DF.lazy().select("n", columns.struct.unnest()).collect(engine=how)
    assert found.columns == ["n", "first", "second", "third", "short"]
    found = found.sort("n")
    assert found["first"].to_list() == TEXTS
    assert found["second"].to_list() == found["third"].to_list() == [None if t is None else t + "!" for t in TEXTS]
    assert found["short"].to_list() == ["a", "c", None, "a", "", "d"]
    if how == "in-memory":
        # The distinct prompts of three columns, and those with the option. Old versions of Polars evaluate the column
        # once more, when all answers are known.
        assert sorted(filter(None, submissions)) == [4, 8]
    with pytest.raises(InputError, match="asks for no column"):
        llm.complete_columns()
    with pytest.raises(InvalidOptionError, match="nope"):
        llm.complete_columns(a=llm.ask("m", "text", nope=1))
    with pytest.raises(UnknownModelError, match="not in the catalogue"):
        llm.complete_columns(a=llm.ask("nope", "text"), session=llm.QuerySession())

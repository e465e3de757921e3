"""The semantic functions in DuckDB and Polars over an EchoEngine, and `choices` on `complete` and in the shell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from complete_fn import Completion, CompletionRequest
from complete_fn.cli.main import main
from complete_fn.errors import InputError, InvalidOptionError
from complete_fn_connectors.duckdb import register, sql
from complete_fn_connectors.polars import expressions as llm
from complete_fn_connectors.sql_functions import FUNCTIONS
from complete_fn_connectors.tasks import templates
from tests.engines import Extracting


@pytest.fixture
def engine() -> Extracting:
    return Extracting()


@pytest.fixture
def con(engine: Extracting, tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        opened.execute(
            "CREATE TABLE docs AS FROM (VALUES (1, 'a bug here'), (2, 'one question'), (3, NULL), (4, 'a bug here'))"
            " v(id, text)"
        )
        register(opened, engine=engine, home=tmp_path)
        yield opened


def column(con: duckdb.DuckDBPyConnection, expression: str) -> list[Any]:
    return [row[0] for row in con.execute(f"SELECT {expression} FROM docs ORDER BY id").fetchall()]


def test_classify_answers_with_a_label(con: duckdb.DuckDBPyConnection, engine: Extracting) -> None:
    assert column(con, "complete_classify('m', text, ['question', 'bug'])") == ["bug", "question", None, "bug"]
    assert len(engine.requests) == 2  # equal texts are one prompt, NULL none
    prompt = str(engine.requests[0].prompt)
    assert prompt.startswith("Classify the text into exactly one of these categories: question, bug.\n")
    assert prompt.endswith("\n\nCategory:")


def test_labels_may_vary_by_row(con: duckdb.DuckDBPyConnection) -> None:
    labels = "CASE id WHEN 1 THEN ['bug', 'x'] WHEN 2 THEN ['y', 'question'] WHEN 4 THEN NULL ELSE ['a', 'b'] END"
    assert column(con, f"complete_classify('m', text, {labels})") == ["bug", "question", None, None]


def test_details_have_the_scores_of_every_label(con: duckdb.DuckDBPyConnection) -> None:
    first = column(con, "complete_classify_details('m', text, ['question', 'bug'])")[0]
    assert first["scores"] == {"question": pytest.approx(1 / 3), "bug": pytest.approx(2 / 3)}
    assert (first["value"], first["usage"]["completion_tokens"]) == ("bug", 1)
    again = column(con, "complete_classify_details('m', text, ['question', 'bug'])")[0]
    assert (again["source"], again["scores"]) == ("cache", first["scores"])
    chosen = column(con, "complete_classify_details('m', text, ['question', 'bug'])['scores']['bug'] > 0.5")
    assert chosen == [True, False, None, True]
    assert column(con, "complete_details('m', text)['scores']") == [None] * 4


def test_the_order_of_the_labels_is_part_of_the_question(con: duckdb.DuckDBPyConnection, engine: Extracting) -> None:
    template = "{'template': 'Kind: {text}'}"
    column(con, f"complete_classify('m', text, ['question', 'bug'], {template})")
    column(con, f"complete_classify('m', text, ['bug', 'question'], {template})")
    assert [str(r.prompt) for r in engine.requests].count("Kind: a bug here") == 2


def test_filter_is_a_boolean_and_duckdbs_own_filter_still_works(con: duckdb.DuckDBPyConnection) -> None:
    options = "{'template': '{predicate}? {text}'}"
    assert column(con, f"complete_filter('m', 'yes', text, {options})") == [True, True, None, True]
    assert column(con, f"complete_filter('m', 'no', text, {options})") == [False, False, None, False]
    query = f"SELECT id FROM docs WHERE complete_filter('m', 'yes', text, {options}) ORDER BY id"
    assert con.execute(query).fetchall() == [(1,), (2,), (4,)]
    assert con.execute("SELECT filter([1, 2, 3], lambda x: x > 1), count(*) FILTER (id > 1) FROM docs").fetchall() == [
        ([2, 3], 3)
    ]


def test_the_predicate_may_be_a_column(con: duckdb.DuckDBPyConnection) -> None:
    said = "CASE WHEN id = 1 THEN 'yes' ELSE 'no' END"
    expression = f"complete_filter('m', {said}, text, {{'template': '{{predicate}}? {{text}}'}})"
    assert column(con, expression) == [True, False, None, False]


def test_sentiment_summary_translation_and_extraction(con: duckdb.DuckDBPyConnection, engine: Extracting) -> None:
    assert column(con, "complete_sentiment('m', 'negative ' || text)")[:2] == ["negative", "negative"]
    assert column(con, "complete_summarize('m', text)")[0].startswith("Summarize the text")
    assert "from its own language to French." in column(con, "complete_translate('m', text, 'French')")[0]
    found = column(con, "complete_extract('m', text, {'who': 'Who wrote it?', 'kind': 'What kind?'})")
    assert (json.loads(found[0]), found[2]) == ({"who": "x", "kind": "x"}, None)
    assert "who: Who wrote it?\nkind: What kind?\n" in str(engine.requests[-1].prompt)
    assert json.loads(column(con, "complete_extract('m', text, ['year'])")[0]) == {"year": "x"}


def test_options_pass_through_and_templates_are_versions_or_ones_own(
    con: duckdb.DuckDBPyConnection, engine: Extracting
) -> None:
    assert column(con, "complete_summarize('m', text, {'max_tokens': 2})")[0] == "Summarize the"
    assert column(con, "complete_summarize('m', text, {'template': 'In short: {text}'})")[0] == "In short: a bug here"
    pinned, newest = column(con, "complete_summarize('m', text, {'template': 'v1'})")[0], templates("summarize")
    assert pinned == " ".join(newest["v1"].replace("{text}", "a bug here").split())


BAD = [
    ("complete_classify('m', text, ['a'])", "choices has 1 label; 2 to 128 are taken"),
    ("complete_classify('m', text, [])", "choices has 0 labels; 2 to 128"),
    ("complete_classify('m', text, [x FOR x IN range(129)]::VARCHAR[])", "choices has 129 labels; 2 to 128"),
    ("complete_classify('m', text, ['a', 'b', 'a'])", "choices has 'a' twice. Name each label once"),
    ("complete_classify('m', text, ['a', ''])", "choices has '': a label is not blank"),
    ("complete_classify('m', text, ['a', ' b'])", "choices has ' b': a label is not blank and has no white space"),
    ("complete_classify('m', text, ['a', repeat('b', 257)])", "choices has a label of 257 characters"),
    ("complete_classify('m', text, ['a', NULL])", "is not a list of texts"),
    ("complete_classify('m', text, [1, 2])", "labels is list<.*>. Write them as a list: "),
    ("complete_classify('m', text)", "2 arguments were given; write complete_classify"),
    ("complete_classify('m', id, ['a', 'b'])", "text is int32. Cast it"),
    ("complete_classify('m', text, ['a', 'b'], {'choices': ['c', 'd']})", "sets choices itself"),
    ("complete_classify('m', text, ['a', 'b'], {'temperature': 1})", "temperature = 1 means nothing beside choices"),
    ("complete_classify('m', text, ['a', 'b'], {'max_tokens': 1})", "max_tokens = 1 means nothing beside choices"),
    ("complete_classify('m', text, ['a', 'b'], {'template': 'v9'})", "template = 'v9' is no version of 'classify'"),
    ("complete_classify('m', text, ['a', 'b'], {'template': 'no field'})", "must name {text}, and may name {labels}"),
    ("complete_summarize('m', text, {'template': '{text} {id}'})", "must name {text}, and may name nothing else"),
    ("complete_extract('m', text, [])", "fields is .*. Write names"),
    ("complete_extract('m', text, 'year')", "fields is 'year'. Write names"),
    ("complete('m', text, {'choices': 'a,b'})", "choices = 'a,b' is not a list of texts"),
    ("complete('m', text, {'choices': ['a', 'b'], 'stop': ['.']})", "stop = .* means nothing beside choices"),
]


@pytest.mark.parametrize(("expression", "message"), BAD)
def test_bad_arguments_are_refused_before_anything_is_paid(
    con: duckdb.DuckDBPyConnection, engine: Extracting, expression: str, message: str
) -> None:
    with pytest.raises(duckdb.Error, match=message):
        column(con, expression)
    assert engine.requests == []


def test_choices_on_complete(con: duckdb.DuckDBPyConnection) -> None:
    assert column(con, "complete('m', text, {'choices': ['bug', 'question']})") == ["bug", "question", None, "bug"]
    assert column(con, "try_complete('m', text, {'choices': ['bug']})") == [None] * 4


def test_an_answer_that_is_no_label_is_a_row_error(tmp_path: Path) -> None:
    from complete_fn.engines.structured_output import checked

    request = CompletionRequest("m", "p", choices=("red", "green"))
    assert checked(Completion(" red\n"), request).text == "red"
    assert checked(Completion('{"choice": "green"}'), request).text == "green"
    for text in ("blue", '{"choice": "blue"}', "[]", ""):
        error = checked(Completion(text), request).error
        assert error is not None
        assert (error.code, "none of the choices (red, green)" in error.message) == ("schema_mismatch", True)


def test_polars_has_the_same_functions(tmp_path: Path, engine: Extracting) -> None:
    session = llm.configure(engine=engine, home=tmp_path)
    frame = pl.DataFrame({"text": ["a bug here", "one question", None]})
    predicate = {"template": "{predicate}? {text}"}
    found = frame.lazy().select(
        label=llm.complete_classify("m", "text", ["question", "bug"]),
        scores=llm.complete_classify_details("m", "text", ["question", "bug"]).struct.field("scores"),
        yes=llm.complete_filter("m", "yes", "text", session=session, template=predicate["template"]),
        mood=llm.complete_sentiment("m", pl.lit("mixed ") + pl.col("text")),
        short=llm.complete_summarize("m", "text", template="In short: {text}"),
        french=llm.complete_translate("m", "text", "French", template="{target}: {text}"),
        years=llm.complete_extract("m", "text", ["year"]),
        dotted=pl.col("text").llm.classify("m", ["question", "bug"]),  # type: ignore[attr-defined]
    )
    rows = found.collect().to_dicts()
    assert rows[0].pop("scores") == [
        {"key": "question", "value": pytest.approx(1 / 3)},
        {"key": "bug", "value": pytest.approx(2 / 3)},
    ]
    assert rows[0] == {
        "label": "bug",
        "yes": True,
        "mood": "mixed",
        "short": "In short: a bug here",
        "french": "French: a bug here",
        "years": '{"year": "x"}',
        "dotted": "bug",
    }
    assert set(rows[2].values()) == {None}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: llm.complete_classify("m", "text", ["a"]), "choices has 1 label"),
        (lambda: llm.complete_classify("m", "text", ["a", "b"], template="v9"), "no version of 'classify'"),
        (lambda: llm.complete_summarize("m", "text", temprature=1), "Did you mean 'temperature'"),
        (lambda: llm.complete_extract("m", "text", []), "Write names"),
        (lambda: llm.complete_extract("m", "text", "year"), "fields is 'year'. Write names"),
        (lambda: llm.complete_extract("m", "text", ["year"], response_format={}), "sets response_format itself"),
        (lambda: llm.complete_sentiment("m", "text", max_tokens=3), "max_tokens = 3 means nothing beside choices"),
        (lambda: llm.complete_classify("m", "text", ["a", "b"], choices=["c", "d"]), "sets choices itself"),
        (lambda: llm.complete_filter("m", "x", "text", reorder_fields=True), "sets reorder_fields itself"),
    ],
)
def test_polars_refuses_at_once(make: Any, message: str) -> None:
    with pytest.raises((InvalidOptionError, InputError), match=message):
        make()


def test_every_task_has_a_template_and_a_form(con: duckdb.DuckDBPyConnection) -> None:
    for name in (n for n, function in FUNCTIONS.items() if function.target.startswith(templates.__module__)):
        assert templates(name.split("_")[1])["v1"].strip()
        with pytest.raises(duckdb.Error, match=r"1 arguments were given; write complete_"):
            column(con, f"{name}('m')")


def test_the_shell_takes_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    asked = ["run", "-m", "demo-llama", "-p", "{text}", str(tmp_path / "in.jsonl"), "--home", str(tmp_path)]
    assert main([*asked, "--dry-run", "--choices", "red, green,blue"]) == 0
    assert "at most 2 (2 each)" in capsys.readouterr().out
    assert main([*asked, "--dry-run", "--choices", "red"]) == 1
    assert "choices has 1 label; 2 to 128 are taken" in capsys.readouterr().err


def test_a_whole_query_is_planned_around_them(con: duckdb.DuckDBPyConnection, engine: Extracting) -> None:
    """`sql` collects their prompts as it does those of `complete`: only rows that pass the filter are classified."""
    planned = sql(
        con,
        "SELECT id, complete_classify('m', text, ['question', 'bug'], {'template': 'Kind: {text}'}) AS kind FROM docs "
        "WHERE complete_filter('m', 'bug', text, {'template': 'yes yes {text} {predicate}'}) AND id < 3 ORDER BY id",
    )
    assert planned.fetchall() == [(1, "bug"), (2, "question")]
    assert len(engine.requests) == 4

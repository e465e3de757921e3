"""Each kind of thing that can be added is added here, from one file and by one call on its table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from complete_fn import EchoEngine, planning
from complete_fn.cli.main import main
from complete_fn.engines.catalogue import Model
from complete_fn.errors import InputError, InvalidOptionError
from complete_fn.planning import BatchPlan, make_plan
from complete_fn.registry import DIALECTS, ENGINES, VERBS, Table, Verb, resolve
from complete_fn.rows.formats import FORMATS, Format, TableRows, place_of
from complete_fn.rows.readers import FileSource
from complete_fn.rows.writers import Writer, writing
from complete_fn.session import Session
from complete_fn.settings import Settings
from complete_fn.store.backends import BACKENDS
from complete_fn.store.sqlite_backend import SqliteBackend
from complete_fn.store.store import Store
from complete_fn_connectors import polars as polars_connector
from complete_fn_connectors.duckdb import explain, register, sql
from complete_fn_connectors.duckdb.register import sql_type
from complete_fn_connectors.functions import complete
from complete_fn_connectors.polars.expressions import DEFAULT, dtype_of
from complete_fn_connectors.sql_functions import FUNCTIONS, SqlFunction

HERE = __name__


@contextlib.contextmanager
def added(table: Table[Any], name: str, entry: Any) -> Iterator[None]:
    table.add(name, entry)
    try:
        yield
    finally:
        table.remove(name)


def read_psv(file: Any, source: FileSource) -> Iterator[TableRows]:
    names, *rows = [line.split("|") for line in file.read().decode().splitlines()]
    yield TableRows(pa.table({name: [row[n] for row in rows] for n, name in enumerate(names)}))


class PsvWriter(Writer):
    def put(self, rows: Any, new: Any) -> None:
        table = self.joined(rows, new)
        lines = ["|".join(table.column_names), *("|".join(map(str, row.values())) for row in table.to_pylist())]
        self.sink.write("".join(f"{line}\n" for line in lines).encode())


def test_a_file_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Format((".psv",), "text/psv", f"{HERE}:read_psv", f"{HERE}:PsvWriter", is_text=True)
    (tmp_path / "in.psv").write_text("id|text\n1|one\n2|two\n")
    models = tmp_path / "models.toml"
    models.write_text("[models.mirror]\nengine = 'echo'\ncheckpoint = 'x'\n")
    monkeypatch.setenv("COMPLETE_FN_MODELS", str(models))
    with added(FORMATS, "psv", entry):
        options = ["--model", "mirror", "--prompt", "{text}", "--home", str(tmp_path / "home")]
        assert main(["run", *options, str(tmp_path / "in.psv"), "-o", str(tmp_path / "out.psv")]) == 0
    assert (tmp_path / "out.psv").read_text() == "id|text|completion\n1|one|one\n2|two|two\n"
    with pytest.raises(Exception, match="format"):
        place_of("in.psv")


def greet(argv: list[str]) -> int:
    print("hello", *argv)
    return 0


def test_a_verb_of_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with added(VERBS, "greet", Verb(f"{HERE}:greet", "say hello")):
        assert main(["greet", "world"]) == 0
        assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("hello world\n")
    assert "  greet         say hello" in shown


def loud_engine(model: Model, settings: Settings) -> EchoEngine:
    return EchoEngine()


def test_an_engine(tmp_path: Path) -> None:
    models = tmp_path / "models.toml"
    models.write_text("[models.loud]\nengine = 'loud'\ncheckpoint = 'x'\n")
    session = Session(home=tmp_path, models_file=models)
    with added(ENGINES, "loud", f"{HERE}:loud_engine"), contextlib.closing(session):
        assert session.complete("loud", pa.array(["a"])).text.to_pylist() == ["a"]


def local_store(url: Any) -> SqliteBackend:
    return SqliteBackend(Path(url.database))


def test_a_store_backend(tmp_path: Path) -> None:
    with added(BACKENDS, "duck", f"{HERE}:local_store"):
        store = Store(f"duck:///{tmp_path / 'state.sqlite3'}")
        store.close()
    assert (tmp_path / "state.sqlite3").exists()


def backwards(plan: BatchPlan) -> BatchPlan:
    return replace(plan, order=plan.order[::-1])


def test_a_planning_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    column = pa.array(["a", "b", "c"])
    before = make_plan(column).order.tolist()
    monkeypatch.setattr(planning, "PASSES", (planning.PASSES[0], backwards))
    assert make_plan(column).order.tolist() == before[::-1]


def test_a_warehouse_dialect() -> None:
    with added(DIALECTS, "mine", "complete_fn_connectors.warehouses.snowflake:Snowflake"):
        assert type(resolve(DIALECTS["mine"])()).__name__ == "Snowflake"


def complete_shout(session: Session, *columns: Any) -> Any:
    """The answer in capitals."""
    return pc.utf8_upper(complete(session, *columns))


def test_a_sql_function(tmp_path: Path) -> None:
    entry = SqlFunction(f"{HERE}:complete_shout", "complete_shout(model, text [, options])", pa.large_string())
    engine = EchoEngine()
    query = "SELECT complete_shout('m', 'row ' || i) AS a FROM range(6000) r(i) WHERE i % 2000 = 7"
    with added(FUNCTIONS, "complete_shout", entry):
        with duckdb.connect() as con, register(con, engine=engine, home=tmp_path):
            assert explain(con, query).plainly is None
            assert sorted(sql(con, query).fetchall()) == [("ROW 2007",), ("ROW 4007",), ("ROW 7",)]
        polars_connector.configure(engine=engine, home=tmp_path)
        frame = pl.DataFrame({"text": ["one", None]})
        for shouted in (polars_connector.complete_shout("m", "text"), pl.col("text").llm.shout("m", max_tokens=3)):
            assert frame.select(shouted).to_series().to_list() == ["ONE", None]
        with pytest.raises(InputError, match=r"1 arguments were given; write complete_shout\(model, text"):
            polars_connector.complete_shout("m")
        with pytest.raises(InvalidOptionError, match="max_tokens"):
            polars_connector.complete_shout("m", "text", max_tokens="many")
    DEFAULT.clear()
    with pytest.raises(AttributeError, match="complete_shout"):
        polars_connector.complete_shout  # noqa: B018
    with pytest.raises(AttributeError, match="shout"):
        pl.col("text").llm.shout  # type: ignore[attr-defined]  # noqa: B018


def test_every_function_of_the_table_resolves_and_has_a_type_everywhere() -> None:
    for name, entry in FUNCTIONS.items():
        assert callable(entry.function), name
        assert sql_type(entry.result), name
        assert dtype_of(entry.result) is not None, name
        assert entry.form.lower().startswith((name, name.removeprefix("try_"), "snowflake.cortex.", "ai_")), name
        assert entry.arguments, name


def test_a_name_is_added_once() -> None:
    with pytest.raises(ValueError, match="There is a verb 'run' already"):
        VERBS.add("run", VERBS["run"])


def test_writing_is_by_the_table(tmp_path: Path) -> None:
    assert {place_of(f"x{suffix}").format for entry in FORMATS.values() for suffix in entry.suffixes} == set(FORMATS)
    for name, entry in FORMATS.items():
        path = tmp_path / f"out{entry.suffixes[0]}"
        with writing(place_of(str(path)), False) as writer:
            writer.write(TableRows(pa.table({"a": [1]})), {"b": pa.array(["x"])})
        rows = list(FileSource(str(path), name, lambda path=path: path.open("rb")).windows())
        assert [r.names for r in rows] == [["a", "b"]]

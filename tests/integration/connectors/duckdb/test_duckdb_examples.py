"""Every file of sql/examples runs, and answers every row it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pytest

from complete_fn import Completion, CompletionRequest, EchoEngine
from complete_fn_connectors.duckdb import register

ROOT = Path(__file__).parents[4]
EXAMPLES = sorted((ROOT / "sql" / "examples").glob("*.sql"))


class Reader(EchoEngine):
    """Answers with the prompt's last word, or with an object where a schema is given."""

    def complete(self, request: CompletionRequest) -> Completion:
        done = super().complete(request)
        if request.response_format is None:
            return done
        return Completion(json.dumps({"section": "admin", "synopsis": "a tool"}), "stop", usage=done.usage)


def rows(path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, engine: Any) -> list[tuple[Any, ...]]:
    monkeypatch.chdir(ROOT)
    with duckdb.connect() as con, register(con, engine=engine, home=home, cortex=True):
        return con.execute(path.read_text()).fetchall()


@pytest.mark.filterwarnings("ignore:demo-llama-swiftkv is a demonstration")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert path.read_text().startswith("-- ")
    found = rows(path, tmp_path, monkeypatch, Reader())
    assert len(found) >= 5
    columns = 2 if path.stem == "details" else len(found[0])  # its error column is NULL
    assert all(value not in (None, "") for row in found for value in row[:columns])


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs_on_the_embedded_engine(path: Path, engine_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(rows(path, engine_home, monkeypatch, None)) >= 4

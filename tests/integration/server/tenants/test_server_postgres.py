"""A service whose state is in PostgreSQL answers as one on SQLite does, down to the types of its figures."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import polars as pl
import pytest

from complete_fn.client import Client


@pytest.fixture
def running(postgres_url: str, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COMPLETE_FN_DATABASE", postgres_url)
    return serve()


def test_a_job_and_its_bill(running: Any) -> None:
    client = Client(running.url)
    frame = pl.DataFrame({"text": ["a b", "a b", "c", None]})
    job = client.submit(frame, model="echo", prompt="{text}")
    state = job.wait()
    assert state["rows"] == {"total": 4, "done": 4, "failed": 0, "null": 1}
    assert state["usage"] == {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 3}
    assert [type(value) for value in state["usage"].values()] == [int, int, int]
    assert job.results().column("completion").to_pylist() == ["a b", "a b", "c", None]
    with running.http() as http:
        (line,) = http.get("/v1/usage").json()["data"]
        assert (line["rows"], line["input_tokens"], line["output_tokens"]) == (3, 3, 3)
        assert "E" not in line["cost"] + line["saved"] + state["cost"]["amount"]
        assert Decimal(line["cost"]) == Decimal(state["cost"]["amount"]) > 0


def test_a_chat_within_a_daily_budget(running: Any) -> None:
    key = running.state.keys.create("acme", "u")
    running.state.keys.set_daily_budget("acme", Decimal("0.000100"))
    chats = running.openai(key).chat.completions
    said = chats.create(model="echo", messages=[{"role": "user", "content": "one two"}], max_tokens=4)
    assert said.choices[0].message.content == "one two"

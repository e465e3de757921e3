"""The service on real engines: the embedded one answers a chat and a job; idle ones are let go."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from complete_fn.engines import pool as engines
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.ledger.usage import usage
from complete_fn.service.engine_host import EngineHost
from complete_fn.service.state import ServiceState
from complete_fn.text import text_column
from complete_fn.types import Asker


@pytest.mark.engine
def test_chats_and_a_job_on_the_embedded_engine(
    serve: Callable[..., Any], engine: Any, tiny_entry: Model, models_file: Path
) -> None:
    models_file.write_text(
        f"[models.tiny]\ncheckpoint = '{tiny_entry.checkpoint}'\nmax_model_len = 1024\ndefault_max_tokens = 24\n"
        "prices = { input = 1, output = 2 }\n"
    )
    running = serve(engine)
    reply = running.openai().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Name the section"}], temperature=0, max_tokens=5
    )
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5
    stream = running.openai().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Name another"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 3
    assert chunks[-1].usage.completion_tokens == 12
    leave_after_a_few_words(running)
    with running.http() as client:
        lines = b"\n".join(b'{"text": "package %d"}' % n for n in range(40))
        file = client.post("/v1/files", files={"file": ("t.jsonl", lines)}, data={"purpose": "user_data"}).json()["id"]
        body = {"model": "tiny", "prompt": "Name {text}", "source": {"file_id": file}, "options": {"max_tokens": 4}}
        job = client.post("/v1/jobs", json=body).json()["id"]
        deadline = time.monotonic() + 250
        while (state := client.get(f"/v1/jobs/{job}").json())["status"] != "completed" and time.monotonic() < deadline:
            time.sleep(0.2)
        rows = client.get(f"/v1/jobs/{job}/results", params={"format": "jsonl"}).text.splitlines()
    assert state["rows"] == {"total": 40, "done": 40, "failed": 0, "null": 0}
    assert state["usage"]["completion_tokens"] <= 160
    assert len(rows) == 40


def leave_after_a_few_words(running: Any) -> None:
    """The row is billed as far as it was told, not to the end it would have had."""
    (before,) = usage(running.state.store)
    long = running.openai().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Go on"}], max_tokens=900, stream=True
    )
    texts = (c.choices[0].delta.content for c in long if c.choices and c.choices[0].delta.content)
    assert [next(texts) for _ in range(3)]
    long.close()
    deadline = time.monotonic() + 60
    while (after := usage(running.state.store)[0]).rows == before.rows and time.monotonic() < deadline:
        time.sleep(0.1)
    assert after.rows == before.rows + 1
    assert after.input > before.input
    assert 3 <= after.output - before.output < 900
    assert after.lost_rows == before.lost_rows


def test_engines_are_let_go_when_idle_and_opened_again(tmp_path: Path, models_file: Path) -> None:
    with models_file.open("a") as file:
        file.write("\n[models.own]\nengine = 'echo'\ncheckpoint = 'own'\n")
    host = EngineHost(ServiceState(tmp_path / "home", models_file), idle_seconds=0.2)
    call = Call(host.state.model("own"))

    def open_ones() -> list[Any]:
        return [e for key, e in engines.OPEN.items() if "own" in key[0]]

    for text in ("a", "b"):
        assert host.complete(call, text_column([text]), Asker()).text.to_pylist() == [text]
        host.upkeep()
        assert len(open_ones()) == 1
        time.sleep(0.3)
        host.upkeep()
        assert open_ones() == []
    host.close()

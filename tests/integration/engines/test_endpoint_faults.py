"""Endpoints that drop connections, or report other tokens than they were asked for."""

from __future__ import annotations

import gzip
import itertools
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from complete_fn import Session
from complete_fn.cli.main import main
from complete_fn.engines import openai_chat
from complete_fn.errors import EngineError, InputError, InvalidOptionError, UsageRefusedError
from complete_fn.ledger.usage import usage
from tests.integration.engines.test_http_engine import Endpoint, ask, code, connect, endpoint, refused, said

__all__ = ["connect", "endpoint"]

PRICES = {"input": 1, "output": 2}


class Dropped(Exception):
    """Raised by a script, it makes the server close the connection without a reply."""


ROWS = [f"row {n}" for n in range(20)]


def reporting(prompt: Any, completion: Any, at: int = 5) -> Callable[[dict[str, Any]], Any]:
    """An honest endpoint, but for the reply number `at`."""
    numbers = itertools.count()

    def script(body: dict[str, Any]) -> Any:
        status, reply, headers = said(body["messages"][-1]["content"])
        if next(numbers) == at:
            reply["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion}
        return status, reply, headers

    return script


def session(endpoint: Endpoint, tmp_path: Path, **more: Any) -> Session:
    models = tmp_path / "models.toml"
    models.write_text('[models.remote]\nurl = "http://127.0.0.1:9/v1"\nengine_args = { concurrency = 1 }\n')
    return Session(engine=endpoint.url, home=tmp_path / "home", models_file=models, **more)


LIES = [(11, 5000), (11, 9 * 10**18), (10**30, 2), (9 * 10**18, 9 * 10**18), (50_000, 2)]


@pytest.mark.parametrize(("prompt", "completion"), LIES)
@pytest.mark.parametrize("cap", [{"max_cost": "0.01"}, {"max_total_tokens": 10_000}])
def test_no_report_of_an_endpoint_passes_a_cap(
    endpoint: Endpoint, tmp_path: Path, prompt: int, completion: int, cap: dict[str, Any]
) -> None:
    endpoint.script = reporting(prompt, completion)
    mine = session(endpoint, tmp_path, prices=PRICES, **cap)
    with pytest.raises(UsageRefusedError, match="no cap can be kept"):
        mine.complete("remote", ROWS, {"max_tokens": 4})
    (line,) = usage(mine.store, ["model"])
    assert 6 <= len(endpoint.asked) <= 8  # the rows that were under way are answered
    assert line.rows == len(endpoint.asked)
    assert line.cost <= Decimal("0.01")
    assert line.input + line.output <= 10_000
    assert line.output <= line.rows * 4


@pytest.mark.parametrize(("prompt", "completion"), LIES[:4])
def test_without_a_cap_only_the_row_is_refused(
    endpoint: Endpoint, tmp_path: Path, prompt: int, completion: int
) -> None:
    endpoint.script = reporting(prompt, completion)
    mine = session(endpoint, tmp_path)
    rows = mine.complete("remote", ROWS, {"max_tokens": 4}).details.to_pylist()
    codes = [row["error"] and row["error"]["code"] for row in rows]
    assert sorted(filter(None, codes)) == ["usage_refused"]
    (failed,) = [row for row in rows if row["error"]]
    assert failed["value"] is None
    assert failed["usage"]["completion_tokens"] <= 4


def test_an_endpoint_with_a_long_prompt_of_its_own_is_no_liar(endpoint: Endpoint, tmp_path: Path) -> None:
    def script(body: dict[str, Any]) -> Any:
        status, reply, headers = said("yes")
        text = body["messages"][-1]["content"]
        reply["usage"] = {"prompt_tokens": 3000 + len(text) // 4, "completion_tokens": 2}
        return status, reply, headers

    endpoint.script = script
    mine = session(endpoint, tmp_path, prices=PRICES, max_cost=1)
    assert mine.complete("remote", ROWS, {"max_tokens": 4}).text.to_pylist() == ["yes"] * len(ROWS)


@pytest.mark.parametrize("status", [401, 404, 418])
def test_an_endpoint_that_quotes_the_key_does_not_reveal_it(
    endpoint: Endpoint, connect: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("REMOTE_KEY", "sesame-0123")
    endpoint.script = lambda body: refused(status, "Incorrect API key provided: sesame-0123.")
    told = ""
    try:
        (row,) = ask(connect(api_key_env="REMOTE_KEY"), "a")
        assert row.error is not None
        told = row.error.message
    except EngineError as error:
        told = str(error)
    assert "provided: ***." in told
    assert "sesame" not in told


def test_rows_that_were_never_sent_are_not_lost(endpoint: Endpoint, tmp_path: Path) -> None:
    """The store counts 128 rows at a time as handed over; an endpoint without the model has got one or two of them."""
    endpoint.script = lambda body: refused(404, "no such model")
    mine = session(endpoint, tmp_path)
    with pytest.raises(EngineError, match="does not serve"):
        mine.complete("remote", [f"row {n}" for n in range(300)])
    (line,) = usage(mine.store, ["model"])
    assert line.lost_rows == len(endpoint.asked) <= 2


def test_a_cap_on_money_needs_prices(endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidOptionError, match=r"prices of 'remote' are not known.*max_total_tokens"):
        session(endpoint, tmp_path, max_cost="0.000001").complete("remote", ROWS)
    (tmp_path / "in.csv").write_text("text\na\n")
    told = ["run", str(tmp_path / "in.csv"), "-m", "llama3.2", "-p", "{text}", "--engine", endpoint.url]
    told += ["--home", str(tmp_path / "home"), "--format", "jsonl", "-o", str(tmp_path / "out.jsonl")]
    assert main([*told, "--max-cost", "0.000001"]) == 1
    assert "--prices input=0.15,output=0.6" in capsys.readouterr().err
    assert endpoint.asked == []
    assert main([*told, "--max-cost", "1", "--prices", "input=0.15,output=0.6"]) == 0
    assert "at your prices" in capsys.readouterr().err
    assert main([*told, "--overwrite", "--cache", "refresh"]) == 0
    assert "at unknown prices" in capsys.readouterr().err
    assert main([*told, "--overwrite", "--prices", "0.15"]) == 1
    assert "--prices '0.15' is not like" in capsys.readouterr().err


@pytest.mark.parametrize("prices", [{"input": -1}, {"input": "x"}, {"inputs": 1}])
def test_prices_that_are_none_are_refused(endpoint: Endpoint, tmp_path: Path, prices: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Beside engine"):
        session(endpoint, tmp_path, prices=prices)


def test_prices_without_an_engine_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="give engine= too"):
        Session(home=tmp_path, prices=PRICES)


def test_a_dropped_connection_fails_its_row_alone(endpoint: Endpoint, connect: Any) -> None:
    numbers = itertools.count()

    def script(body: dict[str, Any]) -> Any:
        if next(numbers) % 3 == 1:
            raise Dropped
        return said("yes")

    endpoint.script = script
    found = ask(connect(engine_args={"concurrency": 1}), *[f"p{n}" for n in range(12)])
    codes = [code(answer) for answer in found]
    assert codes.count("timeout") == 4
    assert codes.count(None) == 8
    assert len(endpoint.asked) == 12  # none was sent twice
    assert "broke the connection" in next(answer.error.message for answer in found if answer.error)


def test_connections_that_go_on_breaking_end_the_run(endpoint: Endpoint, connect: Any) -> None:
    def script(body: dict[str, Any]) -> Any:
        raise Dropped

    endpoint.script = script
    with pytest.raises(EngineError, match=r"broke 5 connections one after the other \(\w+"):
        ask(connect(engine_args={"concurrency": 1}), *[f"p{n}" for n in range(40)])
    assert len(endpoint.asked) == openai_chat.MOST_BROKEN


def test_an_endpoint_that_restarts_is_connected_to_again(endpoint: Endpoint, connect: Any) -> None:
    engine = connect(engine_args={"concurrency": 1})
    assert ask(engine, "before")[0].text == "BEFORE"
    opened, _ = engine.open()
    address = opened.url
    assert json.dumps(address)
    opened.url = "http://127.0.0.1:9/v1"  # nobody listens there

    async def back(pause: float) -> None:
        opened.url = address

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_chat.asyncio, "sleep", back)
        assert ask(engine, "after")[0].text == "AFTER"


MIB = 1 << 20


def test_a_reply_without_end_fails_its_row_and_is_not_read(endpoint: Endpoint, tmp_path: Path) -> None:
    sent: list[int] = []

    def endless() -> Iterator[bytes]:
        for number in range(300):
            sent.append(number)
            yield b"x" * MIB

    def script(body: dict[str, Any]) -> Any:
        return (200, endless(), {}) if "row 3" in body["messages"][-1]["content"] else said("yes")

    endpoint.script = script
    mine = session(endpoint, tmp_path, prices=PRICES, max_cost=1)
    rows = mine.complete("remote", ROWS[:6], {"max_tokens": 4}).details.to_pylist()
    assert [row["error"] and row["error"]["code"] for row in rows] == [None] * 3 + ["truncated"] + [None] * 2
    assert "more than 1,056,768 bytes" in rows[3]["error"]["message"]
    assert rows[3]["usage"]["completion_tokens"] == 4  # the endpoint may bill all that it was asked for
    assert len(sent) < 100


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_small_reply_that_decompresses_to_a_large_one_costs_no_memory(
    endpoint: Endpoint, connect: Any, encoding: str
) -> None:
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    bomb = compress(b'{"choices": [{"message": {"content": "' + b"x" * (200 * MIB))
    endpoint.script = lambda body: (200, iter([bomb]), {"content-encoding": encoding})
    engine = connect()
    tracemalloc.start()
    try:
        (row,) = ask(engine, "a", max_tokens=4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert code(row) == "truncated"
    assert peak < 20 * MIB


def test_an_honest_compressed_reply_is_read(endpoint: Endpoint, connect: Any) -> None:
    whole = json.dumps(said("yes")[1]).encode()
    endpoint.script = lambda body: (200, iter([gzip.compress(whole)]), {"content-encoding": "gzip"})
    assert ask(connect(), "a")[0].text == "yes"
    endpoint.script = lambda body: (200, iter([b"not gzip"]), {"content-encoding": "gzip"})
    with pytest.raises(EngineError, match="cannot be decompressed"):
        ask(connect(), "a")
    endpoint.script = lambda body: (200, iter([whole]), {"content-encoding": "br"})
    with pytest.raises(EngineError, match="compresses its reply with 'br', although 'gzip, deflate' was asked for"):
        ask(connect(), "a")


def test_a_refusal_without_end_is_cut(endpoint: Endpoint, connect: Any) -> None:
    endpoint.script = lambda body: (418, (b"no " * MIB for _ in range(300)), {})
    (row,) = ask(connect(), "a")
    assert code(row) == "invalid_request"
    assert row.error is not None
    assert len(row.error.message) < 1000


def test_a_reply_that_drips_fails_its_row_after_the_timeout(endpoint: Endpoint, connect: Any) -> None:
    def drip() -> Iterator[bytes]:
        while True:
            yield b" "
            time.sleep(0.05)

    endpoint.script = lambda body: (200, drip(), {})
    (row,) = ask(connect(engine_args={"timeout": 0.5}), "a")
    assert code(row) == "timeout"


def test_a_reply_nested_too_deeply_is_no_reply(endpoint: Endpoint, connect: Any) -> None:
    endpoint.script = lambda body: (200, iter([b"[" * 200_000]), {})
    with pytest.raises(EngineError, match="no OpenAI-compatible endpoint"):
        ask(connect(), "a")

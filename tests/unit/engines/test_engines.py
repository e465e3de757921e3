"""Which engine answers, and whose stored answers it may give."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from complete_fn import EchoEngine, Session
from complete_fn.engines import pool as engines
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.engines.http_engine import HttpEngine
from complete_fn.engines.pool import at_engine, close_engines, engine_for
from complete_fn.errors import RequestError
from complete_fn.settings import Settings, load_settings
from complete_fn_workers.engine.client import EmbeddedEngine
from complete_fn_workers.engine.link import Link


class Shouting(EchoEngine):
    """Answers depend on an argument that no one else can see."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark
        del self.identity


def test_engine_objects_without_an_identity_share_no_answers(tmp_path: Path) -> None:
    first, second = Shouting("a"), Shouting("b")
    for engine in (first, second, first):
        Session(engine=engine, home=tmp_path).complete("m", ["x"])
    assert [len(e.requests) for e in (first, second)] == [1, 1]


@pytest.mark.parametrize("arguments", [{"concurrency": "x"}, {"concurrency": 0}, {"timeout": []}, {"timeout": -1}])
def test_an_engine_argument_that_cannot_be_is_named(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(RequestError, match=re.escape(f"engine_args.{name} is {value!r}; it must be a")):
        HttpEngine(Model("x", "x", engine="http", url="http://127.0.0.1:9/v1", engine_args=arguments))


def test_entries_that_differ_in_key_or_limits_have_engines_of_their_own() -> None:
    settings = load_settings()
    base = {"checkpoint": "x", "engine": "http", "url": "http://127.0.0.1:9/v1"}
    first = engine_for(Model(name="a", api_key_env="A", **base), settings)  # type: ignore[arg-type]
    second = engine_for(Model(name="a", api_key_env="B", **base), settings)  # type: ignore[arg-type]
    third = engine_for(Model(name="a", api_key_env="A", default_max_tokens=7, **base), settings)  # type: ignore[arg-type]
    try:
        assert len({id(first), id(second), id(third)}) == 3
        assert engine_for(Model(name="a", api_key_env="A", **base), settings) is first  # type: ignore[arg-type]
    finally:
        close_engines()


def test_an_entry_or_checkpoint_written_anew_lets_the_engine_of_the_old_one_go(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    settings, elsewhere = Settings(tmp_path / "home", None, None), Settings(tmp_path / "other", None, None)

    def running(settings: Settings = settings, **entry: object) -> EmbeddedEngine:
        engine = engine_for(Model("m", str(folder), **entry), settings)  # type: ignore[arg-type]
        assert isinstance(engine, EmbeddedEngine)
        if engine.lifeline is None:
            ours, theirs = socket.socketpair()
            engine.lifeline = Link(ours)
            theirs.detach()
        return engine

    before = len(engines.OPEN)
    try:
        others, first = running(elsewhere), running()
        assert running() is first
        (folder / "config.json").write_text('{"written": "anew"}')
        second = running()
        third = running(engine_args={"max_num_seqs": 8})
        assert [e.lifeline is None for e in (others, first, second, third)] == [False, True, True, False]
        assert len(engines.OPEN) == before + 2
    finally:
        close_engines()


def test_a_key_does_not_follow_a_model_to_another_host() -> None:
    model = Model(name="a", checkpoint="a", engine="http", url="http://one:1/v1", api_key_env="KEY")
    assert at_engine(model, "http://one:1/v2").api_key_env == "KEY"
    assert at_engine(model, "http://two:1/v1").api_key_env is None


def test_an_engine_that_is_no_url_is_refused() -> None:
    with pytest.raises(RequestError, match="'localhost:1' is not an http"):
        at_engine(Model(name="a", checkpoint="a"), "localhost:1")


def test_answers_are_kept_apart_by_what_changes_them_and_not_by_speed() -> None:
    def fingerprint(**arguments: object) -> bytes:
        return Call(Model(name="a", checkpoint="a", engine="http", url="u", engine_args=arguments)).fingerprint

    assert fingerprint(concurrency=4) == fingerprint(concurrency=8)
    assert fingerprint(served_name="a") != fingerprint(served_name="b")
    assert fingerprint(extra_body={"effort": 1}) != fingerprint(extra_body={"effort": 2})

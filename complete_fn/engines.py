"""The engines of this process: one per model, opened on first use, shared by all sessions, closed at exit."""

from __future__ import annotations

import atexit
import threading
from dataclasses import replace

from complete_fn.catalogue import Model
from complete_fn.engine import Engine
from complete_fn.errors import RequestError
from complete_fn.keys import checkpoint_digest
from complete_fn.settings import Settings
from complete_fn.wiring import ENGINES, resolve

OPEN: dict[tuple[str, str], Engine] = {}
LOCK = threading.Lock()


def engine_for(model: Model, settings: Settings) -> Engine:
    """The running engine of the model; starting it is left to its first use.

    Raises:
        EngineMissingError: a library of that engine is not installed; the message has the command that brings it.
        RequestError: the catalogue names an engine kind that does not exist.
    """
    if model.engine not in ENGINES:
        raise RequestError(f"Model {model.name!r} asks for engine {model.engine!r}; there are {', '.join(ENGINES)}.")
    key = (checkpoint_digest(model), repr(sorted(model.engine_args.items())))
    with LOCK:
        if key not in OPEN:
            OPEN[key] = resolve(ENGINES[model.engine])(model, settings)
        return OPEN[key]


def at_engine(model: Model, engine: Engine | str | None) -> Model:
    """The model as answered by another engine: a URL, or an object that implements `Engine`."""
    if engine is None:
        return model
    if isinstance(engine, str):
        if not engine.startswith(("http://", "https://")):
            raise RequestError(f"engine = {engine!r} is not an http:// or https:// URL.")
        return replace(model, engine="http", url=engine)
    return replace(model, engine=f"object:{type(engine).__qualname__}")


def close_engines() -> None:
    with LOCK:
        engines = list(OPEN.values())
        OPEN.clear()
    for engine in engines:
        engine.close()


atexit.register(close_engines)

"""The pool holds this process's engines: one per model, opened on first use, shared by sessions, closed at exit."""

from __future__ import annotations

import atexit
import threading
import uuid
import weakref
from dataclasses import replace
from urllib.parse import urlsplit

from complete_fn.engines.base import Engine
from complete_fn.engines.catalogue import Model, Prices
from complete_fn.engines.checkpoint import checkpoint_digest
from complete_fn.errors import RequestError
from complete_fn.host import at_fork
from complete_fn.ports import PORTS, has_port
from complete_fn.registry import ENGINES, resolve
from complete_fn.settings import Settings, secret

OPEN: dict[tuple[str, str, str], Engine] = {}  # by checkpoint digest, entry, and place (name, kind, settings)
IDENTITIES: weakref.WeakKeyDictionary[Engine, str] = weakref.WeakKeyDictionary()
LOCK = threading.Lock()


def engine_for(model: Model, settings: Settings) -> Engine:
    """The engine of the model. The engine starts at its first use.

    If the entry or its checkpoint has changed, the older engine of the same settings is released: its streams end by
    themselves, and callers that still hold it can go on. An endpoint's engine takes no memory here and stays.

    Raises:
        EngineMissingError: A library of the engine is not installed; the message has the command that installs it.
        RequestError: The catalogue names an engine kind that does not exist.
    """
    if model.engine not in ENGINES:
        raise RequestError(f"Model {model.name!r} asks for engine {model.engine!r}; there are {', '.join(ENGINES)}.")
    place = repr((model.name, model.engine, settings))
    key = (checkpoint_digest(model), repr((replace(model, prices=Prices(), note="", tried=""), settings)), place)
    with LOCK:
        older = []
        if key not in OPEN:
            opened = resolve(ENGINES[model.engine])(model, settings)
            older = [] if model.engine == "http" else [OPEN.pop(k) for k in list(OPEN) if k[2] == place]
            OPEN[key] = opened
        engine = OPEN[key]
    for left in older:
        left.close()
    return engine


def at_engine(model: Model, engine: Engine | str | None) -> Model:
    """The model, answered by another engine: a URL, or an object that implements `Engine`.

    The service that COMPLETE_FN_URL names gets the API key COMPLETE_FN_KEY. That service bills the rows. The local
    ledger notes them with the price basis `service`, so that no sum counts them twice.
    """
    if engine is None:
        return model
    if isinstance(engine, str):
        if not engine.startswith(("http://", "https://")):
            raise RequestError(f"engine = {engine!r} is not an http:// or https:// URL.")
        if not has_port(engine):
            raise RequestError(f"engine = {engine!r} cannot be reached: {PORTS}.")
        if of_service(engine):
            key = "COMPLETE_FN_KEY" if secret("COMPLETE_FN_KEY") else None
            prices = replace(model.prices, basis="service")
            return replace(model, engine="http", url=engine, api_key_env=key, prices=prices)
        same_host = model.url is not None and urlsplit(model.url).netloc == urlsplit(engine).netloc
        return replace(model, engine="http", url=engine, api_key_env=model.api_key_env if same_host else None)
    return replace(model, engine=f"object:{type(engine).__module__}.{type(engine).__qualname__}:{identity(engine)}")


def of_service(url: str) -> bool:
    """Whether the URL has the address that COMPLETE_FN_URL names."""
    named = secret("COMPLETE_FN_URL")
    return bool(named) and urlsplit(named)[:2] == urlsplit(url)[:2]


def identity(engine: Engine) -> str:
    """The name under which this engine's answers are stored: its own `identity`, or else a random unique one."""
    own = getattr(engine, "identity", None)
    if isinstance(own, str):
        return own
    return IDENTITIES.setdefault(engine, uuid.uuid4().hex)


def renew_lock() -> None:
    """Give a forked child a new lock: another thread may have held the parent's lock during the fork."""
    global LOCK
    LOCK = threading.Lock()


def let_go(engine: Engine) -> None:
    """Close one engine. The next use of its model opens another."""
    with LOCK:
        for key in [key for key, opened in OPEN.items() if opened is engine]:
            del OPEN[key]
    engine.close()


def close_engines() -> None:
    with LOCK:
        engines = list(OPEN.values())
        OPEN.clear()
    for engine in engines:
        engine.close()


at_fork(after_in_child=renew_lock)
atexit.register(close_engines)

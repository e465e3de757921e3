"""`complete-fn serve` and `complete-fn keys`: the service on one machine, and who may use it."""

from __future__ import annotations

import argparse
import fcntl
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from complete_fn.budget import parse_cap
from complete_fn.cli import OK, Parser, add_home
from complete_fn.cli_state import open_store, print_table
from complete_fn.errors import InvalidOptionError
from complete_fn.settings import load_settings
from complete_fn.wiring import resolve

DESCRIPTION = """\
Serve OpenAI's API and jobs for tables from this machine: `base_url` http://127.0.0.1:8000/v1, any key.

Models load on demand and go when idle. Needs `pip install 'complete-fn[service]'`."""
NO_KEYS = (
    "--host {host} can be reached from other machines and no API key exists. "
    "Make one with `complete-fn keys create --tenant NAME`, or serve on 127.0.0.1."
)


def serve_main(argv: list[str]) -> int:
    parser = Parser("complete-fn serve", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; others need API keys)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    add("--idle-seconds", type=float, default=300.0, metavar="S", help="let idle engines go after (default: 300)")
    add_home(parser)
    asked = parser.parse_args(argv)
    is_loopback, make_app, service_type, uvicorn = (
        resolve(name)
        for name in (
            "complete_fn.server.auth:is_loopback",
            "complete_fn.server.app:make_app",
            "complete_fn.service:Service",
            "uvicorn:Server",
        )
    )
    home = load_settings(asked.home).home
    with alone(home), listening(asked.host, asked.port) as listener:
        service = service_type(home=home, idle_seconds=asked.idle_seconds)
        loopback = is_loopback(listener.getsockname()[0])
        if not loopback and not service.keys.any():
            raise InvalidOptionError(NO_KEYS.format(host=asked.host))
        where = f"http://{asked.host}:{listener.getsockname()[1]}"
        print(f"complete-fn serves {where}/v1 (API: {where}/docs; state: {home}). Ctrl-C ends it.", file=sys.stderr)
        config = resolve("uvicorn:Config")(
            make_app(service, loopback), log_level="warning", access_log=False, timeout_graceful_shutdown=10
        )
        uvicorn(config).run(sockets=[listener])
    return OK


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """One service per state folder: budgets are kept in its memory.

    Raises:
        InvalidOptionError: another one runs there.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "serve.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidOptionError(f"Another complete-fn serves from {home}. Name another --home.") from error
        yield


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Raises:
    InvalidOptionError: the address is taken or not ours.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(256)
    except (OSError, OverflowError) as error:
        raise InvalidOptionError(f"--host {host} --port {port} cannot be listened on: {error}.") from error
    with listener:
        yield listener


def keys_main(argv: list[str]) -> int:
    from complete_fn.key_store import SCOPES

    parser = Parser("complete-fn keys", description="Make, list and revoke the service's API keys.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="create|list|revoke|budget", parser_class=Parser)
    create = verbs.add_parser("create", help="make a key; it is shown this once")
    create.add_argument("--tenant", required=True, help="answers, ledger and budget are kept by tenant")
    create.add_argument("--user", default="service", help="whose ledger lines they are (default: service)")
    create.add_argument("--scopes", default=",".join(SCOPES), help=f"of {', '.join(SCOPES)} (default: all)")
    listed = verbs.add_parser("list", help="all keys, without their secrets")
    revoke = verbs.add_parser("revoke", help="a key's use ends at once")
    revoke.add_argument("id", help="as `complete-fn keys list` shows it")
    budget = verbs.add_parser("budget", help="bound what a tenant may spend in a day (UTC)")
    budget.add_argument("tenant")
    budget.add_argument("amount", help="in the currency of the models' prices, or 'none'")
    for each in (create, listed, revoke, budget):
        add_home(each)
    asked = parser.parse_args(argv)
    return KEY_VERBS[asked.verb](asked)


def key_store(asked: argparse.Namespace) -> Any:
    from complete_fn.key_store import KeyStore

    return KeyStore(open_store(asked.home))


def create_key(asked: argparse.Namespace) -> int:
    key = key_store(asked).create(asked.tenant, asked.user, asked.scopes.split(","))
    print(key)
    print("Keep it: it cannot be shown again.", file=sys.stderr)
    return OK


def list_keys(asked: argparse.Namespace) -> int:
    lines = [
        (k.id, k.tenant, k.user, k.scopes, moment(k.created_at), "revoked" if k.revoked_at else "valid")
        for k in key_store(asked).list()
    ]
    print_table([("ID", "TENANT", "USER", "SCOPES", "CREATED", "STATE"), *lines])
    return OK


def revoke_key(asked: argparse.Namespace) -> int:
    if not key_store(asked).revoke(asked.id):
        raise InvalidOptionError(f"There is no valid key {asked.id!r}. `complete-fn keys list` shows all.")
    print(f"Key {asked.id} is revoked.")
    return OK


def set_budget(asked: argparse.Namespace) -> int:
    limit = None if asked.amount == "none" else parse_cap(asked.amount)
    key_store(asked).set_daily_budget(asked.tenant, limit)
    print(f"{asked.tenant}: {'no bound' if limit is None else f'at most {limit} a day'}.")
    return OK


def moment(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


KEY_VERBS = {"create": create_key, "list": list_keys, "revoke": revoke_key, "budget": set_budget}

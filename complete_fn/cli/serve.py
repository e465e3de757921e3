"""`complete-fn serve` runs the service on one machine; `complete-fn keys` decides who may use it."""

from __future__ import annotations

import argparse
import fcntl
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from complete_fn.cli.local_state import open_store, print_table
from complete_fn.cli.main import OK, Parser, add_home
from complete_fn.cli.terminal import print_err, print_out
from complete_fn.errors import InvalidOptionError, StoreUpgradedError, did_you_mean
from complete_fn.host import raise_file_limit
from complete_fn.jobs.queue import CeleryQueue
from complete_fn.ports import parse_port
from complete_fn.registry import resolve
from complete_fn.settings import load_settings
from complete_fn.spending.budget import parse_cap
from complete_fn.worker.devices import device_shares, visible_devices, within_devices
from complete_fn.worker.scaling import parse_workers

DESCRIPTION = """\
Serve OpenAI's API and jobs for tables from this machine: `base_url` http://127.0.0.1:8000/v1, any key.

Models load on demand and go when idle. Needs `pip install 'complete-fn[service]'`.

Alone, this process runs the jobs too. With a broker, worker processes do: those that --workers starts and stops here,
and any `complete-fn worker` with the same broker and state. Needs `pip install 'complete-fn[fleet]'`."""
MOST_A_MINUTE = 10**12  # tokens; fits well into the store's 64-bit numbers
MOST_BYTES = 10**15
NO_BROKER = (
    "--workers {workers} needs a Redis, over which they learn of work: give --broker redis://127.0.0.1:6379/0 or set "
    "COMPLETE_FN_BROKER. Without --workers this process runs the jobs itself."
)
NO_KEYS = (
    "--host {host} can be reached from other machines and no API key exists. "
    "Make one with `complete-fn keys create --tenant NAME`, or serve on 127.0.0.1."
)


def serve_main(argv: list[str]) -> int:
    parser = Parser("complete-fn serve", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; others need API keys)")
    add("--port", type=parse_port, default=8000, help="0 takes a free one (default: 8000)")
    add("--idle-seconds", type=float, default=300.0, metavar="S", help="let idle engines go after (default: 300)")
    add("--broker", metavar="URL", help="Redis that tells worker processes of work (default: COMPLETE_FN_BROKER)")
    add(
        "--workers",
        metavar="N|MIN..MAX",
        help="worker processes to keep here: 0..2 starts up to 2 when there is work, 0 none",
    )
    add_home(parser)
    asked = parser.parse_args(argv)
    is_loopback, make_app, state_type, host_type, serve_app = (
        resolve(name)
        for name in (
            "complete_fn.server.auth:is_loopback",
            "complete_fn.server.app:make_app",
            "complete_fn.service.state:ServiceState",
            "complete_fn.service.engine_host:EngineHost",
            "complete_fn.server.connection_guard:serve_app",
        )
    )
    files = raise_file_limit()
    settings = load_settings(asked.home)
    home, broker = settings.home, asked.broker or settings.broker
    workers = parse_workers(asked.workers) if asked.workers else None
    if workers and not broker:
        raise InvalidOptionError(NO_BROKER.format(workers=asked.workers))
    queue = CeleryQueue(broker) if broker else None
    with alone(home) if settings.database is None else nullcontext(), listening(asked.host, asked.port) as listener:
        state = state_type(home, queue=queue)
        engines = host_type(state, asked.idle_seconds)
        loopback = is_loopback(listener.getsockname()[0])
        if not loopback and not state.keys.any():
            raise InvalidOptionError(NO_KEYS.format(host=asked.host))
        where = f"http://{asked.host}:{listener.getsockname()[1]}"
        print_err(f"complete-fn serves {where}/v1 (API: {where}/docs; state: {state.store.place}). Ctrl-C ends it.")
        app = make_app(engines, loopback, maintenance=maintenance_of(engines, broker, workers))
        serve_app(app, listener, files, settings.connections, lambda: state.store.is_outdated)
        if state.store.is_outdated:
            raise StoreUpgradedError
    return OK


def maintenance_of(engines: Any, broker: str | None, workers: tuple[int, int] | None) -> Any:
    """The maintenance that this process does for worker processes; None if it runs the jobs itself."""
    if broker is None:
        return None
    maintenance, fleet, worker_starter = (
        resolve(name)
        for name in (
            "complete_fn.worker.maintenance:Maintenance",
            "complete_fn.worker.fleet:Fleet",
            "complete_fn.worker.fleet:worker_starter",
        )
    )
    if workers is None or not workers[1]:
        return maintenance(engines)
    devices = visible_devices()
    least, most = within_devices(*workers, devices)
    start = worker_starter(engines.state.settings, broker, engines.idle_seconds, device_shares(devices, most))
    return maintenance(engines, fleet(engines.state.workers, start, least, most, engines.idle_seconds))


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Allow only one API process per SQLite file. Several may share a PostgreSQL database.

    Raises:
        InvalidOptionError: Another API process serves from this folder.
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
    InvalidOptionError: The address is in use or does not belong to this machine.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(256)
    except OSError as error:
        raise InvalidOptionError(f"--host {host} --port {port} cannot be listened on: {error}.") from error
    with listener:
        yield listener


def keys_main(argv: list[str]) -> int:
    from complete_fn.jobs.api_keys import SCOPES, USUAL

    parser = Parser("complete-fn keys", description="Make, list and revoke the service's API keys.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(KEY_VERBS), parser_class=Parser)
    create = verbs.add_parser("create", help="make a key; it is shown this once")
    create.add_argument("--tenant", required=True, help="answers, ledger and budget are kept by tenant")
    create.add_argument("--user", default="service", help="whose ledger lines they are (default: service)")
    create.add_argument(
        "--scopes", default=",".join(USUAL), help=f"of {', '.join(SCOPES)} (default: {', '.join(USUAL)})"
    )
    create.add_argument("--days", type=float, help="its use ends after so many (default: never)")
    listed = verbs.add_parser("list", help="all keys, without their secrets")
    revoke = verbs.add_parser("revoke", help="a key's use ends at once")
    revoke.add_argument("id", help="as `complete-fn keys list` shows it")
    budget = verbs.add_parser("budget", help="bound what a tenant may spend in a day (UTC)")
    budget.add_argument("tenant", help="as `complete-fn keys list` shows it")
    budget.add_argument("amount", help="of the currency, or 'none'")
    budget.add_argument("--currency", default="USD", help="of the models' prices (default: USD)")
    limit = verbs.add_parser("limit", help="bound the tokens a minute that a tenant or one key may use in chats")
    limit.add_argument("name", metavar="TENANT|ID", help="a tenant, or a key's id as `complete-fn keys list` shows it")
    limit.add_argument("tokens", metavar="TOKENS_PER_MINUTE", help="prompt and answer, or 'none'")
    weight = verbs.add_parser("weight", help="a tenant's share of the workers, as a multiple of others'")
    weight.add_argument("tenant", help="as `complete-fn keys list` shows it")
    weight.add_argument("weight", type=float, help="above 0; without one it is 1")
    storage = verbs.add_parser("storage", help="bound the bytes that a tenant's files, jobs and results may take")
    storage.add_argument("tenant", help="as `complete-fn keys list` shows it")
    storage.add_argument("bytes", nargs="?", help="or 'none' for COMPLETE_FN_TENANT_STORAGE; without it, show them")
    for each in (create, listed, revoke, budget, limit, weight, storage):
        add_home(each)
    asked = parser.parse_args(argv)
    return KEY_VERBS[asked.verb](asked)


def key_store(asked: argparse.Namespace) -> Any:
    from complete_fn.jobs.api_keys import KeyStore

    return KeyStore(open_store(asked.home))


def create_key(asked: argparse.Namespace) -> int:
    key = key_store(asked).create(asked.tenant, asked.user, asked.scopes.split(","), asked.days)
    print_out(key)
    print_err("Keep it: it cannot be shown again.")
    return OK


def list_keys(asked: argparse.Namespace) -> int:
    keys = key_store(asked)
    now = keys.store.now()
    lines = [
        (k.id, k.tenant, k.user, k.scopes, moment(k.created_at), str(k.tokens_per_minute or ""), key_state(k, now))
        for k in keys.list()
    ]
    print_table([("ID", "TENANT", "USER", "SCOPES", "CREATED", "TOKENS/MIN", "STATE"), *lines])
    return OK


def key_state(key: Any, now: float) -> str:
    if key.revoked_at:
        return "revoked"
    if key.expires_at is None:
        return "valid"
    return f"until {moment(key.expires_at)}" if key.expires_at > now else "expired"


def revoke_key(asked: argparse.Namespace) -> int:
    if not key_store(asked).revoke(asked.id):
        raise InvalidOptionError(f"There is no valid key {asked.id!r}. `complete-fn keys list` shows all.")
    print_out(f"Key {asked.id} is revoked.")
    return OK


def set_budget(asked: argparse.Namespace) -> int:
    limit = None if asked.amount == "none" else parse_cap(asked.amount)
    store = key_store(asked)
    refuse_unknown_tenant(store, asked.tenant)
    refuse_unknown_currency(asked)
    store.set_daily_budget(asked.tenant, limit, asked.currency)
    print_out(f"{asked.tenant}: {'no bound' if limit is None else f'at most {asked.currency} {limit} a day'}.")
    return OK


def refuse_unknown_currency(asked: argparse.Namespace) -> None:
    """Refuse a currency without a model: a bound in it would bound nothing.

    Raises:
        InvalidOptionError: No model of the catalogue is priced in it.
    """
    from complete_fn.engines.catalogue import load_catalogue

    known = sorted({m.prices.currency for m in load_catalogue(load_settings(asked.home).models_file).values()})
    if asked.currency not in known:
        raise InvalidOptionError(
            f"No model of the catalogue is priced in {asked.currency!r}; its prices are in {', '.join(known)}."
        )


def refuse_unknown_tenant(store: Any, name: str) -> None:
    """Refuse a name without a key: a bound on it would bound nobody.

    Raises:
        InvalidOptionError: No key was made for the tenant, which is not the local one either.
    """
    from complete_fn.jobs.api_keys import Principal

    known = sorted({line.tenant for line in store.list()} | {Principal().tenant})
    if name not in known:
        raise InvalidOptionError(f"No key was made for tenant {name!r}.{did_you_mean(name, known)}")


def set_limit(asked: argparse.Namespace) -> int:
    per_minute = None if asked.tokens == "none" else whole_number("TOKENS_PER_MINUTE", asked.tokens, MOST_A_MINUTE)
    store = key_store(asked)
    lines = store.list()
    if any(line.id == asked.name for line in lines):
        store.limit_key(asked.name, per_minute)
    elif any(line.tenant == asked.name for line in lines):
        store.limit_tenant(asked.name, per_minute)
    else:
        raise InvalidOptionError(f"No key and no tenant is named {asked.name!r}. `complete-fn keys list` shows all.")
    print_out(f"{asked.name}: {'no limit' if per_minute is None else f'at most {per_minute:,} tokens a minute'}.")
    return OK


def set_weight(asked: argparse.Namespace) -> int:
    store = key_store(asked)
    refuse_unknown_tenant(store, asked.tenant)
    store.set_weight(asked.tenant, asked.weight)
    print_out(f"{asked.tenant}: {asked.weight:g} times the share of a tenant without a weight.")
    return OK


def set_storage(asked: argparse.Namespace) -> int:
    from complete_fn.jobs.storage_quota import StorageQuota

    store = key_store(asked)
    refuse_unknown_tenant(store, asked.tenant)
    if asked.bytes is not None:
        store.set_storage(
            asked.tenant, None if asked.bytes == "none" else whole_number("BYTES", asked.bytes, MOST_BYTES)
        )
    used, allowed = StorageQuota(store.store, load_settings(asked.home).tenant_storage).state(asked.tenant)
    print_out(f"{asked.tenant}: {used:,} of {allowed:,} bytes are used.")
    return OK


def whole_number(name: str, given: str, most: int) -> int:
    """Raises:
    InvalidOptionError: The text is no whole number from 1 to `most`.
    """
    found = int(given) if given.isdecimal() and len(given) <= len(str(most)) else 0
    if not 0 < found <= most:
        raise InvalidOptionError(f"{name} = {given!r} must be a whole number from 1 to {most:,}, or 'none'.")
    return found


def moment(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


KEY_VERBS = {
    "create": create_key,
    "list": list_keys,
    "revoke": revoke_key,
    "budget": set_budget,
    "limit": set_limit,
    "weight": set_weight,
    "storage": set_storage,
}

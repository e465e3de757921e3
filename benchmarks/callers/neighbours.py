"""One tenant's job and chat times, quiet and while another tenant attacks the service in each of six ways.

    python benchmarks/callers/neighbours.py                 5 alternating pairs for each attack
    python benchmarks/callers/neighbours.py --pairs 2 --only schemas chats

The service is `complete-fn serve` with one process, on a PostgreSQL of its own, with models that echo after 2 ms (the
probe's and the attacks') and after 2 s (slow chats). A probe is 20 chats, one after another, and a job of 400 rows,
from its submission until its results are fetched. Attacks run in a process of their own, from before the probe until
after it; each of their threads pauses for a second between two requests. A pair is a quiet probe and one under the
attack, in turn first. Goal: the attacked takes at most 1.5 times as long, at the median. The attackers' own use of the
machine's cores is part of what is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from complete_fn.jobs.api_keys import KeyStore
from complete_fn.jobs.connections import Connections
from complete_fn.store.store import Store
from deploy.servers import Postgres, free_port, running

MODELS = """
[models.quick]
engine = 'echo'
checkpoint = 'quick'
engine_args = { row_seconds = 0.002 }
prices = { input = 1, output = 2 }

[models.slow]
engine = 'echo'
checkpoint = 'slow'
engine_args = { row_seconds = 2.0 }
prices = { input = 1, output = 2 }
"""
CHATS, ROWS, WARM_SECONDS, ATTACK_PAUSE = 20, 400, 2.0, 1.0
BYTES = "SELECT repeat('x', 1000000000) AS a, repeat('y', 1000000000) AS b"
SLOW_SQL = "SELECT set_config('statement_timeout', '0', true) AS a, pg_sleep(60)::text AS b"


def submit(client: httpx.Client, model: str, source: dict[str, Any], **options: Any) -> httpx.Response:
    body = {"model": model, "prompt": "{a}", "source": source, "options": options}
    return client.post("/v1/jobs", json=body)


def upload(client: httpx.Client, content: bytes) -> str:
    reply = client.post("/v1/files", files={"file": ("t.csv", content)}, data={"purpose": "user_data"})
    return str(reply.json().get("id"))


def chat(client: httpx.Client, model: str, text: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return client.post("/v1/chat/completions", json=body).status_code


# -- attacks: each is called again and again, by so many threads -----------------------------------------------------


def schemas(client: httpx.Client) -> None:
    """Schemas that stand for 2^40 others."""
    refs = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)} | {"a40": {"type": "object"}}
    body = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$defs": refs, "$ref": "#/$defs/a0"}}}
    submit(client, "quick", {"file_id": upload(client, b"a\n1\n")}, response_format=json.dumps(body))


def wide_tables(client: httpx.Client) -> None:
    """A header of 200,000 names."""
    names = ",".join(f"n{n}" for n in range(200_000)).encode()
    submit(client, "quick", {"file_id": upload(client, b"a," + names + b"\n1\n")})


def slow_queries(client: httpx.Client) -> None:
    """Queries that turn their time limit off."""
    submit(client, "quick", {"connection": "db", "sql": SLOW_SQL})


def large_rows(client: httpx.Client) -> None:
    """A row of 2 GB."""
    submit(client, "quick", {"connection": "db", "sql": BYTES})


def half_headers(client: httpx.Client) -> None:
    """1,024 connections that begin a request and never end it, without a key."""
    links = []
    with suppress(OSError):
        for _ in range(1024):
            link = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=5)
            link.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
            links.append(link)
    time.sleep(5)
    for link in links:
        link.close()


def chats(client: httpx.Client) -> None:
    """Slow chats, 330 at a time."""
    chat(client, "slow", "hello")


ATTACKS: dict[str, tuple[Callable[[httpx.Client], None], int]] = {
    "schemas": (schemas, 5),
    "wide-tables": (wide_tables, 4),
    "slow-queries": (slow_queries, 4),
    "large-rows": (large_rows, 2),
    "half-headers": (half_headers, 1),
    "chats": (chats, 330),
}


def attack(name: str, url: str, key: str) -> None:
    """Without end; the process is killed."""
    what, threads = ATTACKS[name]
    limits = httpx.Limits(max_connections=threads)
    client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120, limits=limits)

    def go() -> None:
        while True:
            with suppress(httpx.HTTPError):
                what(client)
            time.sleep(ATTACK_PAUSE)

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(go)


# -- the probe -------------------------------------------------------------------------------------------------------


def probe(client: httpx.Client, serial: str) -> tuple[float, float]:
    """(median seconds of a chat, seconds of the job)"""
    took = []
    for number in range(CHATS):
        began = time.monotonic()
        while chat(client, "quick", f"{serial} {number}") != 200:
            time.sleep(0.05)
        took.append(time.monotonic() - began)
    began = time.monotonic()
    rows = "a\n" + "\n".join(f"{serial} row {n}" for n in range(ROWS))
    job = submit(client, "quick", {"file_id": upload(client, rows.encode())}).json()["id"]
    while client.get(f"/v1/jobs/{job}").json()["status"] != "completed":
        time.sleep(0.05)
    client.get(f"/v1/jobs/{job}/results").raise_for_status()
    return statistics.median(took), time.monotonic() - began


@contextmanager
def service(folder: Path, database: str) -> Iterator[str]:
    (folder / "models.toml").write_text(MODELS)
    port = free_port()
    own = {"COMPLETE_FN_DATABASE": database, "COMPLETE_FN_MODELS": str(folder / "models.toml"), "DB_URL": database}
    command = [sys.executable, "-m", "complete_fn", "serve", "--port", str(port), "--home", str(folder)]
    with subprocess.Popen(command, env={**os.environ, **own}, stderr=subprocess.PIPE, text=True) as serving:
        assert serving.stderr is not None
        next(line for line in serving.stderr if "serves http" in line)
        threading.Thread(target=drain, args=(serving.stderr,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            serving.terminate()


def drain(pipe: IO[str]) -> None:
    with suppress(ValueError):  # closed at the end
        for _ in pipe:
            pass


def measure(url: str, name: str, noisy: str, client: httpx.Client, pairs: int) -> None:
    ratios: list[tuple[float, float]] = []
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for pair in range(pairs):
        for attacked in (True, False) if pair % 2 else (False, True):
            attacker = multiprocessing.get_context("spawn").Process(target=attack, args=(name, url, noisy), daemon=True)
            if attacked:
                attacker.start()
                time.sleep(WARM_SECONDS)
            found[attacked].append(probe(client, f"{name} {pair} {attacked}"))
            if attacked:
                attacker.kill()
                attacker.join()
                time.sleep(WARM_SECONDS)
        quiet, loud = found[False][-1], found[True][-1]
        ratios.append((loud[0] / quiet[0], loud[1] / quiet[1]))
    chat_quiet, job_quiet = (statistics.median(column) for column in zip(*found[False], strict=True))
    chat_loud, job_loud = (statistics.median(column) for column in zip(*found[True], strict=True))
    chats, jobs = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(
        f"{name:13} chat {chat_quiet * 1e3:6.0f} -> {chat_loud * 1e3:6.0f} ms (x{chats:.2f}), "
        f"job {job_quiet:5.2f} -> {job_loud:5.2f} s (x{jobs:.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=ATTACKS, default=list(ATTACKS))
    asked = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {asked.pairs} pairs, medians")
    with tempfile.TemporaryDirectory() as folder, running(Postgres) as postgres, postgres.database() as database:
        store = Store(database)
        noisy, quiet = (KeyStore(store).create(tenant, "u") for tenant in ("noisy", "quiet"))
        Connections(store).add("noisy", "db", "DB_URL", False)
        with service(Path(folder), database) as url:
            client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {quiet}"}, timeout=120)
            probe(client, "warm")
            for name in asked.only:
                measure(url, name, noisy, client, asked.pairs)


if __name__ == "__main__":
    main()

"""Two APIs, three workers, two tenants, and all that can happen to them: every row once, right and in order."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from complete_fn.store.tables import ledger, of_class
from tests.acceptance.chaos_world import WORLD_FAULTS, World, world

SEED = 17
Row = tuple[int, str | None, str | None]  # number, text, error code


@dataclass
class Scale:
    """How much is tried. Seconds: between two faults, and for which something is away."""

    faults: int
    rows: int
    pauses: tuple[float, float]
    away: float
    limit: float


SHORT = Scale(faults=20, rows=1_200, pauses=(0.3, 1.2), away=2.0, limit=150)
LONG = Scale(faults=100, rows=50_000, pauses=(1.0, 4.0), away=35.0, limit=1800)


@dataclass
class Trial:
    """A job with the rows that it must end with."""

    tenant: str
    model: str
    texts: list[str]
    sink: bool = False
    file: str = ""
    reruns: int = 0
    job: str = ""

    def expected(self) -> list[Row]:
        return [(n, *answer(self.model, text)) for n, text in enumerate(self.texts)]


def answer(model: str, text: str) -> tuple[str | None, str | None]:
    """(text, error code) of a row, by its prompt alone."""
    if model == "tiny" and len(text.split()) >= 40:
        return None, "prompt_too_long"
    codes = {"drop": "timeout", "lie": "usage_refused", "poison": "engine_failed"}
    code = next((code for word, code in codes.items() if word in text), None)
    return (None, code) if code else (text, None)


def trials(rows: int) -> list[Trial]:
    many = [f"row number {n}" + " and so on" * (20 if n % 50 == 49 else n % 2) for n in range(rows)]
    lying = [f"remote {n}" + {7: " drop", 23: " lie"}.get(n % 40, "") for n in range(max(80, rows // 40))]
    frail = [f"frail {n}" + (" poison" if n == 11 else "") for n in range(30)]
    return [
        Trial("acme", "tiny", many, sink=True),
        Trial("acme", "remote", lying),
        Trial("acme", "frail", frail),
        Trial("bolt", "tiny", [f"of bolt {text}" for text in many[: rows // 2]]),
    ]


def submit(at: World, trial: Trial) -> str:
    lines = "\n".join(f'{{"id": {n}, "text": "{text}"}}' for n, text in enumerate(trial.texts))
    given = {"files": {"file": ("rows.jsonl", lines)}, "data": {"purpose": "user_data"}}
    trial.file = trial.file or at.ask("POST", "/v1/files", trial.tenant, **given).json()["id"]
    body: dict[str, Any] = {"model": trial.model, "prompt": "{text}", "source": {"file_id": trial.file}}
    body["options"] = {"max_tokens": 64}
    if trial.sink:
        body["sink"] = {"connection": "sink", "table": "answers", "key": "id"}
    key = {"Idempotency-Key": f"{trial.tenant} {trial.model}"}
    reply = at.ask("POST", "/v1/jobs", trial.tenant, json=body, headers=key)
    assert reply.status_code in (200, 201, 202), reply.text
    return str(reply.json()["id"])


class Chats:
    """Another tenant's chats, all the time: how long each took until it was answered, tried again after a 5xx."""

    def __init__(self, at: World) -> None:
        self.at, self.seconds, self.over = at, list[float](), threading.Event()
        self.thread = threading.Thread(target=self.go, daemon=True)
        self.thread.start()

    def go(self) -> None:
        number = 0
        while not self.over.wait(0.3):
            number += 1
            body = {"model": "tiny", "messages": [{"role": "user", "content": f"chat {number}"}]}
            began = time.monotonic()
            reply = self.at.ask("POST", "/v1/chat/completions", "bolt", json=body)
            if reply.status_code == 200:
                self.seconds.append(time.monotonic() - began)
                assert reply.json()["choices"][0]["message"]["content"] == f"chat {number}"

    def end(self) -> list[float]:
        self.over.set()
        self.thread.join(120)
        return sorted(self.seconds)


@dataclass
class Faults:
    """Throws each kind of fault in turn, in a random order, until `count` were thrown."""

    at: World
    scale: Scale
    thrown: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.choose = random.Random(SEED)

    def kinds(self) -> Iterator[str]:
        while True:
            yield from self.choose.sample(list(WORLD_FAULTS), len(WORLD_FAULTS))

    def throw_all(self) -> None:
        for kind in self.kinds():
            if self.thrown.total() == self.scale.faults:
                break
            time.sleep(self.choose.uniform(*self.scale.pauses))
            WORLD_FAULTS[kind](self.at, self.choose)
            self.thrown[kind] += 1
        self.at.settle()


def deliver(at: World, trial: Trial, seconds: float) -> None:
    """Wait until the results are in the sink. Where a delivery failed at a damaged part, the job is run again."""
    until = time.monotonic() + seconds
    while (sink := at.state(trial.job)["sink"])["status"] != "written":
        assert time.monotonic() < until, sink
        if sink["status"] == "failed":
            assert "/rerun" in sink["error"], sink
            rerun(at, trial)
        time.sleep(0.5)


def rerun(at: World, trial: Trial) -> None:
    trial.reruns += 1
    reply = at.ask("POST", f"/v1/jobs/{trial.job}/rerun", trial.tenant, json={})
    assert reply.status_code == 200, reply.text
    at.finished(trial.job, 300, tenant=trial.tenant)


def rows_of(at: World, trial: Trial) -> list[dict[str, Any]]:
    """The job's results. A part whose answers are lost is run again, as the refusal of the results says."""
    given = {"format": "jsonl", "details": True}
    reply = at.ask("GET", f"/v1/jobs/{trial.job}/results", trial.tenant, params=given)
    if reply.status_code == 409:
        assert "/rerun" in reply.text, reply.text
        rerun(at, trial)
        reply = at.ask("GET", f"/v1/jobs/{trial.job}/results", trial.tenant, params=given)
    assert reply.status_code == 200, reply.text
    return [json.loads(line) for line in reply.text.splitlines()]


def check(at: World, trial: Trial) -> None:
    found = rows_of(at, trial)
    errors = [row["completion_details"]["error"] or {} for row in found]
    assert [(r["id"], r["completion"], e.get("code")) for r, e in zip(found, errors, strict=True)] == trial.expected()
    usage = [row["completion_details"]["usage"] for row in found]
    sums = sa.select(of_class(ledger.c.tokens, "input", "cached_input"), of_class(ledger.c.tokens, "output"))
    with at.store.read() as connection:
        billed = connection.execute(sums.where(ledger.c.job == trial.job)).one()
    refused = [u for u, error in zip(usage, errors, strict=True) if error.get("code") == "usage_refused"]
    asked_again = [tokens(usage + refused * times) for times in range(trial.reruns + 1)]  # and paid again
    assert tuple(billed) in asked_again
    if trial.sink:
        with psycopg.connect(at.sink) as connection:
            told = connection.execute("SELECT id::int, completion FROM answers ORDER BY 1").fetchall()
        assert told == [(number, text) for number, text, _ in trial.expected()]


def tokens(usage: list[dict[str, int]]) -> tuple[int, int]:
    return sum(u["prompt_tokens"] for u in usage), sum(u["completion_tokens"] for u in usage)


def put_through(home: Path, model: Path, scale: Scale) -> None:
    with world(home, model, "64m", scale.away) as at:
        chats, faults, all_trials = Chats(at), Faults(at, scale), trials(scale.rows)
        for trial in all_trials:
            trial.job = submit(at, trial)
        faults.throw_all()
        for trial in all_trials:
            assert submit(at, trial) == trial.job  # under its idempotency key
            now, _ = at.finished(trial.job, scale.limit, tenant=trial.tenant)
            assert now["status"] == "completed", now
        deliver(at, all_trials[0], scale.limit)
        took = chats.end()
        for trial in all_trials:
            check(at, trial)
        assert faults.thrown.total() == scale.faults
        p95 = took[int(len(took) * 0.95)]
        print(f"{scale.faults} faults {dict(faults.thrown)}; {len(took)} chats of the other tenant, p95 {p95:.2f} s")


@pytest.mark.timeout(400)
def test_twenty_faults(tmp_path: Path, tiny_model: Path) -> None:
    put_through(tmp_path / "world", tiny_model, SHORT)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred_faults(tmp_path: Path, tiny_model: Path) -> None:
    put_through(tmp_path / "world", tiny_model, LONG)

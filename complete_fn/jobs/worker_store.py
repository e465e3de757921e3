"""`WorkerStore` has the heartbeats of worker processes, the speed of each model, and the amount of work that waits."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import sqlalchemy as sa

from complete_fn.engines.throughput import Throughput
from complete_fn.host import here, process_started
from complete_fn.jobs.job import JOB_OPEN, Job
from complete_fn.store.job_tables import jobs, paces, parts, workers
from complete_fn.store.store import Store, gone
from complete_fn.store.tables import summed

BEAT_SECONDS = 2.0
SILENT_SECONDS = 15.0  # a worker without a heartbeat for so long counts as gone
FORGET_SECONDS = 120.0  # a worker without a heartbeat for so long is deleted from the store


@dataclass(frozen=True, slots=True)
class ModelState:
    """The state of a model at a worker, with the worker's last measurements.

    `cold_seconds` is the time from a cold start to the first answer.
    """

    warm: bool
    tokens_per_second: float | None = None
    cold_seconds: float | None = None
    engine_pid: int | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker's heartbeat. Times in seconds of the epoch.

    Attributes:
        id: `host|pid|start of the process`, with which the names of its claims begin.
        address: the URL where the worker serves the OpenAI routes to the API; None if it serves none.
        busy_at: the last time at which the worker had work.
        in_flight: the number of parts that the worker holds.
    """

    id: str
    host: str
    pid: int
    began: float
    seen_at: float
    busy_at: float
    address: str | None = None
    draining: bool = False
    in_flight: int = 0
    models: Mapping[str, ModelState] = field(default_factory=dict)

    def warm(self, model: str) -> bool:
        return model in self.models and self.models[model].warm


@dataclass(frozen=True, slots=True)
class Load:
    """The work on one model: the number of parts that wait, and the estimated tokens of parts that wait or run."""

    queued_parts: int
    tokens: int


def own_id() -> str:
    """A name of this process, by which others on its machine can tell when the process is gone."""
    pid = os.getpid()
    return f"{here()}|{pid}|{process_started(pid) or 0.0}"


BEAT = [workers.c[f.name] for f in fields(Beat)]


class WorkerStore:
    """The worker processes that share one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def beat(self, beat: Beat) -> None:
        values = {f.name: getattr(beat, f.name) for f in fields(Beat)}
        values["models"] = json.dumps({name: asdict(state) for name, state in beat.models.items()})
        with self.store.write() as connection:
            if connection.execute(workers.update().where(workers.c.id == beat.id).values(values)).rowcount == 0:
                connection.execute(workers.insert().values(values))

    def leave(self, worker: str) -> None:
        with self.store.write() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker))

    def alive(self) -> list[Beat]:
        """The workers with a recent heartbeat, oldest first, those that drain included."""
        since = self.store.now() - SILENT_SECONDS
        with self.store.read() as connection:
            rows = connection.execute(sa.select(*BEAT).where(workers.c.seen_at > since).order_by(workers.c.began)).all()
        return [beat for row in rows if not process_gone(beat := beat_of(row))]

    def forget_gone(self) -> list[str]:
        """Remove workers whose process is gone, or that were silent for minutes; returns their ids."""
        before = self.store.now() - FORGET_SECONDS
        with self.store.read() as connection:
            beats = [beat_of(row) for row in connection.execute(sa.select(*BEAT))]
        dead = [b.id for b in beats if b.seen_at < before or process_gone(b)]
        if dead:
            with self.store.write() as connection:
                connection.execute(workers.delete().where(workers.c.id.in_(dead)))
        return dead

    # -- work and pace -------------------------------------------------------------------------------------------

    def load(self) -> dict[str, Load]:
        """The load of each model, by name, from all jobs that are not over."""
        waits = sa.case((parts.c.status == "queued", 1), else_=0)
        chosen = (
            sa.select(parts.c.model, summed(waits).label("queued"), summed(parts.c.tokens).label("tokens"))
            .join(jobs, jobs.c.id == parts.c.job)
            .where(parts.c.status.in_(("queued", "running")), jobs.c.status.in_(JOB_OPEN))
            .group_by(parts.c.model)
        )
        with self.store.read() as connection:
            return {r.model: Load(int(r.queued), int(r.tokens)) for r in connection.execute(chosen)}

    def tokens_before(self, found: Sequence[Job]) -> dict[str, int]:
        """Estimated tokens until each job is done, by its id. A job that waits counts all open work on its model."""
        by_model = self.open_tokens(parts.c.model, {job.model for job in found if job.started_at is None})
        by_job = self.open_tokens(parts.c.job, {job.id for job in found if job.started_at is not None})
        return {
            job.id: (by_model.get(job.model, 0) if job.started_at is None else by_job.get(job.id, 0)) for job in found
        }

    def open_tokens(self, column: sa.Column[str], values: set[str]) -> dict[str, int]:
        """Estimated tokens of the parts that wait or run, by those values of the column."""
        open_ones = column.in_(values) & parts.c.status.in_(("queued", "running"))
        chosen = sa.select(column, summed(parts.c.tokens)).where(open_ones).group_by(column)
        with self.store.read() as connection:
            return {str(value): int(tokens) for value, tokens in connection.execute(chosen)}

    def learn(self, measured: Mapping[str, Throughput]) -> None:
        """Note the speeds that this process measured. Values that it did not measure stay as they were."""
        with self.store.write() as connection:
            for model, pace in measured.items():
                known = {k: v for k, v in asdict(pace).items() if v is not None}
                if not known:
                    continue
                values = {**known, "at": self.store.now()}
                if connection.execute(paces.update().where(paces.c.model == model).values(values)).rowcount == 0:
                    connection.execute(paces.insert().values(model=model, **values))

    def paces(self, models: Iterable[str] | None = None) -> dict[str, Throughput]:
        chosen = sa.select(paces.c.model, paces.c.tokens_per_second, paces.c.cold_seconds)
        if models is not None:
            chosen = chosen.where(paces.c.model.in_(list(models)))
        with self.store.read() as connection:
            return {r.model: Throughput(r.tokens_per_second, r.cold_seconds) for r in connection.execute(chosen)}


def beat_of(row: sa.Row[tuple[object, ...]]) -> Beat:
    values = dict(row._mapping)
    values["models"] = {name: ModelState(**state) for name, state in json.loads(values["models"]).items()}
    return Beat(**values)


def process_gone(beat: Beat) -> bool:
    return beat.host == here() and gone(beat.pid, float(beat.id.rpartition("|")[2]))

"""`eta_seconds` estimates how long jobs will still take."""

from __future__ import annotations

from collections.abc import Sequence

from complete_fn.engines.throughput import Throughput
from complete_fn.jobs.job import Counts, Job
from complete_fn.service.engine_host import EngineHost

OWN_PACE = 0.05  # share of a job's rows done, from which its own pace predicts better than the pace of other jobs


def eta_seconds(engines: EngineHost, found: Sequence[tuple[Job, Counts]]) -> dict[str, float | None]:
    """Seconds left of each job by its id, with the start of a cold engine.

    None if the job is over or its model was never measured. Jobs without a pace of their own take that of their model,
    which is read for all of them together.
    """
    now = engines.state.store.now()
    own = {job.id: own_pace(job, counts, now) for job, counts in found if not job.over}
    others = [job for job, _ in found if job.id in own and own[job.id] is None]
    return {**{job.id: None for job, _ in found}, **own, **measured_pace(engines, others)}


def own_pace(job: Job, counts: Counts, now: float) -> float | None:
    """Seconds left at the job's own pace; None if too few of its rows are done."""
    worked = counts.done - job.nulls
    if job.started_at is None or worked <= OWN_PACE * (job.rows - job.nulls):
        return None
    return at_own_pace(now - job.started_at, worked, job.rows - counts.done)


def measured_pace(engines: EngineHost, found: Sequence[Job]) -> dict[str, float | None]:
    """Seconds left of each job by its id, at the measured pace of its model."""
    if not found:
        return {}
    workers, models = engines.state.workers, {job.model for job in found}
    beats, paces, tokens = workers.alive(), workers.paces(models), workers.tokens_before(found)
    warm = {model: sum(beat.warm(model) for beat in beats) + engines.is_warm(model) for model in models}
    return {
        job.id: at_measured_pace(tokens[job.id], paces.get(job.model, Throughput()), warm[job.model]) for job in found
    }


def at_own_pace(seconds: float, worked: int, left: int) -> float:
    return round(seconds / worked * left, 1)


def at_measured_pace(tokens: int, pace: Throughput, warm: int) -> float | None:
    """Seconds for `tokens` on so many `warm` workers; without one, on a worker that starts its engine first."""
    if not pace.tokens_per_second:
        return None
    start = 0.0 if warm else pace.cold_seconds or 0.0
    return round(start + tokens / pace.tokens_per_second / max(1, warm), 1)

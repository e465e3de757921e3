"""`eta_seconds` estimates how long a job will still take."""

from __future__ import annotations

from complete_fn.engines.throughput import Throughput
from complete_fn.jobs.job import Counts, Job
from complete_fn.service.engine_host import EngineHost

OWN_PACE = 0.05  # share of a job's rows done, from which its own pace predicts better than the pace of other jobs


def eta_seconds(engines: EngineHost, job: Job, counts: Counts) -> float | None:
    """Seconds left, with the start of a cold engine; None if the job is over or its model was never measured."""
    if job.over:
        return None
    state = engines.state
    worked = counts.done - job.nulls
    if job.started_at is not None and worked > OWN_PACE * (job.rows - job.nulls):
        return at_own_pace(state.store.now() - job.started_at, worked, job.rows - counts.done)
    warm = sum(beat.warm(job.model) for beat in state.workers.alive()) + engines.is_warm(job.model)
    pace = state.workers.paces([job.model]).get(job.model, Throughput())
    return at_measured_pace(state.workers.tokens_before(job), pace, warm)


def at_own_pace(seconds: float, worked: int, left: int) -> float:
    return round(seconds / worked * left, 1)


def at_measured_pace(tokens: int, pace: Throughput, warm: int) -> float | None:
    """Seconds for `tokens` on so many `warm` workers; without one, on a worker that starts its engine first."""
    if not pace.tokens_per_second:
        return None
    start = 0.0 if warm else pace.cold_seconds or 0.0
    return round(start + tokens / pace.tokens_per_second / max(1, warm), 1)

"""`Job` and `Part` describe the work of a service; two tables say which status may follow which."""

from __future__ import annotations

from dataclasses import dataclass

from complete_fn.errors import JobError

# A job that is over is queued again when its failed rows are run again (`rerun.py`).
# A job that is told to stop is `stopping` until no part of it runs. Then it gets the status in `ends_as`.
JOB_MOVES: dict[str, tuple[str, ...]] = {
    "queued": ("running", "stopping", "completed", "failed", "cancelled", "expired"),
    "running": ("stopping", "completed", "failed", "cancelled", "expired"),
    "stopping": ("failed", "cancelled", "expired"),
    "completed": ("queued",),
    "failed": ("queued",),
    "cancelled": ("queued",),
    "expired": ("queued",),
}
# A part goes back to `queued` when its lease runs out, its worker drains, or the engine failed.
PART_MOVES: dict[str, tuple[str, ...]] = {
    "queued": ("running", "cancelled", "failed"),
    "running": ("queued", "done", "cancelled", "failed"),
    "done": (),
    "cancelled": (),
    "failed": (),
}
JOB_OPEN = ("queued", "running", "stopping")
LEASE_SECONDS = 30.0
TRIES = 3  # tries of a part whose engine fails
STORE_TRIES = 7  # tries of a part whose files or answers cannot be read or written: they take two minutes in all


@dataclass(frozen=True, slots=True)
class Job:
    """Bulk work of one tenant. `kind` is `table` or `batch`; times in seconds of the epoch, money in 1e-9.

    `request` is the submitted specification as JSON, `nulls` counts the rows that need no answer, `bytes` what the job
    has in the service's storage.
    """

    id: str
    tenant: str
    user: str
    kind: str
    status: str
    ends_as: str | None
    model: str
    rows: int
    nulls: int
    max_cost_nano: int | None
    currency: str
    basis: str
    priority: int
    idempotency_key: str | None
    request: str
    query_tag: str | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    deadline: float | None
    error: str | None
    bytes: int = 0

    @property
    def over(self) -> bool:
        return self.status not in JOB_OPEN


@dataclass(frozen=True, slots=True)
class Part:
    """A token-bounded piece of a job: the unit of placement and retry.

    Attributes:
        options: options as JSON, for `parse_options`.
        tokens: estimated tokens of prompts and answers.
        shared: tokens that its first prompt has in common with the last prompt of the part before it.
        claim: the random name of the last claim. The store refuses commits under any other name: a worker whose lease
            was taken over can commit nothing, even after a failover that lost commits. None before the first claim.
        claimant: the process (`worker` without its last field) that claimed it last.
        tries: claims that ended with an error.
        result: the file of the answers in the job's folder, once the part has ended.
        failed: rows without an answer, once there is a result.
    """

    id: int
    job: str
    tenant: str
    number: int
    status: str
    model: str
    options: str
    rows: int
    tokens: int
    shared: int
    claim: str | None
    worker: str | None
    claimant: str | None
    lease_until: float
    tries: int
    result: str | None
    failed: int

    @property
    def name(self) -> str:
        """The name of the job under which `run` answers this part, so that another worker can resume it."""
        return f"{self.job}/{self.number}"


@dataclass(frozen=True, slots=True)
class Counts:
    """The progress of a job. Tokens and cost are the sums of its ledger lines, so they count committed slices only.

    `recomputed_tokens` counts the tokens that a part shares with the part before it, if another process ran that one.
    """

    done: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nano: int
    parts: int
    recomputed_tokens: int


def refuse_move(job: Job, status: str) -> None:
    """Refuse a change of status that `JOB_MOVES` does not have.

    Raises:
        JobError: A job of this status cannot become `status`.
    """
    if status not in JOB_MOVES[job.status]:
        raise JobError(f"Job {job.id} is {job.status}; it cannot become {status}.")

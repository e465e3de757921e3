"""`Work` is the state of one run: which distinct prompts have answers, and under which keys new ones are stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from complete_fn.engines.call import Call, answer_keys
from complete_fn.interrupts import end_if_abandoned
from complete_fn.planning import BatchPlan
from complete_fn.planning.field_order import rendered
from complete_fn.prompts.fields import has_fields
from complete_fn.prompts.options import CacheMode
from complete_fn.prompts.templates import unpack
from complete_fn.store.attempts import StoredAnswer
from complete_fn.store.store import Store
from complete_fn.text import to_texts
from complete_fn.types import Asker, Completion, Prompt

# Row errors that are not stored: their cause may be gone when the job is resumed, so the job asks these rows again.
ASKED_AGAIN = (
    "budget_exceeded",
    "cancelled",
    "engine_failed",
    "invalid_request",
    "timeout",
)


@dataclass
class Work:
    """m distinct prompts on their way to answers.

    Attributes:
        keys: [m] keys of reusable answers.
        job_keys: [m] keys that only this job can read, for answers that may not be reused; empty without a job.
        shared: whether answers may be reused (greedy sampling, and cache is not `off`).
        claimable: whether this run may take an answer that another run is computing (`shared`, cache not `refresh`).
        since: the earliest time (seconds of the epoch) of stored answers that may be reused; above 0 for `refresh`.
        found: [m] the answer, None while missing.
        reused: numbers of the prompts that the store answered.
        resumed: numbers among `reused` whose answers this job had computed itself, in an earlier attempt.
    """

    plan: BatchPlan
    who: Asker
    shared: bool
    keys: list[bytes]
    job_keys: list[bytes]
    since: float = 0.0
    found: list[Completion | None] = field(default_factory=list)
    reused: set[int] = field(default_factory=set)
    resumed: set[int] = field(default_factory=set)

    @property
    def claimable(self) -> bool:
        return self.shared and not self.since

    @property
    def completions(self) -> list[Completion]:
        return [c for c in self.found if c is not None]

    def missing(self) -> list[int]:
        return [n for n, c in enumerate(self.found) if c is None]

    def texts(self, numbers: list[int]) -> Iterator[tuple[int, str]]:
        """(number, prompt) of some distinct prompts."""
        rows = self.plan.first[numbers]
        return zip(numbers, to_texts(self.plan.gather.take(rows)), strict=True)

    def prompt(self, number: int, text: str) -> Prompt:
        """The prompt that the model gets for a planned text, its fields in the plan's order."""
        return rendered(self.plan, number, text) if has_fields(text) else unpack(text)

    def stored(self, number: int, completion: Completion) -> StoredAnswer | None:
        """The record to store of an answer: for all runs, or only for this job's resume; None to store nothing."""
        if self.shared and completion.error is None:
            return StoredAnswer(self.keys[number], completion)
        if completion.error is not None and completion.error.code in ASKED_AGAIN:
            return None
        return StoredAnswer(self.job_keys[number], completion, self.who.job) if self.job_keys else None

    def look_again(self, numbers: Any, store: Store) -> set[int]:
        """Take the answers that other runs have committed meanwhile; returns the numbers of their prompts."""
        wanted = {self.keys[n]: n for n in numbers}
        known = store.look_up(self.who.tenant, list(wanted), self.since)
        found = {wanted[key] for key in known}
        for key, (completion, _) in known.items():
            self.found[wanted[key]] = completion
        self.reused |= found
        return found


def known_answers(call: Call, plan: BatchPlan, store: Store, who: Asker, cache: CacheMode, ended: bool = False) -> Work:
    """The work of a run, filled with every stored answer that the run may use.

    Args:
        ended: The job `who.job` has ended. Answers of its attempts are its own all the same.
    """
    shared = call.sampling.greedy and cache != "off"
    keys: list[bytes] = []
    job_keys: list[bytes] = []
    if shared or who.job:
        fingerprint = call.fingerprint
        for low, texts in plan.texts():
            plain = answer_keys(fingerprint, texts)
            keys.extend(plain)
            if who.job:
                rows = plan.first[low : low + len(texts)].tolist()
                job_keys.extend(answer_keys(k, [f"{who.job}|{r}"])[0] for k, r in zip(plain, rows, strict=True))
    work = Work(plan, who, shared, keys, job_keys, found=[None] * len(plan.first))
    mine, began = store.unfinished(who.tenant, who.job, ended) if who.job else (set(), None)
    if cache == "refresh":
        work.since = began if began is not None else float("inf")
    if store.has_answers(who.tenant):
        fill(work, store, keys if shared else [], work.since, mine)
        fill(work, store, job_keys if mine else [], 0.0, mine)
    return work


def fill(work: Work, store: Store, keys: list[bytes], since: float, mine: set[int]) -> None:
    """Take the stored answers of `keys`. Those made by the attempts `mine` are this job's own and count as resumed."""
    step = 50_000
    for low in range(0, len(keys), step):
        end_if_abandoned()
        chosen = keys[low : low + step]
        known = store.look_up(work.who.tenant, chosen, since)
        for number, key in enumerate(chosen, low):
            if key in known and work.found[number] is None:
                completion, attempt = known[key]
                work.reused.add(number)
                if attempt in mine:  # this job paid for it
                    work.resumed.add(number)
                    completion = replace(completion, source="computed")
                work.found[number] = completion

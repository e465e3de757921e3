"""One query may need several runs at a time. The runs of one model go through its engine together.

A step of the engine has room for the prompts of one run and the tokens of another run's answers, and no run waits for
the last answers of the run before it. The run with the longest answers for its prompts starts first.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from complete_fn.engines.stoppable import EitherStop
from complete_fn.execution.answers import Answers
from complete_fn.interrupts import NextInterrupt, uninterrupted
from complete_fn.prompts.options import Options, parse_options
from complete_fn.session import Session

AT_ONCE = 4  # runs of one model


@dataclass(frozen=True)
class WantedRun:
    """A planned column of prompts, as `Session.complete` takes it, for one model with one set of options."""

    model: str
    prompts: Any
    options: Mapping[str, Any] | Options | None

    def decoding(self, session: Session) -> float:
        """The most tokens of an answer per byte of its prompt."""
        chosen = parse_options(self.options)
        limit = 1 if chosen.choices else chosen.sampling.max_tokens or session.model(self.model).default_max_tokens
        return float(limit * len(self.prompts) / max(1, self.prompts.nbytes))


def complete_together(session: Session, wanted: Sequence[WantedRun]) -> list[Answers]:
    """The answers of the runs, in the order of `wanted`. Models take turns, as each may need the whole device.

    Raises:
        CompleteError, KeyboardInterrupt: As `Session.complete`. The other runs stop too; their finished rows stay.
    """
    by_model: dict[str, list[int]] = {}
    for number, one in enumerate(wanted):
        by_model.setdefault(one.model, []).append(number)
    found: dict[int, Answers] = {}
    for numbers in by_model.values():
        if len(numbers) > 1:
            numbers.sort(key=lambda n: -wanted[n].decoding(session))
        found |= zip(numbers, complete_at_once(session, [wanted[n] for n in numbers]), strict=True)
    return [found[n] for n in range(len(wanted))]


def complete_at_once(session: Session, wanted: list[WantedRun]) -> list[Answers]:
    interrupt, failure = NextInterrupt(), threading.Event()
    stop = EitherStop(interrupt, failure)

    def run(one: WantedRun) -> Answers:
        if stop.is_set():
            raise KeyboardInterrupt
        return session.complete(one.model, one.prompts, one.options, planned=True, stop=stop)

    def run_all() -> list[Answers]:
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="complete-fn-run") as pool:
            runs = [pool.submit(run, one) for one in wanted]
            failed = next((r for r in wait(runs, return_when=FIRST_EXCEPTION).done if r.exception()), None)
            if failed is not None:
                failure.set()
                failed.result()
        return [r.result() for r in runs]

    return [run(wanted[0])] if len(wanted) == 1 else uninterrupted(run_all)

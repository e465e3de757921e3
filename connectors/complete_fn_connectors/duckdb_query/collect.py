"""In collect mode a query runs with NULL for each unknown answer, and the prompts it would have asked are noted."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from complete_fn.errors import CompleteError
from complete_fn.execution.answers import Answers
from complete_fn.execution.summary import Summary
from complete_fn.planning import BatchPlan, make_plan
from complete_fn.prompts.options import Options, parse_options
from complete_fn.text import restore_bytes, text_column
from complete_fn.types import Completion
from complete_fn_connectors.concurrent_runs import WantedRun, complete_together
from complete_fn_connectors.duckdb_query.dependencies import LimitWindow, Order
from complete_fn_connectors.functions import QuerySession

Phase = Literal["plan", "check", "collect"]
PENDING = Completion.failed("pending", "Not asked yet.")
Choice = Mapping[str, Any] | Options | None


class PlanTimeError(CompleteError):
    """A call was evaluated while DuckDB planned a query, when nothing is completed."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One model with one set of options. Two are equal if their `key` is."""

    model: str
    options: Choice

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Asked) and self.key == other.key

    @property
    def key(self) -> str:
        return f"{self.model}\n{self.parsed}"

    @property
    def parsed(self) -> Options:
        return self.options if isinstance(self.options, Options) else parse_options(self.options)

    def lenient(self) -> Choice:
        """The options without `strict`. While prompts are collected, a failed row is only noted."""
        if isinstance(self.options, Options):
            return replace(self.options, strict=False)
        return None if self.options is None else {k: v for k, v in self.options.items() if k != "strict"}


class Memory:
    """The answers of one query, with those of failed rows, which no store keeps. Safe to use from several threads."""

    def __init__(self) -> None:
        self.answers: dict[str, dict[str, Completion]] = {}
        self.lock = threading.Lock()

    def of(self, asked: Asked) -> dict[str, Completion]:
        with self.lock:
            return self.answers.setdefault(asked.key, {})

    def learn(self, asked: Asked, answers: Answers) -> None:
        known = self.of(asked)
        for low, texts in answers.plan.texts():
            known.update(zip(texts, answers.completions[low : low + len(texts)], strict=True))

    def give(self, known: dict[str, Completion], texts: list[str]) -> list[Completion]:
        """The answers of known prompts. An answer has its cost the first time only, so that costs add up to the
        bill."""
        with self.lock:
            found = [known[t] for t in texts]
            known.update({t: replace(c, source="cache") for t, c in zip(texts, found, strict=True)})
        return found


class Remembering:
    """Stands for the session in the final run: known answers come from memory, the others from the session.

    A call does not say which query it belongs to, so `memories` holds those of all queries that run now.
    """

    def __init__(self, session: QuerySession, memories: list[Memory]) -> None:
        self.session, self.memories = session, memories

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def complete(self, model: str, prompts: Any, options: Choice = None, **more: Any) -> Answers:
        asked = Asked(model, options)
        chosen = asked.parsed
        if not chosen.sampling.greedy:
            return self.session.complete(model, prompts, options, **more)
        plan = make_plan(prompts)
        texts = distinct_texts(plan)
        found = self.known(asked, texts)
        missing = [t for t in texts if t not in found]
        if missing:
            self.memories[-1].learn(asked, self.session.complete(model, texts_column(missing), options, planned=True))
            found |= self.known(asked, missing)
        completions = [found[t] for t in texts]
        rows = Summary(rows=len(plan.order) - len(missing), reused=len(plan.order) - len(missing))
        answers = Answers(plan, completions, self.session.model(model).prices, rows)
        if chosen.strict and any(c.error for c in completions):
            self.session.report_failures(count_failures(answers), True)
        return answers

    def known(self, asked: Asked, texts: list[str]) -> dict[str, Completion]:
        found: dict[str, Completion] = {}
        for memory in self.memories:
            known = memory.of(asked)
            here = [t for t in texts if t in known and t not in found]
            found.update(zip(here, memory.give(known, here), strict=True))
        return found


def count_failures(answers: Answers) -> Answers:
    """The answers with a summary that counts their failures."""
    counts: dict[str, int] = {}
    for copies, c in zip(answers.plan.copies().tolist(), answers.completions, strict=True):
        if c.error is not None:
            counts[c.error.code] = counts.get(c.error.code, 0) + copies
    summary = Summary(rows=len(answers.plan.prompts))
    summary.failed.update(counts)
    return replace(answers, summary=summary)


@dataclass
class Note:
    """The unknown prompts of one call of a site. `rows` counts the rows that need them."""

    site: int
    asked: Asked
    texts: list[str]
    rows: int


@dataclass
class Round:
    """What one run of a query in collect mode found.

    Attributes:
        notes: In the order of the calls. Below a LIMIT, notes end where more rows cannot matter.
        unknown: Sites at which an answer was missing.
        blocked: Sites whose answers may not be reused, so that they cannot be collected.
        rows: Rows of all calls, by site.
        met: All prompts by site, model and options, known ones too; filled for `explain` and `estimate` only.
    """

    notes: list[Note] = field(default_factory=list)
    unknown: set[int] = field(default_factory=set)
    blocked: set[int] = field(default_factory=set)
    rows: dict[int, int] = field(default_factory=dict)
    met: dict[int, dict[Asked, set[str]]] = field(default_factory=dict)
    passed: int = 0


@dataclass(frozen=True)
class Constant:
    """A call with constant arguments only, which DuckDB evaluates while it plans, and the prompts whose answers it
    lacks."""

    site: int
    asked: Asked
    texts: list[str]

    @property
    def is_reusable(self) -> bool:
        return self.asked.parsed.sampling.greedy


class Collector:
    """Notes the prompts that the sites of one query would ask.

    Attributes:
        phase: `plan`: DuckDB only plans, a call that lacks an answer is refused and becomes one of `constants`;
            `check`: DuckDB only plans, and its plan is not used: what is not known is NULL; `collect`: a round.
        constants: calls that were refused in the phase `plan`, in DuckDB's order.
        fault: The last error of a call. The call itself gave NULL, as an error would abort the user's transaction.
    """

    def __init__(self, session: QuerySession, memory: Memory) -> None:
        self.session, self.memory = session, memory
        self.order = Order()
        self.phase: Phase = "plan"
        self.constants: list[Constant] = []
        self.counting = False  # whether known prompts are noted too
        self.fault: CompleteError | None = None
        self.round = Round()
        self.noted: dict[tuple[int, str], set[str]] = {}
        self.filled: dict[int, int] = {}
        self.lock = threading.Lock()

    def begin(self) -> Round:
        self.round, self.noted, self.filled = Round(), {}, {}
        return self.round

    @contextmanager
    def checking(self) -> Iterator[None]:
        self.phase = "check"
        try:
            yield
        finally:
            self.phase = "plan"

    def at(self, site: int) -> Placeholders:
        return Placeholders(self, site)

    def note(self, site: int, asked: Asked, plan: BatchPlan, missing: list[str]) -> None:
        rows = int(plan.copies().sum()) if missing else 0
        with self.lock:
            self.round.unknown.add(site)
            window = self.order.windows.get(site)
            if window is not None and self.filled.get(id(window), 0) > window.need:
                return
            seen = self.noted.setdefault((site, asked.key), set())
            fresh = [t for t in missing if t not in seen]
            seen.update(fresh)
            if window is not None:
                self.filled[id(window)] = self.filled.get(id(window), 0) + rows
            self.round.notes.append(Note(site, asked, fresh, rows))


class Placeholders:
    """Stands for the session at one site in collect mode: gives known answers, and NULL for unknown ones."""

    def __init__(self, collector: Collector, site: int) -> None:
        self.collector, self.site = collector, site

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collector.session, name)

    def complete(self, model: str, prompts: Any, options: Choice = None, **_: Any) -> Answers:
        asked = Asked(model, options)
        prices = self.collector.session.model(model).prices
        known = self.collector.memory.of(asked)
        plan = make_plan(prompts)
        texts = distinct_texts(plan)
        if self.collector.phase != "collect":
            missing = [t for t in texts if t not in known]
            if missing and self.collector.phase == "plan":
                self.collector.constants.append(Constant(self.site, asked, missing))
                raise PlanTimeError
            return Answers(plan, [known.get(t, PENDING) for t in texts], prices, Summary())
        round_ = self.collector.round
        with self.collector.lock:
            round_.rows[self.site] = round_.rows.get(self.site, 0) + len(plan.order)
        if texts and not asked.parsed.sampling.greedy:
            round_.unknown.add(self.site)
            round_.blocked.add(self.site)
            return Answers(plan, [PENDING] * len(texts), prices, Summary())
        missing = [t for t in texts if t not in known]
        if self.collector.counting:
            round_.met.setdefault(self.site, {}).setdefault(asked, set()).update(texts)
        if missing:
            self.collector.note(self.site, asked, plan, missing)
        return Answers(plan, [known.get(t, PENDING) for t in texts], prices, Summary())


def distinct_texts(plan: BatchPlan) -> list[str]:
    return [t for _, texts in plan.texts() for t in texts]


def texts_column(texts: list[str]) -> Any:
    """Planned texts as a column, with the bytes that they were read from."""
    return text_column(texts, restore_bytes)


@dataclass
class Batch:
    """The prompts that a round asks, by model and options, and their sites.

    `held_back`: whether the next round may find more prompts.
    """

    prompts: dict[str, tuple[Asked, list[str]]] = field(default_factory=dict)
    sites: set[int] = field(default_factory=set)
    held_back: bool = False


def choose_prompts(round_: Round, order: Order) -> Batch:
    """The prompts of a round that depend on no placeholder.

    Below a LIMIT, only the prompts that it needs in any case: calls of the first site that lacked an answer, until
    their rows together with the rows that came through would fill the LIMIT.
    """
    batch = Batch()
    windows: dict[int, tuple[int, int]] = {}  # id of the window -> (its site, rows taken)
    for note in round_.notes:
        waits = order.waits.get(note.site, set())
        window = order.windows.get(note.site)
        if (
            note.site in order.unranked
            or note.site in round_.blocked
            or waits & needed_outside(round_.unknown, window, order)
        ):
            batch.held_back = True
            continue
        if window is not None and not fits_window(window, note, windows, round_.passed):
            batch.held_back = True
            continue
        batch.sites.add(note.site)
        batch.prompts.setdefault(note.asked.key, (note.asked, []))[1].extend(note.texts)
    batch.held_back |= bool(round_.unknown - batch.sites)
    batch.held_back |= any(site in order.windows for site in batch.sites)
    batch.held_back |= any(waits & batch.sites for site, waits in order.waits.items() if site not in order.unranked)
    return batch


def needed_outside(unknown: Iterable[int], window: LimitWindow | None, order: Order) -> set[int]:
    """The unknown sites outside of a window. Within one window the order of the calls decides, not the plan."""
    return {s for s in unknown if window is None or order.windows.get(s) is not window}


def fits_window(window: LimitWindow, note: Note, windows: dict[int, tuple[int, int]], passed: int) -> bool:
    site, taken = windows.get(id(window), (note.site, 0))
    if site != note.site or (taken and taken + (passed if window.outermost else window.need) >= window.need):
        return False
    windows[id(window)] = (site, taken + note.rows)
    return True


class Functions(Protocol):
    """The registration of the functions, as far as the planner needs it."""

    session: QuerySession
    answering: list[Memory]

    @property
    def planned_names(self) -> dict[str, str]: ...


def ask_batch(collector: Collector, batch: Batch) -> None:
    """Ask all prompts of a round, with one plan for each model and set of options."""
    everything = list(batch.prompts.values())
    wanted = [WantedRun(a.model, texts_column(list(dict.fromkeys(texts))), a.lenient()) for a, texts in everything]
    answers = complete_together(collector.session, wanted)
    for (asked, _), answered in zip(everything, answers, strict=True):
        collector.memory.learn(asked, answered)

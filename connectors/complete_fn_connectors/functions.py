"""`complete` and its variants over Arrow columns, and `QuerySession`, the session that answers them.

DuckDB and Polars both call these functions.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from complete_fn.engines.catalogue import Model
from complete_fn.engines.stoppable import Stop
from complete_fn.errors import EngineError, InputError, RequestError
from complete_fn.execution.answers import DETAILS, Answers
from complete_fn.progress import Progress, Quiet
from complete_fn.prompts.options import Options
from complete_fn.session import Session, warn
from complete_fn.spending.budget import NO_BRAKE, Brake
from complete_fn_connectors.arrow import CallGroup, by_group, groups, is_text, one_array, prompt_column, prompt_structs
from complete_fn_connectors.query_progress import QueryBar
from complete_fn_connectors.sql_functions import FUNCTIONS

VECTOR = 2048  # rows of a full call by DuckDB; after a full call the same query probably makes another
PAUSE = 0.25  # seconds without a call, after which the next call counts as one of another query
LOUD, WITHIN = 5, 1.0  # the most warnings, in so many seconds


class QuerySession(Session):
    """A session that a query engine calls in pieces, on any thread.

    It warns of failed rows at the first piece of a query, and again each time their number has grown tenfold.
    """

    def __init__(self, *, task_model: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.task_model = task_model
        self.counting = threading.Lock()
        self.running, self.ended, self.full = 0, 0.0, False
        self.failures: Counter[str] = Counter()
        self.warn_at = 1
        self.bars: dict[str, QueryBar] = {}
        self.warnings: deque[float] = deque([-WITHIN] * LOUD, LOUD)

    @contextmanager
    def braked(self, max_cost: Any, max_total_tokens: int | None) -> Iterator[None]:
        """Apply these caps, besides the session's own, to all prompts that the session gets inside this context.

        Raises:
            InvalidOptionError: `max_cost` is no amount, or `max_total_tokens` no whole number.
            InputError: Another query of the session has caps of its own.
        """
        brake = Brake.of(max_cost, max_total_tokens)
        if not brake:
            yield
            return
        try:
            with self.counting:
                if self.brake:
                    raise InputError(
                        "Another query is running with a max_cost or max_total_tokens of its own. Wait for it, or "
                        "register another connection."
                    )
                self.brake = brake
            yield
        finally:
            if self.brake is brake:
                self.brake = NO_BRAKE

    def bar(self, model: Model, rows: int) -> Progress:
        """One bar for all pieces of a query, shown if a person is looking."""
        if isinstance(super().bar(model, rows), Quiet):
            return Quiet()
        with self.counting:
            return self.bars.setdefault(model.name, QueryBar(model.name))

    def complete(
        self,
        model: str,
        prompts: Any,
        options: Mapping[str, Any] | Options | None = None,
        job: str | None = None,
        planned: bool = False,
        stop: Stop | None = None,
    ) -> Answers:
        with self.counting:
            if self.running == 0 and (not self.full or time.monotonic() - self.ended > PAUSE):
                self.failures, self.warn_at = Counter(), 1
            self.running += 1
            self.full = len(prompts) >= VECTOR
        try:
            return super().complete(model, prompts, options, job, planned, stop)
        finally:
            with self.counting:
                self.running, self.ended = self.running - 1, time.monotonic()

    def report_failures(self, answers: Answers, strict: bool) -> None:
        if strict:
            super().report_failures(answers, strict)
        with self.counting:
            self.failures += answers.summary.failed
            total, counts = self.failures.total(), dict(self.failures)
            if total < self.warn_at or time.monotonic() - self.warnings[0] < WITHIN:
                return
            self.warn_at = 10 * total
            self.warnings.append(time.monotonic())
        first = next(c.error for c in answers.completions if c.error is not None)
        listed = ", ".join(f"{n:,} {code}" for code, n in counts.items())
        warn(
            f"Rows without an answer so far: {total:,} ({listed}). One: {first.message} complete_details() shows each."
        )

    def take_summary(self) -> str:
        """One line that sums up all runs since the last call of this function."""
        with self.lock:
            summary, self.summary = self.summary, type(self.summary)()
        return summary.line()


def answer_rows(
    session: Session,
    columns: tuple[Any, ...],
    pick: Callable[[Answers, CallGroup], Any],
    kind: Any,
    lenient: bool = False,
) -> Any:
    """[n] values of `kind` for the columns model, prompt and perhaps options.

    Args:
        pick: makes the values from the answers of a group.
        lenient: A query fault gives NULL with a warning, and is not raised.
    """
    if len(columns) not in (2, 3):
        raise InputError(f"{len(columns)} arguments were given; write {FUNCTIONS['complete'].form}.")
    length = len(columns[1])

    def answer(group: CallGroup) -> Any:
        chosen = prompts if not has_reordered_fields(group) else prompt_column(columns[1], reorder_fields=True)
        rows = chosen if group.rows is None else chosen.take(pa.array(group.rows))
        try:
            return pick(session.complete(group.model, rows, group.options, planned=True), group)
        except (RequestError, EngineError) as error:
            return null_or_raise(error, len(rows), kind, lenient)

    try:
        prompts = prompt_column(columns[1])
        found = list(groups(columns[0], columns[2] if len(columns) == 3 else None))
    except RequestError as error:
        return null_or_raise(error, length, kind, lenient)
    return by_group(length, found, answer, kind)


def has_reordered_fields(group: CallGroup) -> bool:
    return isinstance(group.options, Mapping) and group.options.get("reorder_fields") is True


def null_or_raise(error: Exception, length: int, kind: Any, lenient: bool) -> Any:
    if not lenient:
        raise error
    warn(f"Rows that are NULL because the query is at fault: {length:,}. {error}")
    return pa.nulls(length, kind)


def complete(session: Session, *columns: Any) -> Any:
    """[n] large_string: the answers; NULL for a NULL prompt or model and for a row that failed."""
    return answer_rows(session, columns, lambda a, _: a.text, pa.large_string())


def try_complete(session: Session, *columns: Any) -> Any:
    """As `complete`, and NULL instead of an error where the query itself is at fault."""
    return answer_rows(session, columns, lambda a, _: a.text, pa.large_string(), lenient=True)


def complete_details(session: Session, *columns: Any) -> Any:
    """[n] DETAILS: value, error, finish_reason, usage, cost, source, scores and field_order of each row."""
    return answer_rows(session, columns, lambda a, _: a.details, DETAILS)


def prompt(session: Session, *columns: Any) -> Any:
    """[n] structs of a template and its fields. The text of the prompt is made from them later."""
    return prompt_structs(list(columns))


def count_tokens(session: Session, *columns: Any) -> Any:
    """[n] int64: tokens of each text by the model's own tokenizer; NULL for NULL.

    Raises:
        InputError: The column `text` is not text.
        UnknownModelError: The catalogue has no such model.
    """
    if len(columns) != 2:
        raise InputError(f"{len(columns)} arguments were given; write {FUNCTIONS['count_tokens'].form}.")
    texts = one_array(columns[1])
    if not (is_text(texts.type) or pa.types.is_null(texts.type)):
        raise InputError(f"count_tokens(model, text): the text is {texts.type}. Cast it: CAST(x AS VARCHAR).")

    def count(group: CallGroup) -> Any:
        values = (texts if group.rows is None else texts.take(pa.array(group.rows))).to_pylist()
        numbers = iter(session.count_tokens(group.model, [v for v in values if v is not None]))
        return pa.array([None if v is None else next(numbers) for v in values], pa.int64())

    return by_group(len(texts), list(groups(columns[0], None)), count, pa.int64())

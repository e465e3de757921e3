"""DuckDB, Polars, the shell and Python code ask through a `Session`: settings, engines, store, budget and summary."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from complete_fn.engines.base import Engine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model, find_model, load_catalogue, parse_prices
from complete_fn.engines.instructions import advice_for
from complete_fn.engines.pool import at_engine, engine_for
from complete_fn.engines.stoppable import EitherStop, Stop, StoppableEngine
from complete_fn.errors import InvalidOptionError, RowFailedError
from complete_fn.estimates.estimate import Estimate, estimate
from complete_fn.execution.admission import Tools
from complete_fn.execution.answers import Answers
from complete_fn.execution.run_state import known_answers
from complete_fn.execution.runner import run
from complete_fn.execution.summary import Summary
from complete_fn.host import renew_in_child
from complete_fn.interrupts import NextInterrupt, off_main
from complete_fn.ledger.pruning import prune
from complete_fn.logs import printable
from complete_fn.planning import make_plan
from complete_fn.progress import Progress, Quiet, progress_for
from complete_fn.prompts.options import CacheMode, Options, parse_options
from complete_fn.prompts.templates import escaped, plain_column
from complete_fn.settings import load_settings
from complete_fn.spending.budget import NO_BRAKE, Budget
from complete_fn.spending.session_budgets import SessionBudgets
from complete_fn.store.store import Store
from complete_fn.types import Asker, Completion


class CompletionWarning(UserWarning):
    """Warns of rows without an answer, or of a prompt that the model was not made for."""


def warn(text: str) -> None:
    """Warn, and show the line of the caller's own code if it is on this thread's stack."""
    level = 1
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith("complete_fn"):
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(text, "\n\t"), CompletionWarning, stacklevel=level)


class Session:
    """Answers columns of prompts with one state and, if set, one budget.

    Args:
        engine: a URL of an OpenAI-compatible server or an `Engine` object that answers for every model; None takes
            each model's own.
        home: folder of the state; None takes COMPLETE_FN_HOME or the platform's user data folder.
        models_file: a TOML file over the built-in catalogue; None takes COMPLETE_FN_MODELS or the config folder's.
        prices: what `engine` takes per million tokens, as in models.toml: {"input": 0.15, "output": 0.6, "currency":
            "EUR"}; None takes those of the catalogue's entry.
        max_cost: never spend more than this in all, in the catalogue's currency; None sets no cap. A model whose prices
            are not known is refused under a cap.
        max_total_tokens: never use more tokens than this in all, prompts and answers; None sets no cap.
        progress: show a bar; None shows one when a person is looking.
    """

    def __init__(
        self,
        *,
        engine: Engine | str | None = None,
        prices: Mapping[str, Any] | None = None,
        home: Path | str | None = None,
        models_file: Path | str | None = None,
        max_cost: Any = None,
        max_total_tokens: int | None = None,
        who: Asker | None = None,
        progress: bool | None = None,
    ) -> None:
        self.settings = load_settings(home, models_file)
        self.engine = engine
        self.prices = None if prices is None else parse_prices(prices, "Beside engine")
        if prices is not None and engine is None:
            raise InvalidOptionError("prices are those of an engine: give engine= too, or write them into models.toml.")
        self.who = who or Asker()
        self.budgets = SessionBudgets(max_cost, max_total_tokens)
        self.brake = NO_BRAKE
        self.progress = progress
        self.summary = Summary()
        self.lock = threading.Lock()
        renew_in_child(self)
        self.opened: Store | None = None
        self.warned: set[str] = set()  # models whose advice was given

    @property
    def store(self) -> Store:
        with self.lock:
            if self.opened is None:
                self.opened = Store(self.settings.store)
                prune(self.opened, self.settings.cache_gib, self.settings.cache_days)
            return self.opened

    def model(self, name: str) -> Model:
        """The catalogue's entry of this name. If the session has an engine of its own, any name is accepted."""
        if self.engine is not None and isinstance(name, str) and name:
            found = load_catalogue(self.settings.models_file).get(name)
            model = at_engine(found or Model(name=name, checkpoint=name), self.engine)
            return model if self.prices is None else replace(model, prices=self.prices)
        return find_model(name, self.settings.models_file)

    def engine_of(self, model: Model) -> Engine:
        if self.engine is not None and not isinstance(self.engine, str):
            return self.engine
        return engine_for(model, self.settings)

    def complete(
        self,
        model: str,
        prompts: Any,
        options: Mapping[str, Any] | Options | None = None,
        job: str | None = None,
        planned: bool = False,
        stop: Stop | None = None,
    ) -> Answers:
        """Answer a column of prompts.

        Args:
            prompts: Arrow array of strings, or a Python sequence of strings and None.
            options: see `options.parse_options`.
            job: a name under which an interrupted run is resumed, also where answers may not be reused; call
                `end_job` when the results are safe. What its earlier attempts spent counts against `max_cost`.
            planned: the column is large_string as `prompts.render_column` or `pack_messages` make it.
            stop: ends the run as Ctrl-C does.

        Raises:
            RequestError: The model is unknown or an option invalid; nothing was run.
            RowFailedError: A row failed and the option `strict` is on.
            EngineError, StoreError: See `runner.run`.
            KeyboardInterrupt: The user pressed Ctrl-C; finished rows are kept.
        """
        chosen = parse_options(options)
        found = self.model(model)
        column = prompts if planned else escaped(plain_column(prompts))
        self.advise(found, column)
        interrupt = NextInterrupt()  # made on this thread: the run's own thread might begin to listen too late
        until = interrupt if stop is None else EitherStop(interrupt, stop)
        answers = self.answer(Call.of(found, chosen), column, job, chosen.cache, until)
        with self.lock:
            self.summary = self.summary + answers.summary
        if answers.summary.failed:
            self.report_failures(answers, chosen.strict)
        return answers

    @off_main
    def answer(self, call: Call, column: Any, job: str | None, cache: CacheMode, stop: Stop) -> Answers:
        brake = self.brake  # another thread may change it meanwhile
        money, tokens = self.caps_of(call.model, job)
        bar = self.bar(call.model, len(column))
        if brake.money is not None:
            brake.money.count_in(call.model)
        why = "the query was interrupted; finished rows are kept"
        engine = StoppableEngine(self.engine_of(call.model), stop, KeyboardInterrupt, why)
        tools = Tools(engine, self.store, money, bar, tokens, brake, pause=engine.pause)
        return run(call, column, tools, replace(self.who, job=job), cache)

    @off_main
    def known(
        self, model: str, prompts: Any, options: Mapping[str, Any] | Options | None = None
    ) -> dict[str, Completion]:
        """The stored answers among a planned column of prompts, by prompt. Nothing is asked."""
        chosen = parse_options(options)
        call = Call.of(self.model(model), chosen)
        plan = make_plan(prompts, mergeable=chosen.sampling.greedy)
        work = known_answers(call, plan, self.store, self.who, chosen.cache)
        numbers = sorted(work.reused)
        return {text: found for n, text in work.texts(numbers) if (found := work.found[n]) is not None}

    @off_main
    def estimate(
        self,
        model: str,
        prompts: Any,
        options: Mapping[str, Any] | Options | None = None,
        job: str | None = None,
        planned: bool = False,
    ) -> Estimate:
        """An estimate of `complete` with the same arguments. Asks no model, starts no engine.

        Raises:
            RequestError: As `complete`.
        """
        chosen = parse_options(options)
        call = Call.of(self.model(model), chosen)
        column = prompts if planned else escaped(plain_column(prompts))
        who, caps = replace(self.who, job=job), self.budgets
        return estimate(call, column, self.store, who, chosen.cache, caps.money, caps.tokens)

    def bar(self, model: Model, rows: int) -> Progress:
        """The bar that shows the progress of a run of so many rows; `Quiet` if none is shown."""
        return Quiet() if rows < 2 else progress_for(model.name, self.progress)

    def caps_of(self, model: Model, job: str | None) -> tuple[Budget | None, Budget | None]:
        """The session's caps on money and tokens, less what earlier attempts of an unfinished job have spent of them.

        Raises:
            InvalidOptionError: The model is priced in another currency than the session's first model.
        """
        return self.budgets.of_run(model, job, self.store, self.who.tenant)

    def report_failures(self, answers: Answers, strict: bool) -> None:
        failed = answers.summary.failed
        counts = ", ".join(f"{n:,} {code}" for code, n in failed.items())
        first = next(c.error for c in answers.completions if c.error is not None)
        text = (
            f"{failed.total():,} of {answers.summary.rows:,} rows have no answer ({counts}); the first: {first.message}"
        )
        if strict:
            raise RowFailedError(text)
        warn(f"{text} The details show each.")

    def advise(self, model: Model, prompts: Any) -> None:
        """Warn once for each model if prompts are not of the kind that the model was made for."""
        advice = None if model.name in self.warned else advice_for(model, prompts)
        if advice is not None:
            self.warned.add(model.name)
            warn(advice)

    def count_tokens(self, model: str, texts: list[str]) -> list[int]:
        """Tokens of each text by the model's own tokenizer."""
        return self.engine_of(self.model(model)).count_tokens(texts)

    @off_main
    def end_job(self, job: str) -> None:
        """Delete the answers that were kept only for the job's resume. Call it when the job's results are safe."""
        self.store.end_job(self.who.tenant, job)

    def after_fork(self) -> None:
        self.lock = threading.Lock()
        self.brake = NO_BRAKE

    def close(self) -> None:
        """Close the store of answers and ledger."""
        with self.lock:
            if self.opened is not None:
                self.opened.close()
                self.opened = None

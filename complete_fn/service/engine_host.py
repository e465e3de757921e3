"""`EngineHost` runs prompts on the engines of one process of a service, and closes idle engines. It knows no HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from complete_fn.engines.base import Engine
from complete_fn.engines.call import Call
from complete_fn.engines.catalogue import Model
from complete_fn.engines.pool import engine_for, let_go
from complete_fn.engines.slots import EngineRoom, usual_engines
from complete_fn.engines.stoppable import Stop, StoppableEngine
from complete_fn.engines.throughput import Pace, PacedEngine, Throughput, Watch
from complete_fn.errors import StoreError
from complete_fn.execution.admission import Tools
from complete_fn.execution.answers import Answers
from complete_fn.execution.listener import Tell
from complete_fn.execution.runner import run
from complete_fn.history.device_time import note_device_time
from complete_fn.jobs.worker_store import ModelState
from complete_fn.logs import log_failure
from complete_fn.prompts.options import CacheMode
from complete_fn.service.state import ServiceState
from complete_fn.spending.shared_budget import Cap, SharedBudget
from complete_fn.types import Asker


class EngineHost:
    """Completes prompts on the models' engines, within the service's state. Safe to use from several threads.

    Args:
        state: The service's state; `close` closes it too.
        idle_seconds: An engine is closed after so long without work.
        engine_home: The folder of the sockets of this process's engines. None takes the state's `home`: the process
            shares engines with all processes there.
    """

    def __init__(self, state: ServiceState, idle_seconds: float = 300.0, engine_home: Path | None = None) -> None:
        self.state = state
        self.idle_seconds = idle_seconds
        self.engine_settings = replace(state.settings, home=engine_home or state.settings.home)
        self.lock = threading.Lock()
        self.paces: dict[str, Pace] = {}
        self.room = EngineRoom(state.settings.engines or usual_engines(), self.unload, self.start_seconds)
        self.learnt: dict[str, Throughput] = {}
        self.busy_at = self.state.store.now()

    def engine_of(self, model: Model) -> Engine:
        return self.state.engine or engine_for(model, self.engine_settings)

    def complete(
        self,
        call: Call,
        prompts: Any,
        who: Asker,
        stop: threading.Event | None = None,
        cache: CacheMode = "on",
        cap: Cap | None = None,
        priority: int = 0,
        tell: Tell | None = None,
        watch: Watch | None = None,
    ) -> Answers:
        """Call `runner.run` within the tenant's budget of the day and, if given, `cap`; `stop` ends the run.

        `tell` gets the text as it is made; `watch` counts the answered rows.

        Raises:
            Stopped: `stop` was set; committed slices stay.
            EngineError, StoreError: See `runner.run`.
        """
        state = self.state
        caps = [c for c in (cap, state.day_cap(who.tenant, call.model)) if c is not None]
        budget = SharedBudget(state.store, who.tenant, caps) if caps else None
        stop = stop or threading.Event()
        with self.at_work(call.model, stop) as (opened, pace):
            stoppable = StoppableEngine(opened, stop)
            engine = PacedEngine(stoppable, pace, watch or Watch())
            tools = Tools(engine, state.store, budget, priority=priority, tell=tell, pause=stoppable.pause)
            return run(call, prompts, tools, who, cache)

    @contextmanager
    def at_work(self, model: Model, stop: Stop) -> Iterator[tuple[Engine, Pace]]:
        """The model's engine, which is not closed inside this context.

        Raises:
            Stopped: `stop` was set while the engine waited for a slot.
        """
        with self.room.place(model.name, stop, bounded=model.engine != "http" and self.state.engine is None):
            with self.lock:
                pace = self.paces.setdefault(model.name, Pace())
            pace.begin()
            try:
                yield self.engine_of(model), pace
            finally:
                pace.end()
                self.busy_at = self.state.store.now()

    def start_seconds(self, model: str) -> float | None:
        return self.paces[model].cold_seconds if model in self.paces else None

    def is_warm(self, model: str) -> bool:
        """Whether the model's engine has started in this process."""
        return model in self.paces and self.paces[model].warm

    def unload(self, name: str) -> None:
        """Close the model's engine. No run may use it.

        A failure is logged, not raised: the caller that waits for the slot did not cause it.
        """
        model = self.state.models().get(name)
        if model is None or self.state.engine is not None:
            return
        engine = self.engine_of(model)
        if name in self.paces:
            self.paces[name].cool()
        steps: tuple[Callable[[], object], ...] = (
            lambda: note_device_time(self.state.store, engine, model),
            lambda: let_go(engine),
        )
        for step in steps:
            try:
                step()
            except Exception as error:
                log_failure(f"unloading {name}", error)
        self.state.queue.bell.ring()  # the model that waits for the slot has more parts

    def model_states(self) -> dict[str, ModelState]:
        """The state of each model that this process has run, by name."""
        models, found = self.state.models(), {}
        for name, pace in list(self.paces.items()):
            engine = self.engine_of(models[name]) if pace.warm and name in models else None
            measured = pace.measured
            pid = getattr(engine, "pid", None)
            found[name] = ModelState(pace.warm, measured.tokens_per_second, measured.cold_seconds, pid)
        return found

    def upkeep(self) -> None:
        """Note how fast the engines are, and close idle engines. Cheap; called every few seconds."""
        measured = {name: pace.measured for name, pace in list(self.paces.items())}
        if measured != self.learnt:
            self.state.workers.learn(measured)
            self.learnt = measured
        self.room.vacate_idle(self.idle_seconds)

    def close(self) -> None:
        models = self.state.models()
        for name, pace in list(self.paces.items()):
            if pace.warm and name in models:
                with suppress(StoreError):  # the process ends also if the database is away
                    note_device_time(self.state.store, self.engine_of(models[name]), models[name])
        self.state.close()

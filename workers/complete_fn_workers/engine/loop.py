"""The loop of the engine's child process reads messages, admits rows, does one step of vLLM, and sends finished rows.

vLLM runs in this process, in its main thread. Rows of all connections share the one engine and its running batch.
"""

from __future__ import annotations

import contextlib
import os
import platform
import queue
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from complete_fn.capacity.decoder_work import DecoderWork
from complete_fn.capacity.flops import skipped_share
from complete_fn_workers.engine.connections import EngineConnection, EngineConnections
from complete_fn_workers.engine.machine import available_cores
from complete_fn_workers.engine.steps.kv_window import HeldRow, KVWindow
from complete_fn_workers.engine.steps.metering import NOTHING, Charge, StepMeter
from complete_fn_workers.engine.steps.step_limit import StepLimit
from complete_fn_workers.engine.vllm_internals import EngineFacts, read_engine, requests_under_way
from complete_fn_workers.engine.wire import RowRefused

BEAT_SECONDS = 1.0


class WaitingRow(NamedTuple):
    """A row that waits for admission."""

    connection: EngineConnection
    number: int
    prompt: Any
    sampling: Any


class ReadyRow(NamedTuple):
    """A row with its request to the engine, which has its tokens and limits."""

    row: WaitingRow
    request: Any


@dataclass(slots=True)
class AdmittedRow:
    """A row that vLLM computes. `told`: how many characters of its text were sent already."""

    connection: EngineConnection
    number: int
    request: Any
    internal_id: str
    priority: int
    told: int = 0

    @property
    def bulk(self) -> bool:
        return self.priority >= 0


class Isolation:
    """Connections that ask to be alone get the engine in turns: until one closes, no row of another is admitted."""

    def __init__(self) -> None:
        self.asking: deque[EngineConnection] = deque()
        self.is_told = False

    @property
    def holder(self) -> EngineConnection | None:
        return self.asking[0] if self.asking else None

    def forget(self, connection: EngineConnection) -> None:
        if connection is self.holder:
            self.is_told = False
        with contextlib.suppress(ValueError):
            self.asking.remove(connection)

    def may_run(self, row: WaitingRow) -> bool:
        return self.holder in (None, row.connection)

    def pop(self, lane: deque[WaitingRow]) -> WaitingRow | None:
        """Take the next row that may run out of the lane; None if it has none."""
        if self.holder is None:
            return lane.popleft() if lane else None
        found = next((row for row in lane if self.may_run(row)), None)
        if found is not None:
            lane.remove(found)
        return found


class EngineLoop:
    """Feeds one vLLM engine from all connections. Rows with a priority below 0 overtake all others."""

    def __init__(self, connections: EngineConnections, llm: Any) -> None:
        from complete_fn_workers.engine.config import INTERACTIVE_SEATS
        from complete_fn_workers.engine.rows import PromptReader

        self.connections = connections
        self.llm = llm
        self.facts = facts = read_engine(llm)
        self.prompts = PromptReader(llm.get_tokenizer())
        self.context = facts.context
        self.max_num_seqs = facts.rows - INTERACTIVE_SEATS
        self.interactive: deque[WaitingRow] = deque()
        self.waiting: deque[WaitingRow] = deque()
        self.running: dict[str, AdmittedRow] = {}
        self.running_bulk = self.admitted = 0  # bulk rows in vLLM; rows submitted since the last step
        self.step_limit = StepLimit(facts.step_tokens)
        self.window = KVWindow(facts.cache_blocks, facts.block_tokens)
        self.next: ReadyRow | None = None  # the first bulk row, tokenised, while the cache has no room for it
        self.meter = StepMeter(requests_under_way(llm), decoder_work(facts), facts.devices, facts.overlaps)
        self.done: defaultdict[EngineConnection, list[list[Any]]] = defaultdict(list)
        self.text: defaultdict[EngineConnection, list[list[Any]]] = defaultdict(list)
        self.isolation = Isolation()
        self.serial = 0
        self.steps = 0
        self.beat_at = 0.0

    @property
    def greeting(self) -> dict[str, Any]:
        limits = {"max_model_len": self.context, "max_num_seqs": self.max_num_seqs}
        what = {"device": device_name(), "skipped": skipped_share(self.facts.config)}
        return {"ready": {**limits, "pid": os.getpid(), **what}}

    def run(self) -> None:
        while True:
            self.take(block=not self.has_work())
            self.isolate()
            if self.step_limit.takes_bulk(self.admit_chats(), self.running_bulk):
                self.admit_bulk()
            if self.running:
                self.step()
            self.deliver()
            self.beat()

    def has_work(self) -> bool:
        if self.running or self.next:
            return True
        return any(self.isolation.may_run(row) for lane in (self.interactive, self.waiting) for row in lane)

    def waits_for_another(self) -> bool:
        """Whether a connection waits until another one is no longer alone."""
        return len(self.isolation.asking) > 1 or bool(self.isolation.asking and (self.interactive or self.waiting))

    def isolate(self) -> None:
        """Tell the connection that is to be alone once no row of another connection runs."""
        holder = self.isolation.holder
        if holder is None or self.isolation.is_told:
            return
        if self.next is not None and self.next.row.connection is not holder:
            self.waiting.appendleft(self.next.row)
            self.next = None
        if all(row.connection is holder for row in self.running.values()):
            self.isolation.is_told = True
            self.connections.send(holder, {"alone": True})

    def beat(self) -> None:
        """Tell each connection that waits that the engine works, about once a second or after a longer step."""
        now = time.monotonic()
        if now - self.beat_at < BEAT_SECONDS:
            return
        self.beat_at = now
        waiting = {row.connection for lane in (self.interactive, self.waiting) for row in lane}
        running = {row.connection for row in self.running.values()}
        for connection in waiting | running | set(self.isolation.asking):
            self.connections.send(connection, {"steps": self.steps})

    def admit_chats(self) -> int:
        """Admit waiting chats while there are seats. Returns the number of admitted chats."""
        chats = 0
        while self.interactive and len(self.running) < 2 * self.max_num_seqs:
            if (row := self.isolation.pop(self.interactive)) is None:
                break
            if (chat := self.prepare(row)) is not None:
                self.submit(chat.row, chat.request, chat.row.sampling.priority)
                chats += 1
            self.step_limit.chat()
        return chats

    def admit_bulk(self) -> None:
        """Fill the seats while the cache has room and, if a chat is open, while the next step stays short."""
        decoding = len(self.running)
        while (self.next or self.waiting) and self.running_bulk < self.max_num_seqs:
            if self.running_bulk and self.step_limit.room(decoding) <= 0:
                return
            ready, self.next = self.next, None
            if ready is None:
                row = self.isolation.pop(self.waiting)
                if row is None:
                    return
                ready = self.prepare(row)
            if ready is not None and not self.fits(ready):
                self.next = ready  # this row goes first once other rows have left
                return
            if ready is not None:
                self.submit(ready.row, ready.request, ready.row.sampling.priority)

    def step(self) -> None:
        decoding = len(self.running) - self.admitted
        self.admitted = 0
        began = time.monotonic()
        self.steps += 1
        outputs = self.llm.step()
        took = time.monotonic() - began
        self.step_limit.stepped(took, decoding)
        self.meter.stepped(took)
        for output in outputs:
            self.take_output(output)

    def take(self, block: bool) -> None:
        """Read all messages that have arrived; with `block`, wait for the first one, or until a beat is due."""
        inbox = self.connections.inbox
        while block or not inbox.empty():
            try:
                connection, message = inbox.get(timeout=BEAT_SECONDS if self.waits_for_another() else None)
            except queue.Empty:
                return
            block = False
            if message is None:
                self.forget(connection)
            else:
                self.read(connection, message)

    def read(self, connection: EngineConnection, message: dict[str, Any]) -> None:
        from complete_fn_workers.engine.rows import Sampling

        if "open" in message:
            connection.tenant = message["open"]["tenant"]
            connection.default_max_tokens = message["open"]["default_max_tokens"]
        for number, prompt, *options in message.get("rows", ()):
            if options:
                connection.options = Sampling(options[0])
            lane = self.interactive if connection.options.priority < 0 else self.waiting
            lane.append(WaitingRow(connection, number, prompt, connection.options))
        if "count" in message:
            self.connections.send(connection, {"counts": self.prompts.count(message["count"]), "steps": self.steps})
        if "alone" in message:
            self.isolation.asking.append(connection)
        if "stop" in message:
            self.forget(connection)
            self.tell_time(connection, {"stopped": True})
        if "meter" in message:
            self.tell_time(connection, {})

    def tell_time(self, connection: EngineConnection, message: dict[str, Any]) -> None:
        """Send the message with the meter's reading.

        Each second is reported once. Time that a closed connection was not told is told to the next connection.
        """
        if not connection.closed:
            self.connections.send(connection, {**message, "meter": self.meter.tell()})

    def forget(self, connection: EngineConnection) -> None:
        """Drop the rows of a connection that has closed or wants no more answers."""
        self.isolation.forget(connection)
        self.waiting = deque(row for row in self.waiting if row.connection is not connection)
        self.interactive = deque(row for row in self.interactive if row.connection is not connection)
        if self.next is not None and self.next.row.connection is connection:
            self.next = None
        gone = [key for key, row in self.running.items() if row.connection is connection]
        for key in gone:
            self.meter.give_up(key)
        self.llm.abort_request([self.leave(key).internal_id for key in gone], internal=True)
        self.done.pop(connection, None)
        self.text.pop(connection, None)

    def leave(self, key: str) -> AdmittedRow:
        self.window.release(key)
        row = self.running.pop(key)
        self.running_bulk -= row.bulk
        return row

    def prepare(self, row: WaitingRow) -> ReadyRow | None:
        """The row with its tokens and limits; None if it is refused."""
        from complete_fn_workers.engine.rows import request_of

        default = row.connection.default_max_tokens
        try:
            return ReadyRow(row, request_of(self.prompts, row.prompt, row.sampling, self.context, default))
        except RowRefused as refusal:
            self.done[row.connection].append([row.number, *refusal.answer])
        except Exception as error:
            self.done[row.connection].append([row.number, *unexpected(error).answer])
        return None

    def held(self, row: WaitingRow | AdmittedRow, request: Any) -> HeldRow:
        return self.window.row(row.connection.tenant, request.ids, request.tokens)

    def fits(self, ready: ReadyRow) -> bool:
        """Whether the cache has room for a bulk row besides those under way."""
        return self.window.fits(self.held(*ready))

    def submit(self, row: WaitingRow | AdmittedRow, request: Any, priority: int, spent: Charge = NOTHING) -> None:
        """Hand one request of a row to vLLM. `spent`: the device time of its earlier requests."""
        from vllm.inputs import tokens_input

        connection = row.connection
        self.serial += 1
        key = str(self.serial)
        prompt = tokens_input(request.ids, cache_salt=connection.tenant)
        try:
            internal = self.llm.add_request(key, prompt, request.params, priority=priority)
        except Exception as error:  # vLLM's checks of a row raise errors of several types
            self.done[connection].append([row.number, *RowRefused("invalid_request", str(error)).answer, *spent])
        else:
            self.running[key] = admitted = AdmittedRow(connection, row.number, request, internal, priority)
            self.meter.admit(key, internal, spent)
            if admitted.bulk:
                self.running_bulk += 1
                self.window.hold(key, self.held(row, request), connection.tenant, request.ids)
            self.admitted += 1
            self.step_limit.admit(len(request.ids))

    def take_output(self, output: Any) -> None:
        """Take an output of vLLM: an answer, a step towards a label, or the new text of a streamed row."""
        from complete_fn_workers.engine.rows import tokens_of

        row = self.running.get(output.request_id)
        if row is None:
            return
        if output.finished:
            self.leave(output.request_id)
            charge = self.meter.leave(output.request_id)
            self.step_limit.finished(len(output.prompt_token_ids), output.num_cached_tokens or 0)
            try:
                answer = row.request.take(output)
            except Exception as error:
                answer = unexpected(error).answer
            if answer is None:
                self.submit(row, row.request, row.priority, charge)
            else:
                self.done[row.connection].append([row.number, *answer, *charge])
        elif piece := output.outputs[0].text[row.told :]:
            row.told += len(piece)
            self.text[row.connection].append([row.number, piece, *tokens_of(output)])

    def deliver(self) -> None:
        for connection, pieces in self.text.items():
            self.connections.send(connection, {"text": pieces})
        for connection, answers in self.done.items():
            if connection.closed:  # no caller takes these answers: their time is lost, like that of aborted rows
                self.meter.lost += sum(seconds for _, *answer in answers for seconds in answer[8:9])
            self.tell_time(connection, {"done": answers})
        self.text.clear()
        self.done.clear()


def unexpected(error: Exception) -> RowRefused:
    """Refuse one row, because its fault must not end the engine that all rows share.

    The message names only the error's type, because its text may contain the prompt.
    """
    return RowRefused("invalid_request", f"The engine failed at this row: {type(error).__name__}.")


def decoder_work(facts: EngineFacts) -> DecoderWork:
    return DecoderWork.of(facts.text_config, facts.weight_bytes, facts.cache_bytes)


def device_name() -> str:
    """The device that the model runs on: the history of runs is kept by its name."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return f"{available_cores()} cores, {platform.machine()}"
    return str(current_platform.get_device_name())

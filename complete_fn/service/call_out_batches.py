"""Batches of warehouses: each is run once, whoever asks how often, and its reply is kept for as long as it may be lost.

What a killed process was running is begun again, from the stored request, by whoever is asked for it next.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from complete_fn.engines.stoppable import Stopped
from complete_fn.errors import CompleteError, EngineError, JobError, NotFoundError
from complete_fn.host import here
from complete_fn.jobs.part_queue import worker_gone, worker_name
from complete_fn.logs import log_failure
from complete_fn.service.call_out import CallOut, Detail, Share, shares, value_of
from complete_fn.service.call_out_merging import Merger, Ticket
from complete_fn.service.engine_host import EngineHost
from complete_fn.store.job_tables import call_outs
from complete_fn.types import Asker

KEEP_SECONDS = 12 * 3600.0
LOST_SECONDS = 600.0
OTHER_BODY = "Batch {0!r} was sent before with other rows. A batch's name belongs to one body for 12 hours."

Values = list[Any]
Settle = Callable[[Sequence[Detail] | None], None]  # told the rows once they are there; None: it failed
Admission = Callable[[Sequence[Share]], Settle]  # raises RateLimitError


@dataclass(frozen=True, slots=True)
class CallOutName:
    """Whose batch it is, and what it is called. `function` is one of `dialects.FUNCTIONS`."""

    tenant: str
    user: str
    dialect: str
    function: str
    batch: str

    @property
    def key(self) -> str:
        """In the table: the function belongs to it, as one query's functions may number their batches alike."""
        return f"{self.function}:{self.batch}"

    def job(self, number: int) -> str:
        """Under which `run` knows the rows of its share of that number."""
        return f"{self.dialect}:{self.key}/{number}"

    @property
    def row(self) -> sa.ColumnElement[bool]:
        c = call_outs.c
        return (c.tenant == self.tenant) & (c.dialect == self.dialect) & (c.batch == self.key)


@dataclass
class Running:
    """A batch that runs here. `values` is set in the end, after the reply is in the store."""

    asked: CallOut
    values: Future[Values] = field(default_factory=Future)
    tickets: Sequence[Ticket] = ()
    settle: Settle = lambda rows: None


@dataclass(frozen=True)
class Known:
    """A batch that was sent before.

    Attributes:
        asked: its request, without the rows once they are answered; None while another process runs it.
        values: its answers to come; None while another process runs it, and if it is `lost`.
        lost: it failed, or whoever ran it is gone: it is to be begun again.
    """

    asked: CallOut | None
    values: Future[Values] | None = None
    lost: bool = False


def kept(now: float) -> sa.ColumnElement[bool]:
    """Whether a batch counts; the others are deleted by `retention.expire`."""
    return call_outs.c.created_at > now - KEEP_SECONDS


class CallOuts:
    """The batches of one service. Safe to use from several threads."""

    def __init__(self, engines: EngineHost) -> None:
        self.state, self.merger = engines.state, Merger(engines)
        self.holder = worker_name(0)
        self.lock = threading.Lock()
        self.running: dict[CallOutName, Running] = {}

    def ask(self, name: CallOutName, asked: CallOut, seconds: float, admit: Admission) -> Future[Values] | None:
        """The values of the batch, once they are there; None while another process of the service runs it.

        Raises:
            RequestError: the rows cannot be completed as asked; nothing was run.
            EngineBusyError, RateLimitError: too much is waiting, or was asked; the batch is not kept.
            JobError: the batch was sent before with other rows.
        """
        text = json.dumps([asked.rows, list(asked.numbers)], sort_keys=True)
        digest = hashlib.sha256(text.encode()).digest()
        known = self.look(name, digest)
        if known is not None and not known.lost:
            return known.values
        wanted = shares(self.state, asked.rows)
        with self.lock:
            here = self.running.get(name)
            if here is not None:
                return here.values
            if self.note(name, asked, digest):
                return self.start(name, asked, wanted, seconds, admit).values
        return self.ask(name, asked, seconds, admit)

    def poll(self, name: CallOutName, seconds: float, admit: Admission) -> Known:
        """A batch that was sent before; one that is lost is begun again.

        Raises:
            NotFoundError: the tenant has sent no such batch within the last 12 hours.
        """
        found = self.look(name, None)
        if found is None:
            raise NotFoundError(f"There is no batch {name.batch!r} here. Send its rows with POST.")
        if found.lost and found.asked is not None:
            return Known(found.asked, self.ask(name, found.asked, seconds, admit))
        return found

    def forget(self, name: CallOutName) -> None:
        """Stop the batch if it runs here, and keep nothing of it but answers and ledger."""
        with self.lock:
            here = self.running.pop(name, None)
        for ticket in here.tickets if here else ():
            ticket.leave()
        with self.state.store.write() as connection:
            connection.execute(call_outs.delete().where(name.row))

    def close(self) -> None:
        """Stop all; the batches stay noted, so that they are begun again when they are asked for."""
        with self.lock:
            mine = list(self.running.values())
        for ticket in (t for r in mine for t in r.tickets):
            ticket.leave()

    # -- what is known of a batch --------------------------------------------------------------------------------

    def look(self, name: CallOutName, digest: bytes | None) -> Known | None:
        """What is known of the batch; None if nothing is. `digest`, if given, must be that of its rows."""
        with self.state.store.read() as connection:
            row = connection.execute(sa.select(call_outs).where(name.row, kept(time.time()))).first()
        if row is None:
            return None
        if digest is not None and row.digest != digest:
            raise JobError(OTHER_BODY.format(name.batch))
        with self.lock:
            here = self.running.get(name)
        if here is not None:
            return Known(here.asked, here.values)
        if row.reply is not None:
            numbers, values = json.loads(zlib.decompress(row.reply))
            return Known(CallOut(name.batch, [], numbers), ready(values))
        if self.elsewhere(row):
            return Known(None)
        return Known(CallOut(**json.loads(zlib.decompress(row.asked))), lost=True)

    def elsewhere(self, row: Any) -> bool:
        """Whether another process runs the batch; one of another machine is believed to live for `LOST_SECONDS`."""
        if row.status != "running" or row.holder == self.holder or worker_gone(row.holder):
            return False
        return bool(row.holder.startswith(f"{here()}|") or row.created_at > time.time() - LOST_SECONDS)

    def note(self, name: CallOutName, asked: CallOut, digest: bytes) -> bool:
        """Write down that the batch runs here; False if another process was first."""
        now = time.time()
        values = {
            "tenant": name.tenant,
            "dialect": name.dialect,
            "batch": name.key,
            "digest": digest,
            "status": "running",
            "holder": self.holder,
            "asked": zlib.compress(json.dumps(asdict(asked)).encode(), 1),
            "created_at": now,
        }
        with self.state.store.write() as connection:
            held = connection.execute(sa.select(call_outs).where(name.row)).first()
            if held is not None:
                if held.created_at > now - KEEP_SECONDS and (held.status == "done" or self.elsewhere(held)):
                    return False
                connection.execute(call_outs.delete().where(name.row))
            try:
                with connection.begin_nested():
                    connection.execute(call_outs.insert().values(values))
            except IntegrityError:
                return False
        return True

    # -- running it ----------------------------------------------------------------------------------------------

    def start(
        self, name: CallOutName, asked: CallOut, wanted: list[Share], seconds: float, admit: Admission
    ) -> Running:
        """Begin the batch; the lock is held."""
        running = Running(asked)
        try:
            running.settle = admit(wanted)
            askers = [self.asker(name, asked, share, number) for number, share in enumerate(wanted)]
            running.tickets = self.merger.submit(list(zip(wanted, askers, strict=True)), seconds)
        except BaseException:
            running.settle([])
            with self.state.store.write() as connection:
                connection.execute(call_outs.delete().where(name.row))
            raise
        self.running[name] = running
        threading.Thread(target=self.finish, args=(name, asked, running), name="call-out", daemon=True).start()
        return running

    def asker(self, name: CallOutName, asked: CallOut, share: Share, number: int) -> Asker:
        """Answers that no other request may have are the batch's own, so that it finds them if it is begun again."""
        shared = share.call.sampling.greedy and share.cache == "on"
        return Asker(name.tenant, name.user, None if shared else name.job(number), asked.query_tag)

    def finish(self, name: CallOutName, asked: CallOut, running: Running) -> None:
        """Gather the rows, keep the reply, then tell whoever waits."""
        details: list[Detail | None] = [None] * len(asked.rows)
        try:
            for ticket in running.tickets:
                for number, row in zip(ticket.share.rows, ticket.done.result(), strict=True):
                    details[number] = row
            values = [value_of(row, name.function == "complete_details") for row in details]
            reply = zlib.compress(json.dumps([list(asked.numbers), values]).encode(), 1)
            self.keep(name, {"status": "done", "reply": reply, "asked": None})
            for ticket in running.tickets:
                if ticket.who.job is not None:
                    self.state.store.end_job(name.tenant, ticket.who.job)
            running.settle([row for row in details if row is not None])
        except BaseException as error:
            self.fail(name, running, error)
        else:
            with self.lock:
                self.running.pop(name, None)
            running.values.set_result(values)

    def fail(self, name: CallOutName, running: Running, error: BaseException) -> None:
        """The next request for the batch begins it again."""
        running.settle(None)
        shown = error
        if isinstance(error, Stopped):
            shown = EngineError("The batch was stopped. Send it again.")
        elif not isinstance(error, CompleteError):
            log_failure("a call-out", error)
            shown = EngineError("The service failed; its log says where.")
        try:
            self.keep(name, {"status": "failed", "error": str(shown).splitlines()[0]})
        finally:
            with self.lock:
                self.running.pop(name, None)
            running.values.set_exception(shown)

    def keep(self, name: CallOutName, values: dict[str, Any]) -> None:
        with self.state.store.write() as connection:
            mine = call_outs.update().where(name.row, call_outs.c.holder == self.holder)
            connection.execute(mine.values(values))


def ready(values: Values) -> Future[Values]:
    done: Future[Values] = Future()
    done.set_result(values)
    return done

"""Each batch of a warehouse is run once, however often it is sent. Its reply is kept for 12 hours, as it may get lost.

If a process is killed while it runs a batch, the next process that is asked for the batch runs it again, from the
stored request.
"""

from __future__ import annotations

import hashlib
import json
import threading
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
from complete_fn.logs import for_tenant, log_failure
from complete_fn.service.call_out import CallOut, Detail, Share, shares, value_of
from complete_fn.service.call_out_merging import Merger, Ticket
from complete_fn.service.engine_host import EngineHost
from complete_fn.store.job_tables import call_outs
from complete_fn.types import Asker

KEEP_SECONDS = 12 * 3600.0
LOST_SECONDS = 600.0  # a batch that another machine began so long ago counts as lost
OTHER_BODY = "Batch {0!r} was sent before with other rows. A batch's name belongs to one body for 12 hours."

Values = list[Any]
Settle = Callable[[Sequence[Detail] | None], None]  # called with the batch's rows at its end; with None if it failed
Admission = Callable[[Sequence[Share]], Settle]  # reserves the batch's tokens; raises RateLimitError


@dataclass(frozen=True, slots=True)
class CallOutName:
    """The owner and name of a batch. `function` is one of `call_out.FUNCTIONS`."""

    tenant: str
    user: str
    dialect: str
    function: str
    batch: str

    @property
    def key(self) -> str:
        """The batch's name in the table, with the function: two functions of one query may number batches alike."""
        return f"{self.function}:{self.batch}"

    def job(self, number: int) -> str:
        """The name of the job under which `run` answers the share of that number."""
        return f"{self.dialect}:{self.key}/{number}"

    @property
    def row(self) -> sa.ColumnElement[bool]:
        c = call_outs.c
        return (c.tenant == self.tenant) & (c.dialect == self.dialect) & (c.batch == self.key)


@dataclass
class Running:
    """A batch that this process runs. `values` is set at the end, after the reply is in the store."""

    asked: CallOut
    values: Future[Values] = field(default_factory=Future)
    tickets: Sequence[Ticket] = ()
    settle: Settle = lambda rows: None


@dataclass(frozen=True)
class Known:
    """A batch that was sent before.

    Attributes:
        asked: Its request, without the rows once they are answered; None while another process runs the batch.
        values: Its answers, perhaps still to come; None while another process runs the batch, and if it is `lost`.
        lost: The batch failed, or the process that ran it is gone. It must be run again.
    """

    asked: CallOut | None
    values: Future[Values] | None = None
    lost: bool = False


def kept(now: float) -> sa.ColumnElement[bool]:
    """Whether a batch is young enough to be kept. `retention.expire` deletes the others."""
    return call_outs.c.created_at > now - KEEP_SECONDS


class CallOuts:
    """The batches of one service. Safe to use from several threads."""

    def __init__(self, engines: EngineHost) -> None:
        self.state, self.merger = engines.state, Merger(engines)
        self.holder = worker_name(0)
        self.lock = threading.Lock()
        self.running: dict[CallOutName, Running] = {}

    def ask(self, name: CallOutName, asked: CallOut, seconds: float, admit: Admission) -> Future[Values] | None:
        """Run the batch, unless it is known; returns its values to come. None while another process runs it.

        Raises:
            RequestError: The rows cannot be completed as asked; nothing was run.
            EngineBusyError: Too many requests wait already; the batch is not kept.
            RateLimitError: The caller has used up its tokens of the minute; the batch is not kept.
            JobError: The batch was sent before with other rows.
            StorageFullError: The tenant may not keep the request.
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
        """A batch that was sent before. A lost batch is run again.

        Raises:
            NotFoundError: The tenant has sent no such batch within the last 12 hours.
        """
        found = self.look(name, None)
        if found is None:
            raise NotFoundError(f"There is no batch {name.batch!r} here. Send its rows with POST.")
        if found.lost and found.asked is not None:
            return Known(found.asked, self.ask(name, found.asked, seconds, admit))
        return found

    def forget(self, name: CallOutName) -> None:
        """Stop the batch if this process runs it, and delete its request and reply. Answers and ledger stay."""
        with self.lock:
            here = self.running.pop(name, None)
        for ticket in here.tickets if here else ():
            ticket.leave()
        with self.state.store.write() as connection:
            connection.execute(call_outs.delete().where(name.row))

    def close(self) -> None:
        """Stop all batches of this process. They stay in the store, so the next request for one runs it again."""
        with self.lock:
            mine = list(self.running.values())
        for ticket in (t for r in mine for t in r.tickets):
            ticket.leave()

    # -- what is known of a batch --------------------------------------------------------------------------------

    def look(self, name: CallOutName, digest: bytes | None) -> Known | None:
        """The batch as the store has it; None if it was never sent. `digest`, if given, must be that of its rows."""
        with self.state.store.read() as connection:
            row = connection.execute(sa.select(call_outs).where(name.row, kept(self.state.store.now()))).first()
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
        """Whether another process runs the batch. A process of another machine is trusted for `LOST_SECONDS`."""
        if row.status != "running" or row.holder == self.holder or worker_gone(row.holder):
            return False
        return bool(row.holder.startswith(f"{here()}|") or row.created_at > self.state.store.now() - LOST_SECONDS)

    def note(self, name: CallOutName, asked: CallOut, digest: bytes) -> bool:
        """Note in the store that this process runs the batch; False if another process was first."""
        now = self.state.store.now()
        request = zlib.compress(json.dumps(asdict(asked)).encode(), 1)
        self.state.quota.refuse_roughly(name.tenant, len(request))
        values = {
            "tenant": name.tenant,
            "dialect": name.dialect,
            "batch": name.key,
            "digest": digest,
            "status": "running",
            "holder": self.holder,
            "asked": request,
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
        """Begin the batch. The caller holds the lock."""
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
        """The asker of a share. Answers that no other request may reuse get a job's name: a second run finds them."""
        shared = share.call.sampling.greedy and share.cache == "on"
        return Asker(name.tenant, name.user, None if shared else name.job(number), asked.query_tag)

    def finish(self, name: CallOutName, asked: CallOut, running: Running) -> None:
        """Gather the rows, store the reply, then give the values to the requests that wait for them."""
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
        """Note the failure in the store. The next request for the batch runs it again."""
        running.settle(None)
        shown = error
        if isinstance(error, Stopped):
            shown = EngineError("The batch was stopped. Send it again.").for_everybody()
        elif not isinstance(error, CompleteError):
            log_failure("a call-out", error)
            shown = EngineError("The service failed; its log says where.").for_everybody()
        else:
            shown = for_tenant("a call-out", error, name.tenant)
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

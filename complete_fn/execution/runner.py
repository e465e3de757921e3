"""THE MAIN PATH: `run()` turns a column of prompts into a column of answers. Everything else only calls it."""

from __future__ import annotations

import time
from dataclasses import replace

from complete_fn.engines.base import close
from complete_fn.engines.call import Call
from complete_fn.engines.tokenizer import token_sizes
from complete_fn.execution.admission import Admission, Tools, refuse_hopeless
from complete_fn.execution.answers import Answers
from complete_fn.execution.commits import Slices
from complete_fn.execution.run_state import Work, known_answers
from complete_fn.execution.summary import summarise
from complete_fn.history.device_time import device_time_of
from complete_fn.history.run_history import Meter, device_of, keep
from complete_fn.planning import make_plan
from complete_fn.prompts.options import CacheMode
from complete_fn.spending.budget import Caps
from complete_fn.spending.token_bound import PromptBound
from complete_fn.store.store import LOOK_UP
from complete_fn.types import Asker

# Seconds between two looks for answers that other runs compute; every 20th look also drops the claims of dead runs.
LOOK_SECONDS, LOOKS_TO_DROP = 0.1, 20


def run(call: Call, prompts: object, tools: Tools, who: Asker, cache: CacheMode = "on") -> Answers:
    """Answer every prompt: plan, look up what is known, run the rest, commit slice by slice, back in row order.

    Args:
        prompts: Arrow array or chunked array of strings; NULL stays NULL, messages as `pack_messages` packs them.

    Raises:
        EngineError: the engine cannot do the work, or reports more tokens than a run under a cap has asked for;
            committed slices stay.
        StoreError: a slice cannot be committed.
    """
    began = time.monotonic()
    plan = make_plan(prompts, mergeable=call.sampling.greedy, sizes=token_sizes(call.model))
    work = known_answers(call, plan, tools.store, who, cache)
    tools.progress.start(len(plan.order))
    try:
        with Slices(call, work, tools.store, who, tools.progress, device_time_of(tools.engine)) as slices:
            budget = None if tools.budget is None else tools.budget.for_attempt(slices.attempt)
            slices.reuse(work.reused)
            missing = work.missing()
            while missing:
                elsewhere = compute(missing, call, work, slices, replace(tools, budget=budget), who)
                missing = unanswered(elsewhere, work, slices, tools)
    finally:
        tools.progress.stop()
    return Answers(plan, work.completions, call.model.prices, summarise(call, work, time.monotonic() - began))


def compute(numbers: list[int], call: Call, work: Work, slices: Slices, tools: Tools, who: Asker) -> list[int]:
    """Stream the distinct prompts through the engine.

    Prompts that the budget refuses are tried again when other rows have returned what was reserved for them. Prompts
    that can never fit into the budget fail.

    Returns:
        The prompts that other runs are computing.
    """
    elsewhere: list[int] = []
    caps, meter = Caps(PromptBound(call.model), tools.budget, tools.tokens, tools.brake), Meter()
    while numbers:
        turn = numbers if not caps or caps.bound.known else numbers[:1]
        admission = Admission(call, work, slices, tools, caps, meter)
        stream = tools.engine.stream(admission.requests(turn), who.tenant)
        try:
            for position, completion in stream:
                number = admission.sent[position]
                slices.add(number, admission.settled(number, completion))
        except BaseException as error:
            if not isinstance(error, Exception):  # the caller stopped the run, and pays for the text it has read
                admission.bill_told()
            raise
        finally:
            close(stream)
            slices.flush()
            admission.return_unsettled()
        admission.refuse_broken_caps()
        admission.check_complete()
        if tools.budget is not None:
            tools.budget.release()
        again = refuse_hopeless(admission.refused, slices, caps)
        if len(again) == len(turn):
            tools.pause(0.05)  # another run holds the reservations
        numbers = numbers[len(turn) :] + again
        elsewhere += admission.elsewhere
    if (past := meter.run(call, work.plan, device_of(tools.engine))) is not None:
        keep(tools.store, who.tenant, call.model.name, past)
    return elsewhere


def unanswered(numbers: list[int], work: Work, slices: Slices, tools: Tools) -> list[int]:
    """Wait until other runs have answered these prompts or have released their claims on them.

    Returns:
        The prompts that were released without an answer. This run computes them.
    """
    free: list[int] = []
    for low in range(0, len(numbers), LOOK_UP):
        waiting = numbers[low : low + LOOK_UP]
        asked = 0
        while waiting:
            claimed = tools.store.claimed(slices.attempt.tenant, [work.keys[n] for n in waiting])
            # Answers are read after the claims, because a claim ends in the commit that stores its answer.
            found = work.look_again(waiting, tools.store)
            slices.reuse(found)
            free += [n for n in waiting if n not in found and work.keys[n] not in claimed]
            waiting = [n for n in waiting if n not in found and work.keys[n] in claimed]
            if waiting:
                asked += 1
                if asked % LOOKS_TO_DROP == 0:
                    tools.store.drop_claims()
                tools.pause(LOOK_SECONDS)
    return free

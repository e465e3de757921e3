"""Slots: no tenant holds the spare ones, turns are fair, and a cancelled request leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
from fastapi import Request

from complete_fn.errors import EngineBusyError
from complete_fn.interrupts import Abandoned, end_if_abandoned
from complete_fn.server.fair_slots import FairSlots, RequestSlots


def slots(of_one: int = 3, spare: int = 1, waiting: int = 100) -> FairSlots:
    return FairSlots(of_one, spare, waiting, "Wait.")


def test_another_tenant_finds_a_slot_while_one_holds_all_it_may() -> None:
    async def story() -> None:
        lanes, gate = slots(), threading.Event()
        held = [asyncio.create_task(lanes.run("a", gate.wait)) for _ in range(50)]
        await asyncio.sleep(0.05)
        assert lanes.running["a"] == 3
        assert await asyncio.wait_for(lanes.run("b", lambda: "answered"), 20) == "answered"
        gate.set()
        assert all(await asyncio.gather(*held))
        assert not lanes.running
        assert not lanes.queues

    asyncio.run(story())


def test_a_free_slot_goes_to_the_tenant_with_the_fewest() -> None:
    async def story() -> list[str]:
        lanes, order = slots(of_one=2, spare=0), list[str]()
        first = [asyncio.Event() for _ in range(2)]

        async def hold(tenant: str, until: asyncio.Event | None = None) -> None:
            async with lanes.slot(tenant):
                order.append(tenant)
                if until is not None:
                    await until.wait()

        tasks = [asyncio.create_task(hold("a", event)) for event in first]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(hold("a")) for _ in range(4)]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(hold(name)) for name in ("b", "b", "c")]
        await asyncio.sleep(0)
        first[0].set()
        first[1].set()
        await asyncio.gather(*tasks)
        return order

    order = asyncio.run(story())
    assert order[:2] == ["a", "a"]
    assert order[2] == "b"  # although four of a's came before it
    assert {"b", "c"} <= set(order[2:6])
    assert sorted(order) == ["a"] * 6 + ["b"] * 2 + ["c"]


def test_a_crowd_of_one_tenant_is_refused_and_others_are_not() -> None:
    async def story() -> None:
        lanes, gate = slots(of_one=1, spare=1, waiting=10), threading.Event()
        tasks = [asyncio.create_task(lanes.run("a", gate.wait)) for _ in range(6)]
        await asyncio.sleep(0.05)
        with pytest.raises(EngineBusyError, match="5 requests wait already"):
            await lanes.run("a", gate.wait)
        assert await lanes.run("b", lambda: 1) == 1
        gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(story())


@pytest.mark.parametrize("seed", range(20))
def test_cancelled_at_any_moment_no_slot_is_lost(seed: int) -> None:
    """Whatever is cancelled when: never more run than may, and at the end every slot is free."""

    async def story() -> None:
        chance, lanes = random.Random(seed), slots()
        most = 0

        async def work(tenant: str) -> None:
            nonlocal most
            async with lanes.slot(tenant):
                most = max(most, lanes.running.total())
                assert lanes.running[tenant] <= 3
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)

        tasks = [asyncio.create_task(work(chance.choice("aaab"))) for _ in range(60)]
        while not all(task.done() for task in tasks):
            if chance.random() < 0.5:
                chance.choice(tasks).cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 4
        assert not lanes.running
        assert not lanes.queues
        assert any(not task.cancelled() for task in tasks)

    asyncio.run(story())


class Leaving(Request):
    """A request whose client leaves when `gone` is set."""

    def __init__(self, gone: asyncio.Event) -> None:
        super().__init__({"type": "http"})
        self.gone = gone

    async def is_disconnected(self) -> bool:
        return self.gone.is_set()


@pytest.mark.parametrize("is_waiting", [True, False])
def test_work_ends_when_its_client_leaves_also_while_it_waits_for_a_slot(is_waiting: bool) -> None:
    async def story() -> None:
        lanes, gate, gone, begun = slots(of_one=1, spare=0), threading.Event(), asyncio.Event(), threading.Event()

        def work() -> None:
            begun.set()
            while not gate.wait(0.01):
                end_if_abandoned()

        held = asyncio.create_task(lanes.run("a", gate.wait)) if is_waiting else None
        await asyncio.sleep(0.05)
        asked = asyncio.create_task(RequestSlots(lanes, Leaving(gone)).run("a", work))
        await asyncio.sleep(0.05)
        gone.set()
        if held is not None:
            await asyncio.sleep(0.6)  # longer than between two looks
            gate.set()
            await held
        with pytest.raises(Abandoned):
            await asyncio.wait_for(asked, 20)
        assert begun.is_set() != is_waiting
        assert not lanes.running

    asyncio.run(story())

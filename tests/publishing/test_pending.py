"""Room for what is published: bounded, first come first served, and given back in every case."""

from __future__ import annotations

import asyncio
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sidecar.errors import QueueFull
from sidecar.publishing.pending import Pending

MAX_EVENTS, MAX_BYTES = 10, 100


def make() -> Pending:
    return Pending("work", max_events=MAX_EVENTS, max_bytes=MAX_BYTES)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def waiting(pending: Pending, events: int, size: int = 1) -> asyncio.Task[None]:
    return asyncio.create_task(pending.enter(events, size, wait=None))


async def test_there_is_room_up_to_the_limits_in_events_and_in_bytes() -> None:
    pending = make()

    assert pending.try_enter(9, 10)
    assert not pending.try_enter(2, 1)
    assert not pending.try_enter(1, 91)
    assert pending.try_enter(1, 90)


async def test_a_batch_larger_than_all_the_room_goes_alone() -> None:
    pending = make()
    alone = pending.try_enter(1000, 1000)
    beside = pending.try_enter(1, 1)
    pending.leave(1000, 1000)

    assert (alone, beside) == (True, False)
    assert pending.try_enter(1, 1)


async def test_who_waits_is_not_overtaken_by_a_smaller_batch() -> None:
    pending = make()
    pending.try_enter(8, 8)
    large = waiting(pending, 5)
    await turns()
    small = pending.try_enter(1, 1)
    queued = waiting(pending, 1)
    await turns()
    while_full = (large.done(), queued.done())
    pending.leave(8, 8)
    await turns()

    assert not small
    assert while_full == (False, False)
    assert large.done()
    assert queued.done()
    assert (pending.events, pending.bytes) == (6, 2)


async def test_a_queue_that_stays_full_says_when_to_come_again() -> None:
    pending = make()
    pending.try_enter(10, 10)
    with pytest.raises(QueueFull, match="work") as caught:
        await pending.enter(1, 1, wait=0.05)
    room_after = (pending.events, pending.bytes)
    pending.leave(10, 10)

    assert caught.value.retry_after == 1.0
    assert caught.value.metadata == {"broker": "work", "limit": "10"}
    assert room_after == (10, 10)
    assert pending.try_enter(10, 100)


async def test_who_enters_while_there_is_room_does_not_wait() -> None:
    pending = make()
    async with asyncio.timeout(1):
        await pending.enter(1, 1, wait=None)

    assert (pending.events, pending.bytes) == (1, 1)


async def test_not_waiting_at_all_is_possible() -> None:
    pending = make()
    pending.try_enter(10, 10)
    with pytest.raises(QueueFull):
        await pending.enter(1, 1, wait=0)


async def test_a_waiter_that_leaves_makes_way_for_those_behind_it() -> None:
    pending = make()
    pending.try_enter(8, 8)
    large, small = waiting(pending, 5), waiting(pending, 2)
    await turns()
    large.cancel()
    await turns()

    assert large.cancelled()
    assert small.done()
    assert pending.events == 10


async def test_room_given_to_a_waiter_as_it_was_cancelled_is_given_back() -> None:
    pending = make()
    pending.try_enter(10, 10)
    waiter = waiting(pending, 3)
    await turns()
    pending.leave(10, 10)
    waiter.cancel()
    await turns()

    assert waiter.cancelled()
    assert (pending.events, pending.bytes) == (0, 0)


sizes = st.tuples(st.integers(1, 14), st.integers(1, 130))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), sizes),
        st.tuples(st.sampled_from(["leave", "cancel"]), st.integers(0, 50)),
        st.tuples(st.just("turn"), st.integers(0, 4)),
    ),
    max_size=40,
)


class Crowd:
    """Batches that come, wait, lose patience and leave; and what has to hold meanwhile."""

    def __init__(self) -> None:
        self.pending = make()
        self.inside: list[tuple[int, int]] = []
        self.queued: list[asyncio.Task[None]] = []
        self.let_in: list[asyncio.Task[None]] = []

    async def arrive(self, batch: tuple[int, int]) -> None:
        """As the publisher does it: only who finds no room waits."""

        async def enter() -> None:
            await self.pending.enter(*batch, wait=None)
            self.inside.append(batch)
            self.let_in.append(task)

        if self.pending.try_enter(*batch):
            self.inside.append(batch)
        else:
            task = asyncio.create_task(enter())
            self.queued.append(task)
            await asyncio.sleep(0)

    async def leave(self, which: int) -> None:
        if self.inside:
            self.pending.leave(*self.inside.pop(which % len(self.inside)))

    async def cancel(self, which: int) -> None:
        if self.queued:
            self.queued[which % len(self.queued)].cancel()

    async def turn(self, count: int) -> None:
        await turns(count)
        if count > 2:  # who was let in has noticed by now
            self.check()

    def check(self) -> None:
        events, size = (sum(column) for column in zip((0, 0), *self.inside, strict=True))
        lone = len(self.inside) <= 1

        assert (self.pending.events, self.pending.bytes) == (events, size)
        assert lone or (events <= MAX_EVENTS and size <= MAX_BYTES)
        assert self.let_in == [task for task in self.queued if task in self.let_in]

    async def go_home(self) -> None:
        while self.inside or not all(task.done() for task in self.queued):
            while self.inside:
                await self.leave(0)
            await turns()
            self.check()
            assert self.inside or all(task.done() for task in self.queued), "nobody is let in"

        assert all(task.cancelled() or task in self.let_in for task in self.queued)
        assert (self.pending.events, self.pending.bytes) == (0, 0)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_whatever_comes_and_goes_the_limits_hold_and_all_room_is_given_back(
    steps: list[tuple[str, Any]],
) -> None:
    async def play() -> None:
        crowd = Crowd()
        for what, how in steps:
            await getattr(crowd, what)(how)
        await crowd.go_home()

    asyncio.run(play())

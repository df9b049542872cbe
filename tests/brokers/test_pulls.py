"""What a subscription asks its consumers for: bounded in events and bytes, and always enough to go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from sidecar.brokers.nats.pulls import PULL_EVENTS, PULL_SECONDS, PULLS, Asked, Pulls

if TYPE_CHECKING:
    from sidecar.brokers.nats.pulls import Pull, Slot

MIB = 1024 * 1024
LARGEST = MIB


def pulls(
    *, consumers: int = 1, max_in_flight: int = 1000, max_bytes: int = 32 * MIB
) -> tuple[Pulls, list[Asked]]:
    """Of consumers that deliver nothing again."""
    it = Pulls(max_in_flight, max_bytes, lambda: LARGEST)
    asked = [it.new() for _ in range(consumers)]
    for one in asked:
        one.careful = False
        it.add(one)
    return it, asked


def test_a_request_is_for_no_more_events_than_are_taken_at_once() -> None:
    """And there are several, so that one is open while another ends."""
    it, _ = pulls(max_in_flight=200_000)
    asked = it.wanted(200_000, 0, now=0)

    assert [pull.events for pull in asked] == [PULL_EVENTS] * PULLS
    assert sum(pull.max_bytes for pull in asked) <= 32 * MIB
    assert it.wanted(200_000 - it.owed, 0, now=0) == []


def test_a_pull_whose_last_byte_was_taken_is_over_though_nobody_says_so() -> None:
    it, _ = pulls(max_bytes=4000)
    (pull,) = it.wanted(10, 0, now=0)
    it.arrived(pull.slot, pull.max_bytes)

    assert it.owed == 0


def test_an_event_that_fits_in_no_request_is_asked_for_alone() -> None:
    """Without a bound in bytes, once; then it goes on as before."""
    it, (asked,) = pulls(max_bytes=40_000)
    (pull,) = it.wanted(100, 0, now=0)
    it.ended(asked, pull.slot, too_large=True)
    (alone,) = it.wanted(100, 0, now=0)
    nothing_beside = it.wanted(99, 0, now=0)
    it.arrived(alone.slot, 50_000)
    none_while_it_is_held = it.wanted(100, 50_000, now=0)
    (after,) = it.wanted(100, 0, now=0)

    assert (alone.events, alone.max_bytes) == (1, 0)
    assert nothing_beside == none_while_it_is_held == []
    assert (after.events, after.max_bytes) == (100, 10_000)


def test_what_only_came_too_late_for_a_request_is_not_too_large() -> None:
    it, (asked,) = pulls(max_bytes=40_000)
    (pull,) = it.wanted(100, 0, now=0)
    it.arrived(pull.slot, 9_000)
    it.ended(asked, pull.slot, too_large=True)
    (after,) = it.wanted(100, 9_000, now=0)

    assert after.max_bytes == 10_000


def test_where_events_may_come_again_the_server_counts_no_bytes() -> None:
    """It would put one that does not fit behind the others."""
    it, (asked,) = pulls()
    asked.careful = True
    requests = it.wanted(1000, 0, now=0)

    assert {pull.max_bytes for pull in requests} == {0}
    assert sum(pull.events for pull in requests) * LARGEST <= 32 * MIB


def test_a_pull_that_ended_in_silence_is_asked_for_again() -> None:
    it, _ = pulls()
    it.wanted(1000, 0, now=0)
    early = it.wanted(1, 0, now=PULL_SECONDS)
    late = it.wanted(1, 0, now=PULL_SECONDS * 2)

    assert early == []
    assert [pull.events for pull in late] == [1]


def test_no_consumer_starves_beside_a_busy_one() -> None:
    it, (_, idle) = pulls(consumers=2, max_in_flight=1)
    first = it.wanted(1, 0, now=0)
    busy = next(pull for pull in first if pull.asked is not idle)
    it.arrived(busy.slot, 100)
    again = it.wanted(0, 0, now=0)

    assert {id(pull.asked) for pull in first} == {id(busy.asked), id(idle)}
    assert [pull.asked for pull in again] == [busy.asked]


@given(
    st.lists(st.integers(1, LARGEST), min_size=1, max_size=200),
    st.integers(1, 300),
    st.integers(5_000, 8 * MIB),
    st.data(),
)
def test_all_events_come_within_the_bound_but_for_one_event(
    sizes: list[int], window: int, max_bytes: int, data: st.DataObject
) -> None:
    """A server that serves the requests in turn, and an app that takes what came when it likes."""
    it, (asked,) = pulls(max_in_flight=window, max_bytes=max_bytes)
    waiting: list[Pull] = []
    held: list[int] = []
    left = list(reversed(sizes))
    came = 0
    while left:
        new = it.wanted(window - len(held) - it.owed, sum(held), now=0)
        waiting += new
        assert len(held) + it.owed <= window
        came += _serve(it, asked, waiting, left, held)
        assert sum(held) <= max_bytes + max(sizes)
        if held and (not new or data.draw(st.booleans())):
            held.clear()
        elif not held:
            assert new or waiting or not left, "nothing is asked for"

    assert came == len(sizes)


def _serve(it: Pulls, asked: Asked, waiting: list[Pull], left: list[int], held: list[int]) -> int:
    """As nats-server's nextWaiting does; how many were delivered."""
    came = 0
    budgets: dict[Slot, list[int]] = {
        pull.slot: [pull.slot.events, pull.slot.bytes] for pull in waiting
    }
    while waiting and left:
        pull = waiting.pop(0)
        budget, size = budgets[pull.slot], left[-1]
        if pull.max_bytes and size > budget[1]:
            it.ended(asked, pull.slot, too_large=True)
            continue
        budget[0] -= 1
        budget[1] -= size
        held.append(left.pop())
        came += 1
        it.arrived(pull.slot, size)
        if budget[0] and not (pull.max_bytes and not budget[1]):
            waiting.append(pull)
    return came

"""What a window decides, told the time and what happened; no loop, no broker."""

from __future__ import annotations

import itertools
import time
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sidecar.broker import Failures, Incoming
from sidecar.delivery.held import Held, State
from sidecar.delivery.recent import Recent
from sidecar.delivery.window import HELD_FACTOR, REMEMBERED, Window
from sidecar.event import Event

LEASE = 30.0
PREFIX = "billing.0a1b."


def window(*, max_in_flight: int = 256, ordered: bool = True) -> Window:
    return Window(ordered=ordered, max_in_flight=max_in_flight, token_prefix=PREFIX)


def incoming(sequence: int, key: str = "", *, attempts: int = 0, crashes: int = 0) -> Incoming:
    event = Event(id=str(sequence), source="/shop", type="order.created", time_ns=1, key=key)
    return Incoming("orders", sequence, sequence, event, failures=Failures(attempts, crashes))


def garbage(sequence: int) -> Incoming:
    return Incoming("orders", sequence, sequence, None, problem="not JSON", raw=b"{")


def arrive(held_in: Window, *events: Incoming) -> list[Held]:
    held = [held_in.arrived(event) for event in events]
    assert None not in held
    return [one for one in held if one is not None]


def take(held_in: Window, limit: int = 1000, *, until: float = LEASE) -> list[Held]:
    return held_in.take(limit, "app", until)


def sequences(held: list[Held]) -> list[Any]:
    return [one.incoming.identity for one in held]


def inside(held_in: Window) -> dict[str, int]:
    """How much every structure holds that is not bounded by itself."""
    return {
        name: value if isinstance(value, int) else len(value)
        for name, value in vars(held_in).items()
        if name in {"retrying", "leaving", "stuck"}
        or (hasattr(value, "__len__") and not isinstance(value, str | Recent))
    }


EMPTY = dict.fromkeys(inside(window()), 0)


# -- order


def test_only_the_first_of_a_key_is_handed_over() -> None:
    lanes = window()
    arrive(lanes, incoming(1, "a"), incoming(2, "a"), incoming(3, "b"), incoming(4, "a"))

    assert sequences(take(lanes)) == [1, 3]


def test_events_without_a_key_have_no_order_to_keep() -> None:
    lanes = window()
    arrive(lanes, incoming(1), incoming(2), incoming(3))

    assert sequences(take(lanes)) == [1, 2, 3]


def test_without_ordering_keys_mean_nothing() -> None:
    lanes = window(ordered=False)
    arrive(lanes, incoming(1, "a"), incoming(2, "a"))

    assert sequences(take(lanes)) == [1, 2]
    assert lanes.lanes == 0


def test_the_next_of_a_key_comes_when_the_one_before_is_done() -> None:
    lanes = window()
    arrive(lanes, incoming(1, "a"), incoming(2, "a"))
    (first,) = take(lanes)
    nothing = take(lanes)
    lanes.done(first)

    assert nothing == []
    assert sequences(take(lanes)) == [2]


def test_a_retry_keeps_its_place_before_the_rest_of_its_key() -> None:
    lanes = window()
    arrive(lanes, incoming(1, "a"), incoming(2, "a"), incoming(3, "b"))
    first, other = take(lanes)
    lanes.retry(first, 5.0)
    lanes.done(other)
    while_it_waits = take(lanes)
    lanes.due(5.0)

    assert while_it_waits == []
    assert sequences(take(lanes)) == [1]


def test_what_a_leaving_consumer_gives_back_is_first_in_line_again() -> None:
    lanes = window()
    arrive(lanes, *(incoming(n) for n in range(1, 5)))
    taken = take(lanes, 3)
    for held in reversed(taken):
        lanes.back(held)

    assert sequences(take(lanes)) == [1, 2, 3, 4]


# -- attempts


def test_the_broker_says_how_often_it_failed_before() -> None:
    lanes = window()
    arrive(lanes, incoming(1, attempts=2))

    assert [held.attempt for held in take(lanes)] == [3]


def test_a_retry_counts_unless_it_is_uncounted() -> None:
    lanes = window()
    arrive(lanes, incoming(1))
    attempts = []
    for uncounted in (False, True, True, False, False):
        (held,) = take(lanes)
        attempts.append(held.attempt)
        lanes.retry(held, 1.0, uncounted=uncounted)
        lanes.due(1.0)

    assert attempts == [1, 2, 2, 2, 3]


def test_what_is_given_back_by_a_consumer_was_no_attempt() -> None:
    lanes = window()
    arrive(lanes, incoming(1))
    (held,) = take(lanes)
    lanes.back(held)

    assert [held.attempt for held in take(lanes)] == [1]


def test_what_the_app_has_stays_when_all_else_is_revoked() -> None:
    """It may still be settled; what waited behind it, and what was ready, is another's."""
    lanes = window()
    arrive(lanes, *(incoming(number, "a") for number in (1, 2)), incoming(3, "b"), incoming(4))
    (out,) = take(lanes, 1)
    stay = lanes.revoke([1, 2, 3, 4, 99], but={State.OUT})

    assert stay == [out]
    assert len(lanes) == 1
    assert take(lanes) == []
    assert lanes.find(out.token) is out
    lanes.done(out)
    assert lanes.next_time() is None
    assert inside(lanes) == EMPTY


# -- failures that are to be recorded first


def test_a_retry_waits_until_its_failure_is_recorded() -> None:
    """However long its time is over; and then it is due at once."""
    lanes = window()
    (held,) = arrive(lanes, incoming(1))
    take(lanes)
    lanes.retry(held, 5.0, recorded=False)
    early = lanes.due(100.0)
    taken_early = take(lanes)
    lanes.recorded(held)
    due_at = lanes.next_time()
    lanes.due(100.0)

    assert (early, taken_early, due_at) == ([], [], 5.0)
    assert sequences(take(lanes)) == [1]
    assert held.attempt == 2


def test_a_failure_that_is_recorded_in_time_changes_nothing() -> None:
    lanes = window()
    (held,) = arrive(lanes, incoming(1))
    take(lanes)
    lanes.retry(held, 5.0, recorded=False)
    lanes.recorded(held)
    lanes.due(4.9)
    too_early = take(lanes)
    lanes.due(5.0)

    assert too_early == []
    assert sequences(take(lanes)) == [1]


def test_what_goes_back_unrecorded_is_known_with_its_time_when_it_comes_again() -> None:
    lanes = window()
    (held,) = arrive(lanes, incoming(1))
    take(lanes)
    lanes.retry(held, 5.0, recorded=False)
    lanes.due(6.0)
    lanes.give_back()
    lanes.recorded(held)
    arrive(lanes, incoming(1))
    lanes.due(6.0)

    assert [(one.incoming.identity, one.attempt) for one in take(lanes)] == [(1, 2)]


def test_a_revoked_event_is_forgotten_and_its_lane_moves_on() -> None:
    lanes = window()
    first, _, _ = arrive(lanes, incoming(1, "a"), incoming(2, "a"), incoming(3, "b"))
    take(lanes)
    lanes.revoke([1, 3])

    assert lanes.find(first.token) is None
    assert sequences(take(lanes)) == [2]
    assert len(lanes) == 1


def test_the_wait_for_a_retry_goes_on_when_an_event_given_back_returns() -> None:
    lanes = window()
    arrive(lanes, incoming(1, "a"), incoming(2, "a"))
    (first,) = take(lanes)
    lanes.retry(first, 5.0)
    lanes.give_back()
    arrive(lanes, incoming(1, "a", attempts=1), incoming(2, "a"))
    early, due = take(lanes), lanes.next_time()
    lanes.due(5.0)

    assert (early, due) == ([], 5.0)
    assert [(held.incoming.identity, held.attempt) for held in take(lanes)] == [(1, 2)]


# -- what comes twice


def test_an_event_that_is_here_already_is_not_here_twice() -> None:
    """Its broker's claim ran out: the new handle is the one that is good now."""
    lanes = window()
    (held,) = arrive(lanes, incoming(1, "a"))
    again = incoming(1, "a", attempts=1)

    assert lanes.arrived(again) is None
    assert held.incoming is again
    assert sequences(take(lanes)) == [1]


def test_an_acked_event_is_known_when_its_ack_was_lost() -> None:
    lanes = window()
    (held,) = arrive(lanes, incoming(1))
    take(lanes)
    lanes.done(held)

    assert lanes.was_acked(1)
    assert not lanes.was_acked(2)


def test_what_was_acked_is_forgotten_with_the_source() -> None:
    """After a move elsewhere, the same events come again because somebody wants them to."""
    lanes = window()
    (held,) = arrive(lanes, incoming(1))
    take(lanes)
    lanes.done(held)
    lanes.forget_acked()

    assert not lanes.was_acked(1)


# -- leases and tokens


def test_a_lease_that_ends_is_told_once_and_the_token_is_known_as_expired() -> None:
    lanes = window()
    arrive(lanes, incoming(1))
    (held,) = take(lanes, until=10.0)
    token = held.token
    early, late, again = lanes.due(9.9), lanes.due(10.0), lanes.due(11.0)
    lanes.retry(held, 12.0)

    assert (early, late, again) == ([], [held], [])
    assert lanes.find(token) is None
    assert lanes.has_expired(token)


def test_a_settled_token_is_not_an_expired_one() -> None:
    lanes = window()
    (held,) = arrive(lanes, incoming(1))
    take(lanes)
    lanes.done(held)

    assert lanes.find(held.token) is None
    assert not lanes.has_expired(held.token)
    assert lanes.has_given(held.token)


def test_each_delivery_has_a_token_of_its_own() -> None:
    lanes = window()
    arrive(lanes, incoming(1))
    (held,) = take(lanes)
    before = held.token
    lanes.back(held)
    (held,) = take(lanes)

    assert held.token != before
    assert lanes.find(before) is None


@pytest.mark.parametrize(
    "token", ["", "1", "billing.0a1b.", "billing.0a1b.0", "billing.0a1b.2", "billing.0a1b.01",
              "billing.0a1b.+1", "billing.0a1b. 1", "billing.0a1b.0x1", "billing.ffff.1",
              "billing.0a1b.1_1", "billing.0a1b.\u0661"],
)  # fmt: skip
def test_only_a_token_that_was_given_is_one(token: str) -> None:
    lanes = window()
    arrive(lanes, incoming(1))
    take(lanes)

    assert lanes.has_given("billing.0a1b.1")
    assert not lanes.has_given(token)


def test_extending_moves_the_end_of_the_lease_both_ways() -> None:
    lanes = window()
    arrive(lanes, incoming(1), incoming(2))
    longer, shorter = take(lanes, until=10.0)
    lanes.extend(longer, 20.0)
    lanes.extend(shorter, 5.0)

    assert lanes.next_time() == 5.0
    assert lanes.due(10.0) == [shorter]
    assert lanes.next_time() == 20.0
    assert lanes.due(20.0) == [longer]


def test_a_clear_makes_every_token_void() -> None:
    lanes = window()
    arrive(lanes, incoming(1, "a"), incoming(2, "a"), incoming(3, "b"))
    first, _ = take(lanes)
    lanes.retry(first, 5.0)
    forgotten = lanes.clear()

    assert sequences(forgotten) == [1, 2, 3]
    assert not any(lanes.holds(held) for held in forgotten)
    assert lanes.find("billing.0a1b.2") is None
    assert lanes.has_given("billing.0a1b.2")
    assert inside(lanes) == EMPTY


# -- what is no event


def test_what_is_no_event_leaves_at_once_and_is_never_handed_over() -> None:
    lanes = window()
    (held,) = arrive(lanes, garbage(1))
    arrive(lanes, incoming(2))

    assert held.state is State.LEAVING
    assert lanes.leaving == 1
    assert sequences(take(lanes)) == [2]


# -- bounds


def test_a_failing_key_with_a_full_window_behind_it_lets_others_be_fetched() -> None:
    lanes = window(max_in_flight=16)
    arrive(lanes, *(incoming(n, "failing") for n in range(16)))
    full = lanes.room
    (head,) = take(lanes)
    lanes.retry(head, 5.0)

    assert full == 0
    assert lanes.room == 16


def test_a_failing_key_is_counted_apart_also_while_it_is_tried_again() -> None:
    lanes = window(max_in_flight=16)
    arrive(lanes, *(incoming(n, "failing") for n in range(16)))
    (head,) = take(lanes)
    lanes.retry(head, 5.0)
    lanes.due(5.0)
    take(lanes)

    assert lanes.room == 16


def test_a_backlog_of_failing_keys_is_bounded_too() -> None:
    lanes = window(max_in_flight=16)
    numbers = itertools.count()
    arrive(lanes, incoming(next(numbers), "failing"))
    lanes.retry(take(lanes)[0], 5.0)
    while lanes.room:
        arrive(lanes, *(incoming(next(numbers), "failing") for _ in range(lanes.room)))

    assert len(lanes) == HELD_FACTOR * 16


def test_room_is_never_negative_when_a_failing_key_recovers() -> None:
    lanes = window(max_in_flight=4)
    arrive(lanes, *(incoming(n, "failing") for n in range(4)))
    (head,) = take(lanes)
    lanes.retry(head, 5.0)
    arrive(lanes, *(incoming(n, f"other {n}") for n in range(4, 8)))
    lanes.due(5.0)
    lanes.done(head)

    assert len(lanes) == 7
    assert lanes.room == 0


# -- giving back


def test_what_waits_behind_a_delivery_that_stays_is_not_given_back_before_it() -> None:
    lanes = window()
    arrive(lanes, incoming(1, "a"), incoming(2, "b"), incoming(3, "a"), incoming(4, "b"))
    lanes.take(1, "app", LEASE)
    given = lanes.give_back(but={State.OUT})

    assert sequences(given) == [2, 4]
    assert sequences(list(lanes.held(1 << 60))) == [1, 3]
    assert lanes.lanes == 1


def test_giving_all_back_leaves_nothing() -> None:
    lanes = window()
    held = arrive(lanes, *(incoming(n, "abc"[n % 3]) for n in range(9)), garbage(9))
    first, second, _ = take(lanes)
    lanes.retry(first, 5.0)
    lanes.bury(second)
    given = lanes.give_back()

    assert given == held
    assert lanes.next_time() is None
    assert inside(lanes) == EMPTY


# -- cost and memory


def test_the_leases_of_settled_deliveries_do_not_pile_up() -> None:
    lanes = window()
    for number in range(10_000):
        arrive(lanes, incoming(number, "a"))
        (held,) = take(lanes, until=LEASE + number)
        lanes.extend(held, 2 * LEASE + number)
        lanes.done(held)

    assert inside(lanes)["_timers"] < 200
    assert lanes.next_time() is None
    assert inside(lanes) == EMPTY


def test_what_is_remembered_is_bounded() -> None:
    recent: Recent[int] = Recent(100)
    for number in range(1000):
        recent.put(number, number)

    assert [recent.get(number, -1) for number in range(900, 1000)] == [*range(900, 1000)]
    assert recent.get(1, -1) == -1
    assert len(recent) < 200


@given(st.lists(st.integers(0, 12)), st.integers(1, 5))
def test_the_newest_are_remembered_whatever_comes(keys: list[int], limit: int) -> None:
    recent: Recent[int] = Recent(limit)
    values = {}
    for age, key in enumerate(keys):
        recent.put(key, age)
        values[key] = age
        newest = list(dict.fromkeys(reversed(keys[: age + 1])))[:limit]

        assert all(recent.get(k, -1) == values[k] for k in newest)
        assert len(recent) < 2 * limit


def _seconds_per_event(held: int, rounds: int) -> float:
    """Take and ack one event, and let one in, with so many others here and out."""
    lanes = window(max_in_flight=10 * held)
    numbers = itertools.count()
    arrive(lanes, *(incoming(n, f"key {n % (held // 2)}") for n in itertools.islice(numbers, held)))
    batches = [
        [incoming(n, f"key {n % (held // 2)}") for n in itertools.islice(numbers, 100)]
        for _ in range(rounds // 100)
    ]
    started = time.perf_counter()
    for batch in batches:
        for event in batch:
            lanes.arrived(event)
        taken = take(lanes, 100)
        lanes.next_time()
        for one in taken:
            lanes.done(one)
    return (time.perf_counter() - started) / rounds


def test_the_cost_of_an_event_does_not_grow_with_the_number_held() -> None:
    """Nor with what is remembered. A walk over what is here would cost a thousand times more."""
    small = min(_seconds_per_event(64, 2 * REMEMBERED) for _ in range(3))
    large = min(_seconds_per_event(64_000, 2 * REMEMBERED) for _ in range(3))

    assert large < 10 * small


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["abc", "ab", ""]), max_size=60), st.integers(1, 8))
def test_whatever_arrives_is_handed_over_once(kinds: list[str], limit: int) -> None:
    lanes = window()
    for number, kind in enumerate(kinds):
        lanes.arrived(incoming(number, kind))
    seen: list[Any] = []
    while taken := take(lanes, limit):
        seen += sequences(taken)
        for held in taken:
            lanes.done(held)

    assert sorted(seen) == list(range(len(kinds)))
    assert lanes.next_time() is None
    assert inside(lanes) == EMPTY


# -- suspects


@pytest.mark.parametrize("how", ["give_back", "revoke"])
def test_suspects_that_went_and_came_again_are_handed_over_all_the_same(how: str) -> None:
    """Whichever of them was next: it is not waited for."""
    lanes = Window(ordered=True, max_in_flight=10, token_prefix=PREFIX)
    arrive(lanes, *[incoming(n, f"k{n}") for n in range(3)])
    out = lanes.take(3, "app", 10.0)
    for held in reversed(out):  # the last to arrive is the first suspect
        lanes.crashed(held)
        lanes.retry(held, 0.0)
        lanes.due(0.0)
    if how == "give_back":
        lanes.give_back()
    else:
        lanes.revoke([0, 1, 2])
    arrive(lanes, *[incoming(n, f"k{n}", attempts=1, crashes=1) for n in range(3)])
    seen = []
    for _ in range(3):
        (held,) = lanes.take(3, "app", 20.0)
        seen.append(held.incoming.identity)
        lanes.done(held)

    assert seen == [0, 1, 2]
    assert lanes.suspects == 0

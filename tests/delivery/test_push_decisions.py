"""What push decides: how many at once, whether the app is there, what an answer means."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sidecar.delivery.push.answers import MAX_RETRY_AFTER_SECONDS, Answer, meaning, retry_after
from sidecar.delivery.push.circuit import FAILURES, PROBE_SECONDS, REFUSALS, Circuit, State
from sidecar.delivery.push.concurrency import Concurrency
from sidecar.event import Verdict

# -- how many at once

HAPPENINGS = st.lists(
    st.tuples(st.sampled_from(["good", "slow", "back", "restart"]), st.floats(0.0001, 10)),
    max_size=200,
)


@given(most=st.integers(1, 100), happenings=HAPPENINGS)
def test_there_is_always_one_and_never_more_than_the_most(
    most: int, happenings: list[tuple[str, float]]
) -> None:
    limit = Concurrency(most)
    now = 0.0
    for what, seconds in happenings:
        now += seconds
        before = limit.limit
        if what == "back":
            limit.pushed_back(now - seconds, now)
            assert limit.limit <= before
        elif what == "restart":
            limit.restart()
            assert limit.limit == 1
        else:
            took = 0.01 if what == "good" else seconds
            limit.succeeded(took, under_way=limit.limit)
            assert before <= limit.limit <= before + 1

        assert 1 <= limit.limit <= most


@given(most=st.integers(1, 100), happenings=HAPPENINGS)
def test_whatever_happened_an_app_that_is_well_gets_the_most_again(
    most: int, happenings: list[tuple[str, float]]
) -> None:
    limit = Concurrency(most)
    now = 0.0
    for what, seconds in happenings:
        now += seconds
        if what == "back":
            limit.pushed_back(now - seconds, now)
        elif what != "restart":
            limit.succeeded(0.01 if what == "good" else seconds, under_way=limit.limit)
    for _ in range(most * most + 3000):  # one more takes as many successes as there are
        limit.succeeded(0.01, under_way=limit.limit)

    assert limit.limit == most


def test_one_burst_of_refusals_halves_it_once() -> None:
    limit = Concurrency(64)
    while limit.limit < 64:
        limit.succeeded(0.01, under_way=limit.limit)
    for _ in range(64):
        limit.pushed_back(begun=10.0, now=11.0)
    once = limit.limit
    limit.pushed_back(begun=11.5, now=12.0)

    assert (once, limit.limit) == (32, 16)


def test_an_app_that_becomes_slow_gets_no_more() -> None:
    limit = Concurrency(64)
    for _ in range(20):
        limit.succeeded(0.01, under_way=limit.limit)
    before = limit.limit
    for _ in range(50):
        limit.succeeded(0.2, under_way=limit.limit)

    assert limit.limit <= before + 1


def test_what_is_not_used_does_not_grow() -> None:
    limit = Concurrency(64)
    for _ in range(100):
        limit.succeeded(0.01, under_way=1)

    assert limit.limit == 4


# -- whether it is there


class Clock:
    now = 100.0


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["works", "fails", "unreachable", "probe ok", "probe fails"]),
        st.floats(0, 10),
    ),
    max_size=100,
)


@given(EVENTS, st.integers())
def test_it_opens_only_for_a_reason_and_closes_only_by_an_answer(
    events: list[tuple[str, float]], seed: int
) -> None:
    circuit = Circuit(random.Random(seed))
    now, refusals, failures = 0.0, 0, 0
    for what, seconds in events:
        now += seconds
        before = circuit.state
        if what.startswith("probe"):
            circuit.probed("" if what == "probe ok" else "refused", now)
            if before is State.OPEN:
                assert circuit.state is (State.HALF_OPEN if what == "probe ok" else State.OPEN)
            else:
                assert circuit.state is before
        elif what == "works":
            circuit.answered(works=True, now=now)
            refusals = failures = 0
            assert circuit.state is State.CLOSED
            assert circuit.detail == ""
        else:
            refusals = refusals + 1 if what == "unreachable" else 0
            failures += what == "fails"
            if what == "unreachable":
                circuit.unreachable("refused", now)
            else:
                circuit.answered(works=False, now=now, why="503")
            opened = circuit.state is State.OPEN and before is not State.OPEN
            reason = before is State.HALF_OPEN or refusals >= REFUSALS or failures >= FAILURES
            assert not opened or reason
            assert opened or before is State.OPEN or not reason
        if circuit.state is State.OPEN:
            if before is not State.OPEN:
                refusals = failures = 0
            assert circuit.detail
            assert (
                0 < circuit.probe_at - now + 10 + seconds <= PROBE_SECONDS[1] * 1.2 + 10 + seconds
            )


def test_probes_come_less_often_the_longer_it_is_down() -> None:
    circuit = Circuit(random.Random(1))
    circuit.unreachable("refused", 0.0)
    circuit.unreachable("refused", 0.0)
    pauses, now = [circuit.probe_at], circuit.probe_at
    for _ in range(8):
        circuit.probed("refused", now)
        pauses.append(circuit.probe_at - now)
        now = circuit.probe_at

    assert pauses == [pytest.approx(p, rel=0.21) for p in (0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5)]


# -- what an answer means


@given(st.integers(200, 599), st.text(max_size=20))
def test_every_status_has_one_meaning(status: int, after: str) -> None:
    said = meaning(Answer(status, after), now=0.0)
    if status < 300:
        expected = Verdict.ACK
    elif status in {408, 425, 429} or status >= 500:
        expected = Verdict.NACK
    else:
        expected = Verdict.REJECT

    assert said.verdict is expected
    assert said.pushed_back == (status in {429, 503})
    assert said.reason == "" if status < 300 else said.reason.startswith(f"{status}: ")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2", 2),
        (" 0 ", 0),
        ("999999", MAX_RETRY_AFTER_SECONDS),
        ("9" * 400, MAX_RETRY_AFTER_SECONDS),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    assert retry_after(value, now=60.0) == seconds

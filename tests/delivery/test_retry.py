"""When a failed delivery is tried again, and when no more."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sidecar.config import Retry
from sidecar.delivery.retry import delay_before, used_up

STEADY = Retry(initial_seconds=0.2, max_seconds=30, multiplier=2, jitter=0)


@pytest.mark.parametrize(
    ("attempt", "seconds"),
    [(2, 0.2), (3, 0.4), (4, 0.8), (5, 1.6), (9, 25.6), (10, 30), (11, 30), (1000, 30)],
)
def test_delays_double_from_the_first_up_to_the_longest(attempt: int, seconds: float) -> None:
    assert delay_before(attempt, STEADY, random.Random(1)) == pytest.approx(seconds)


def test_a_thousand_attempts_of_the_steepest_policy_do_not_overflow() -> None:
    steep = Retry(max_attempts=1000, initial_seconds=86400, max_seconds=86400, multiplier=100)

    assert delay_before(1000, steep, random.Random(1)) <= 86400 * 1.2


def test_no_first_delay_is_no_delay_ever() -> None:
    at_once = Retry(initial_seconds=0, max_seconds=30, multiplier=100)

    assert delay_before(7, at_once, random.Random(1)) == 0
    assert delay_before(1000, at_once, random.Random(1)) == 0


@given(st.integers(2, 1000), st.floats(0, 1), st.integers())
def test_jitter_spreads_up_and_down_by_its_part_and_no_more(
    attempt: int, jitter: float, seed: int
) -> None:
    policy = Retry(initial_seconds=0.2, max_seconds=30, multiplier=2, jitter=jitter)
    middle = delay_before(attempt, STEADY, random.Random(seed))
    delay = delay_before(attempt, policy, random.Random(seed))

    assert middle * (1 - jitter) - 1e-9 <= delay <= middle * (1 + jitter) + 1e-9


@pytest.mark.parametrize(
    ("attempt", "max_attempts", "is_last"),
    [(1, 1, True), (1, 2, False), (2, 2, True), (4, 5, False), (5, 5, True), (6, 5, True)],
)
def test_max_attempts_is_the_number_of_deliveries(
    attempt: int,
    max_attempts: int,
    is_last: bool,  # noqa: FBT001
) -> None:
    """Later ones happen when another sidecar had been at it: they are the last as well."""
    assert used_up(attempt, Retry(max_attempts=max_attempts)) is is_last

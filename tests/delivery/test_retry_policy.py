"""What follows from a failure, whatever the policy and the app say."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sidecar.broker import Failures, Incoming
from sidecar.config import Retry, RetryRule
from sidecar.delivery.held import Held
from sidecar.delivery.retry import Again, Failure, GiveUp, RetryPolicy

SECOND = 1_000_000_000
NACK = "attempts_exhausted"


def held(attempt: int = 1, *, crashes: int = 0, first_ns: int = 1, postponed: int = 0) -> Held:
    one = Held(Incoming("t", 1, 1, None), "", Failures(attempt, crashes, first_ns))
    one.postponed = postponed
    return one


def policy(**settings: Any) -> RetryPolicy:
    return RetryPolicy(Retry(**{"jitter": 0, **settings}), random.Random(1))


def rule(reason: str, action: Any, delay: float | None = None) -> RetryRule:
    return RetryRule(reason=reason, action=action, delay_seconds=delay)


REASONS = st.sampled_from([NACK, "lease_expired", "app_crash"])


@given(
    reason=REASONS,
    attempt=st.integers(1, 1100),
    most=st.integers(1, 1000),
    crashes=st.integers(0, 15),
    most_crashes=st.integers(1, 15),
    delay=st.none() | st.floats(0, 100),
    uncounted=st.booleans(),
)
def test_an_event_is_given_up_when_and_only_when_one_of_its_counts_is_used_up(  # noqa: PLR0917
    reason: str,
    attempt: int,
    most: int,
    crashes: int,
    most_crashes: int,
    delay: float | None,
    uncounted: bool,  # noqa: FBT001
) -> None:
    rules = policy(max_attempts=most, max_crashes=most_crashes)
    answer = rules.after(
        Failure(reason, "", delay, uncounted), held(attempt, crashes=crashes), now_ns=2
    )
    crashed_too_often = reason == "app_crash" and crashes >= most_crashes
    failed_too_often = attempt >= most and not uncounted

    assert isinstance(answer, GiveUp) == (crashed_too_often or failed_too_often)
    if isinstance(answer, GiveUp):
        assert answer.reason == reason
    else:
        assert answer.uncounted == uncounted
        assert delay is None or answer.delay == delay


@pytest.mark.parametrize(("age", "gives_up"), [(9.9, False), (10.1, True)])
def test_an_event_is_given_up_so_long_after_its_first_failure(
    age: float,
    gives_up: bool,  # noqa: FBT001
) -> None:
    now = 5 + int(age * SECOND)
    answer = policy(total_seconds=10).after(Failure(NACK, ""), held(first_ns=5), now_ns=now)

    assert isinstance(answer, GiveUp) == gives_up


def test_not_now_is_bounded_by_the_total_time_too() -> None:
    failure = Failure(NACK, "", 0.0, uncounted=True)
    answer = policy(total_seconds=10).after(failure, held(first_ns=5), now_ns=11 * SECOND)

    assert answer == GiveUp(NACK)


def test_the_first_rule_that_matches_the_reason_decides() -> None:
    rules = policy(rules=[rule("5??", "retry", 7), rule("503", "reject"), rule("4*", "reject")])

    assert rules.after(Failure(NACK, "503"), held(), 2) == Again(7, uncounted=False)
    assert rules.after(Failure(NACK, "404: no such order"), held(), 2) == GiveUp("rejected")
    assert rules.after(Failure(NACK, "5000"), held(), 2) == Again(0.2, uncounted=False)


def test_a_rule_sees_what_is_before_the_colon_and_nothing_else() -> None:
    rules = policy(rules=[rule("BUSY", "retry_uncounted")])

    assert rules.after(Failure(NACK, "BUSY: 12 waiting"), held(), 2) == Again(0.2, uncounted=True)
    assert rules.after(Failure(NACK, "BUSYNESS"), held(), 2) == Again(0.2, uncounted=False)
    assert rules.after(Failure(NACK, "I am BUSY"), held(), 2) == Again(0.2, uncounted=False)


def test_rules_are_for_what_the_app_says_not_for_its_silence() -> None:
    rules = policy(rules=[rule("*", "reject")])

    assert rules.after(Failure("lease_expired", "x"), held(), 2) == Again(0.2, uncounted=False)
    assert rules.after(Failure("app_crash", "x"), held(), 2) == Again(0.2, uncounted=False)


def test_the_apps_delay_goes_before_the_rules_and_that_before_the_policys() -> None:
    rules = policy(rules=[rule("BUSY", "retry_uncounted", 3.0)])

    assert rules.after(Failure(NACK, "BUSY", 1.0), held(), 2) == Again(1.0, uncounted=True)
    assert rules.after(Failure(NACK, "BUSY"), held(), 2) == Again(3.0, uncounted=True)


def test_what_is_not_counted_waits_longer_each_time_all_the_same() -> None:
    rules = policy(initial_seconds=1, max_seconds=60)
    failure = Failure(NACK, "", None, uncounted=True)
    delays = [rules.after(failure, held(postponed=n), 2) for n in range(4)]

    assert [a.delay for a in delays if isinstance(a, Again)] == [1, 2, 4, 8]

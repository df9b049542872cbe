"""What follows from a failed delivery: another try, when, and whether it counts; or none. No I/O."""

from __future__ import annotations

import re
from fnmatch import translate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random

    from sidecar.config import Retry
    from sidecar.delivery.held import Held


class Failure(NamedTuple):
    """What is known of a delivery that failed."""

    reason: str
    """Of the dead letter, should this be the end: attempts_exhausted, lease_expired, app_crash."""
    error: str
    """What the app said, or what was wrong; retry rules see what is before the first colon."""
    delay: float | None = None
    """Seconds, where the app named them."""
    uncounted: bool = False


class Again(NamedTuple):
    """Try it again after so many seconds."""

    delay: float
    uncounted: bool


class GiveUp(NamedTuple):
    """It is a dead letter."""

    reason: str


class RetryPolicy:
    """
    What a subscription's settings say of its failures.

    The first rule that matches a nack's reason decides whether it is hopeless, and whether it
    counts. An event is given up after `max_attempts` deliveries that counted, after `max_crashes`
    crashes of the app, and `total_seconds` after its first failure. The app's own delay goes before
    a rule's, that before the policy's.
    """

    def __init__(self, settings: Retry, spread: random.Random) -> None:
        self._settings = settings
        self._spread = spread
        self._rules = [(re.compile(translate(rule.reason)), rule) for rule in settings.rules]

    def after(self, failure: Failure, held: Held, now_ns: int) -> Again | GiveUp:
        """*held* has this failure in its counts already, with when it failed first (ns)."""
        settings = self._settings
        delay, uncounted = failure.delay, failure.uncounted
        if self._rules and failure.reason == "attempts_exhausted":
            code = failure.error.partition(":")[0].strip()
            rule = next((rule for matches, rule in self._rules if matches.match(code)), None)
            if rule is not None:
                if rule.action == "reject":
                    return GiveUp("rejected")
                uncounted = uncounted or rule.action == "retry_uncounted"
                delay = rule.delay_seconds if delay is None else delay
        if failure.reason == "app_crash" and held.crashes >= settings.max_crashes:
            return GiveUp("app_crash")
        if not uncounted and used_up(held.attempt, settings):
            return GiveUp(failure.reason)
        total_ns = settings.total_seconds * 1e9
        if total_ns and now_ns - held.first_failed > total_ns:
            return GiveUp(failure.reason)
        if delay is None:
            tries = held.attempt + held.postponed + 1
            delay = delay_before(tries, settings, self._spread)
        return Again(delay, uncounted)


def delay_before(attempt: int, policy: Retry, spread: random.Random) -> float:
    """
    Seconds to wait before delivery number *attempt* (2 is the first retry).

    Exponential from `initial_seconds`, at most `max_seconds`, spread by `jitter` up and down.
    """
    try:
        delay = min(policy.initial_seconds * policy.multiplier ** (attempt - 2), policy.max_seconds)
    except OverflowError:  # a steep policy, after many attempts
        delay = policy.max_seconds if policy.initial_seconds else 0.0
    return delay * (1 + policy.jitter * (2 * spread.random() - 1))


def used_up(attempt: int, policy: Retry) -> bool:
    """Delivery number *attempt* was the last."""
    return attempt >= policy.max_attempts

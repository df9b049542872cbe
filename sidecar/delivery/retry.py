"""When a failed delivery is tried again, and when it has been tried enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from sidecar.config import Retry


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

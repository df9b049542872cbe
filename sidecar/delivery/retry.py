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
    # The exponent is bounded so that a thousand attempts do not overflow.
    growth = policy.multiplier ** min(attempt - 2, 200)
    delay = min(policy.initial_seconds * growth, policy.max_seconds)
    return delay * (1 + policy.jitter * (2 * spread.random() - 1))


def used_up(attempt: int, policy: Retry) -> bool:
    """Delivery number *attempt* was the last."""
    return attempt >= policy.max_attempts

"""Waiting for what a test expects: a condition under a deadline, never a fixed time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PAUSE_SECONDS = 0.005


async def until(
    condition: Callable[[], bool | Awaitable[bool]], *, seconds: float = 10, what: str = ""
) -> None:
    """
    Return as soon as *condition* holds; fail the test when it does not within *seconds*.

    The one place that polls: for conditions that nobody announces (a server's counters, another
    process). Where there is something to await, await that. *what* is said in the failure.
    """
    try:
        async with asyncio.timeout(seconds):
            while True:
                holds = condition()
                if holds is True or (not isinstance(holds, bool) and await holds):
                    return
                await asyncio.sleep(PAUSE_SECONDS)
    except TimeoutError:
        raise AssertionError(f"not within {seconds:g} s: {what or condition}") from None

"""How long a claim may be used, and when it may be taken over: decisions, told the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

USE_SECONDS = 8.0
"""From when it was made, its owner begins to publish for so long at most."""
ROOM_SECONDS = 1.0
"""What a publish waits for room in its queue, at most."""
MARGIN_SECONDS = 2.0


def good_for(publish_seconds: float) -> float:
    """
    Seconds after which what a claim's owner published has arrived, or never will.

    *publish_seconds*: what the broker's client may take for a publish, also one that we gave up.
    The claim carries it, because another sidecar's settings may differ from ours.
    """
    return USE_SECONDS + ROOM_SECONDS + publish_seconds + MARGIN_SECONDS


def may_use(made: float, now: float) -> bool:
    """Whether the owner of a claim, made at *made*, may begin to publish what it claimed."""
    return now - made < USE_SECONDS


class Watch:
    """
    Since when each claim has been seen. Seconds are of any monotonic clock of this process.

    A claim that was watched, unchanged, for as long as it is good may be taken over: its owner is
    dead, or publishes no more. That it was made earlier than it was seen is on the safe side.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def seen(self, claims: Mapping[str, float], now: float) -> None:
        """These hold something, and are good for so long; the others are over."""
        self._since = {claim: self._since.get(claim, now) for claim in claims}

    def may_take_over(self, claim: str, good_seconds: float, now: float) -> bool:
        since = self._since.get(claim)
        return since is not None and now - since >= good_seconds

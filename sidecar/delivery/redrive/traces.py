"""Whether a dead letter was published by a claim that nobody answers for: its trace in the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sidecar.delivery.redrive.letter import REDRIVE_ID, log_key
from sidecar.wire.timestamps import now_ns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sidecar.broker import Broker
    from sidecar.delivery.redrive.letter import DeadLetter
    from sidecar.delivery.redrive.marks import Doubt, Target

PAGE = 500


class Traces:
    """The ids of the dead letters that were published to some targets since some claims were made."""

    def __init__(self, brokers: Mapping[str, Broker]) -> None:
        self._brokers = brokers
        self._seen: dict[tuple[str, str], _Seen] = {}

    async def look(self, doubts: Iterable[Doubt]) -> None:
        """Read the targets of *doubts*, to their ends now. Raises BrokerUnavailable, BrokerRefused."""
        starts: dict[tuple[str, str], list[dict[str, int] | None]] = {}
        for doubt in doubts:
            starts.setdefault(_place(doubt.target), []).append(doubt.target.ends)
        for place, ends in starts.items():
            self._seen[place] = await self._see(*place, ends)

    def has(self, letter: DeadLetter, doubts: Iterable[Doubt]) -> bool:
        return any(str(letter.id) in self._seen[_place(doubt.target)].ids for doubt in doubts)

    def can_tell(self, doubts: Iterable[Doubt], going: Target) -> bool:
        """
        Whether what is not found was not published.

        Or would be told as a duplicate if it is published there again: the broker's window is
        counted by half, as the clocks of two machines differ.
        """
        for doubt in doubts:
            seen = self._seen[_place(doubt.target)]
            age = (now_ns() - doubt.time_ns) / 1e9
            told = _place(going) == _place(doubt.target) and 0 <= age < seen.duplicate_seconds / 2
            if not (seen.is_complete or told):
                return False
        return True

    async def _see(self, broker: str, topic: str, since: list[dict[str, int] | None]) -> _Seen:
        seen = _Seen()
        target = self._brokers.get(broker)
        if target is None or not target.capabilities.browses:
            return seen
        starts: dict[str, int] = {}
        for ends in since:
            for key, end in (ends or {}).items():
                starts[key] = min(end, starts.get(key, end))
        logs = {log_key(each): each for each in await target.logs(topic)}
        seen.duplicate_seconds = min((e.duplicate_seconds for e in logs.values()), default=0.0)
        seen.is_complete = None not in since and all(
            key in logs and logs[key].first <= start and not logs[key].may_have_gaps
            for key, start in starts.items()
        )
        for key, each in logs.items():
            at = max(each.first, starts.get(key, each.first))
            while at < each.end and (page := await target.read(each, at, PAGE)):
                at = page[-1].number + 1
                seen.ids |= {s.event.headers.get(REDRIVE_ID, "") for s in page if s.event}
        return seen


class _Seen:
    """What one target has."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.is_complete = False
        """All that was stored since is still there."""
        self.duplicate_seconds = 0.0


def _place(target: Target) -> tuple[str, str]:
    return target.broker, target.topic

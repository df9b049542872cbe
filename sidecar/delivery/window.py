"""What a subscription holds here: lanes by key, leases, retries. Decides; does no I/O."""

from __future__ import annotations

import enum
import heapq
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from sidecar.broker import Incoming

REMEMBERED = 10_000
"""Acked events that are known again when their ack was lost and the broker sends them anew."""


class State(enum.Enum):
    WAITING = "waiting"  # behind another of its lane
    READY = "ready"
    OUT = "out"  # handed over; its lease runs
    RETRY = "retry"  # failed; waits for its time
    LEAVING = "leaving"  # on its way to the dead letters


class Held:
    """One event in the window. Changed by Window only."""

    __slots__ = (
        "attempt",
        "consumer",
        "due",
        "first_failed",
        "incoming",
        "key",
        "last_error",
        "state",
        "token",
    )

    def __init__(self, incoming: Incoming, key: str, attempt: int) -> None:
        self.incoming = incoming
        self.key = key
        self.attempt = attempt
        """Deliveries that count so far; while out, the number of this one."""
        self.state = State.WAITING
        self.token = ""
        self.due = 0.0
        """Loop time: the lease's end while out, the next try while it waits for one."""
        self.consumer: object = None
        self.first_failed = 0
        """ns since 1970; 0: never failed."""
        self.last_error = ""


class Window:
    """
    The events of one subscription that are here, at most `max_in_flight`.

    An event moves: waiting → ready → out → gone, or out → retry → ready …, or out → leaving → gone.
    Of one key, only the first is ever anything but waiting: that is the order per key, and why a
    failing key holds back only itself.

    Non-obvious: `_timers` is a heap with stale entries; an entry counts only while the event's
    `due` equals it, so extending a lease costs a push and no search.
    """

    def __init__(self, *, ordered: bool, max_in_flight: int, token_prefix: str) -> None:
        self._ordered = ordered
        self._max = max_in_flight
        self._prefix = token_prefix
        self._numbers = 0
        self._held: dict[int, Held] = {}
        self._identities: dict[Hashable, Held] = {}
        self._lanes: dict[str, deque[Held]] = {}
        self._ready: deque[Held] = deque()
        self._out: dict[str, Held] = {}
        self._timers: list[tuple[float, int, Held]] = []
        self._timer_numbers = 0
        self._acked: dict[Hashable, None] = {}
        self._expired: dict[str, None] = {}
        self.retrying = 0

    # -- how much there is

    def __len__(self) -> int:
        return len(self._held)

    @property
    def room(self) -> int:
        return self._max - len(self._held)

    @property
    def out(self) -> int:
        return len(self._out)

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    @property
    def ready(self) -> int:
        return len(self._ready)

    @property
    def has_ready(self) -> bool:
        return bool(self._ready)

    def holds(self, held: Held) -> bool:
        return id(held) in self._held

    def held(self) -> Iterator[Held]:
        return iter(self._held.values())

    # -- in

    def arrived(self, incoming: Incoming, attempt: int) -> Held | None:
        """
        Take an event in; *attempt* counts its deliveries so far.

        None when it is here already (the broker's claim on it ran out): it now answers for both.
        """
        identity = incoming.identity
        if identity is not None:
            known = self._identities.get(identity)
            if known is not None:
                known.incoming = incoming
                return None
        event = incoming.event
        key = event.key if self._ordered and event is not None else ""
        held = Held(incoming, key, attempt)
        self._held[id(held)] = held
        if identity is not None:
            self._identities[identity] = held
        if key:
            lane = self._lanes.get(key)
            if lane is not None:
                lane.append(held)
                return held
            self._lanes[key] = deque((held,))
        held.state = State.READY
        self._ready.append(held)
        return held

    def was_acked(self, identity: Hashable) -> bool:
        """The app acked this event, and the ack did not reach the broker: ack it again."""
        return identity in self._acked

    # -- out to a consumer

    def take(self, limit: int, consumer: object, lease_end: float) -> list[Held]:
        """Hand over up to *limit* events: each gets its token and its lease."""
        taken: list[Held] = []
        ready = self._ready
        while ready and len(taken) < limit:
            held = ready.popleft()
            self._numbers += 1
            token = f"{self._prefix}{self._numbers:x}"
            held.state = State.OUT
            held.token = token
            held.consumer = consumer
            held.attempt += 1
            self._out[token] = held
            taken.append(held)
            held.due = lease_end
            self._push(held)
        return taken

    def find(self, token: str) -> Held | None:
        """The delivery of a token, while it is out."""
        return self._out.get(token)

    def has_expired(self, token: str) -> bool:
        """The token's lease ended unsettled (remembered for the newest of them)."""
        return token in self._expired

    def extend(self, held: Held, lease_end: float) -> None:
        held.due = lease_end
        self._push(held)

    # -- what became of it

    def done(self, held: Held) -> None:
        """Gone for good: acked, or stored as a dead letter. Its lane moves on."""
        identity = held.incoming.identity
        self.gone(held)
        if identity is not None:
            self._acked[identity] = None
            if len(self._acked) > REMEMBERED:
                del self._acked[next(iter(self._acked))]

    def gone(self, held: Held) -> None:
        """Not here any more: given back to the broker, or done."""
        self._leave_state(held)
        del self._held[id(held)]
        identity = held.incoming.identity
        if identity is not None:
            self._identities.pop(identity, None)
        if held.key:
            self._leave_lane(held)

    def retry(self, held: Held, at: float, *, uncounted: bool = False) -> None:
        """Try again at loop time *at*; its lane waits."""
        self._leave_state(held)
        if uncounted:
            held.attempt -= 1
        held.state = State.RETRY
        held.due = at
        self.retrying += 1
        self._push(held)

    def back(self, held: Held) -> None:
        """Untouched by its consumer, who left: first in line again, and the attempt not counted."""
        self._leave_state(held)
        held.attempt -= 1
        held.state = State.READY
        self._ready.appendleft(held)

    def leaving(self, held: Held) -> None:
        """On its way to the dead letters: not out any more, its lane waits."""
        self._leave_state(held)
        held.state = State.LEAVING
        held.due = 0.0

    # -- time

    def next_time(self) -> float | None:
        """When something is due next, in loop time."""
        timers = self._timers
        while timers and timers[0][2].due != timers[0][0]:
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def due(self, now: float) -> list[Held]:
        """Make due retries ready; return the deliveries whose lease has ended, still out."""
        expired = []
        timers = self._timers
        while timers and timers[0][0] <= now:
            due, _, held = heapq.heappop(timers)
            if held.due != due:
                continue
            held.due = 0.0
            if held.state is State.RETRY:
                self.retrying -= 1
                held.state = State.READY
                self._ready.append(held)
            elif held.state is State.OUT:
                self._expired[held.token] = None
                if len(self._expired) > REMEMBERED:
                    del self._expired[next(iter(self._expired))]
                expired.append(held)
        return expired

    def out_to(self, consumer: object) -> list[Held]:
        """What a consumer has, oldest first."""
        return [held for held in self._out.values() if held.consumer is consumer]

    def clear(self) -> list[Held]:
        """Forget everything: the subscription was moved. Tokens are void."""
        held = list(self._held.values())
        for one in held:
            one.due = 0.0
        self._held.clear()
        self._identities.clear()
        self._lanes.clear()
        self._ready.clear()
        self._out.clear()
        self._timers.clear()
        self._acked.clear()
        self.retrying = 0
        return held

    # -- inside

    def _push(self, held: Held) -> None:
        self._timer_numbers += 1
        heapq.heappush(self._timers, (held.due, self._timer_numbers, held))
        # Acked events leave their leases behind: sweep before they outnumber what is here.
        if len(self._timers) > 64 + 4 * len(self._held):
            self._timers = [entry for entry in self._timers if entry[2].due == entry[0]]
            heapq.heapify(self._timers)

    def _leave_state(self, held: Held) -> None:
        if held.state is State.OUT:
            del self._out[held.token]
            held.consumer = None
        elif held.state is State.READY:
            self._ready.remove(held)
        elif held.state is State.RETRY:
            self.retrying -= 1
        held.due = 0.0

    def _leave_lane(self, held: Held) -> None:
        lane = self._lanes[held.key]
        if lane[0] is not held:
            lane.remove(held)
            return
        lane.popleft()
        if not lane:
            del self._lanes[held.key]
            return
        first = lane[0]
        first.state = State.READY
        self._ready.append(first)


def handles(held: Iterable[Held]) -> list[Hashable]:
    return [one.incoming.handle for one in held]

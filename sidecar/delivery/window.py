"""What a subscription holds here: lanes by key, leases, retries. Decides; does no I/O."""

from __future__ import annotations

from collections import Counter, deque
from itertools import takewhile
from typing import TYPE_CHECKING

from sidecar.broker import Failures
from sidecar.delivery.held import NOTHING, Held, Past, State, most
from sidecar.delivery.recent import Recent
from sidecar.delivery.timers import Timers

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence

    from sidecar.broker import Incoming

REMEMBERED = 10_000
"""Acked events that are known again when their ack was lost and the broker sends them anew."""
HELD_FACTOR = 4
"""Times max_in_flight: the most that is ever here, failing lanes and all."""


class Window:
    """
    The events of one subscription that are here.

    An event moves: waiting → ready → out → gone, or out → retry → ready …, or out → leaving → gone.
    Of one key, only the first is ever anything but waiting: that is the order per key, and why a
    failing key holds back only itself.

    Two bounds. At most *max_in_flight* events are here, not counting failing lanes: an event that
    has failed and what waits behind it (`stuck`). Their backlog would else fill the window, and
    nothing of another key would be fetched until it is done. With them, at most HELD_FACTOR times
    as many are here; a larger backlog of failing keys does hold the others back. An event that is
    done frees its lane, so the first bound may be exceeded then; nothing is fetched until it holds.
    The bound in bytes knows no such exception.

    *Suspects* are events that the app had in its hands so often when it crashed that the next time
    is the last. Only one of them is ready or out at a time: so the next crash tells which one it
    was, and those that were only near it are not given up with it.

    With *distinct*, events of one source and id share a lane, unless they have that of their key:
    so that a copy is not handed over before it is known what became of the first.
    """

    def __init__(
        self,
        *,
        ordered: bool,
        max_in_flight: int,
        token_prefix: str,
        max_bytes: int = 1 << 62,
        distinct: bool = False,
        suspect_from: int = 1,
    ) -> None:
        """*suspect_from*: so many crashes make an event a suspect."""
        self._ordered = ordered
        self._distinct = distinct
        self._suspect_from = suspect_from
        self._max = max_in_flight
        self._max_bytes = max_bytes
        self._prefix = token_prefix
        self._tokens = 0
        self._held: dict[int, Held] = {}
        self._identities: dict[Hashable, Held] = {}
        self._lanes: dict[str, deque[Held]] = {}
        self._ready: deque[Held] = deque()
        self._suspect: Held | None = None
        """The one that is ready or out."""
        self._suspects: deque[Held] = deque()
        """Those that are ready but for it."""
        self._out: dict[str, Held] = {}
        self._timers = Timers()
        self._acked: Recent[bool] = Recent(REMEMBERED)
        self._expired: Recent[bool] = Recent(REMEMBERED)
        self._past: Recent[Past] = Recent(REMEMBERED)
        self.retrying = 0
        self.leaving = 0
        self.stuck = 0
        self.bytes = 0
        self.arrivals = 0
        """How many ever came."""

    # -- how much there is

    def __len__(self) -> int:
        return len(self._held)

    @property
    def room(self) -> int:
        """How many events may be fetched now."""
        held = len(self._held)
        room = min(self._max - held + self.stuck, HELD_FACTOR * self._max - held)
        if room <= 0 or not held:
            return max(0, room)
        left = self._max_bytes - self.bytes
        # So many of the mean size of those that are here.
        return min(room, max(1, left * held // self.bytes)) if left > 0 else 0

    @property
    def out(self) -> int:
        return len(self._out)

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    @property
    def ready(self) -> int:
        """How many may be handed over now."""
        return len(self._ready)

    @property
    def suspects(self) -> int:
        """How many more would be ready, if they were not suspects."""
        return len(self._suspects)

    @property
    def has_ready(self) -> bool:
        return bool(self._ready)

    def holds(self, held: Held) -> bool:
        return id(held) in self._held

    def held(self, arrivals: int) -> Iterator[Held]:
        """Of the first so many that ever came, those that are here; oldest first."""
        return takewhile(lambda held: held.number <= arrivals, self._held.values())

    # -- in

    def arrived(self, incoming: Incoming) -> Held | None:
        """
        Take an event in. What is no event is on its way to the dead letters at once.

        None when it is here already (the broker's claim on it ran out): it now answers for both.
        """
        identity = incoming.identity
        past = NOTHING
        if identity is not None:
            known = self._identities.get(identity)
            if known is not None:
                known.incoming = incoming
                return None
            past = self._past.get(identity, NOTHING)
        event = incoming.event
        key = event.key if self._ordered and event is not None else ""
        if self._distinct and event is not None and not key:
            key = f"\0{event.source}\0{event.id}"
        failures = incoming.failures
        if past is not NOTHING:
            failures = most(failures, past.failures)
        held = Held(incoming, key, failures)
        self.arrivals += 1
        held.number = self.arrivals
        self._held[id(held)] = held
        self.bytes += held.size
        if identity is not None:
            self._identities[identity] = held
        if event is None:
            self._leave(held)
            return held
        if key:
            lane = self._lanes.get(key)
            if lane is not None:
                lane.append(held)
                self.stuck += lane[0].failing
                return held
            self._lanes[key] = deque((held,))
        if past.retry_at:
            self._wait(held, past.retry_at)
        else:
            self._make_ready(held)
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
            self._tokens += 1
            token = f"{self._prefix}{self._tokens:x}"
            held.state = State.OUT
            held.token = token
            held.consumer = consumer
            held.attempt += 1
            self._out[token] = held
            self._timers.start(held, lease_end)
            taken.append(held)
        return taken

    def find(self, token: str) -> Held | None:
        """The delivery of a token, while it is out."""
        return self._out.get(token)

    def has_given(self, token: str) -> bool:
        """It is the token of a delivery by this window, over or not."""
        number = token.removeprefix(self._prefix)
        try:
            given = 0 < int(number, 16) <= self._tokens
        except ValueError:
            return False
        return given and token == f"{self._prefix}{int(number, 16):x}"

    def has_expired(self, token: str) -> bool:
        """The token's lease ended unsettled (remembered for the newest of them)."""
        return token in self._expired

    def extend(self, held: Held, lease_end: float) -> None:
        self._timers.start(held, lease_end)

    # -- what became of it

    def done(self, held: Held) -> None:
        """Gone for good: acked, or stored as a dead letter. Its lane moves on."""
        self.gone(held)
        identity = held.incoming.identity
        if identity is not None:
            self._acked.put(identity, True)  # noqa: FBT003

    def gone(self, held: Held) -> None:
        """
        Not here any more, and its lane moves on. For what is out, or leaves.

        Not for what waits: see give_back.
        """
        self._leave_state(held)
        del self._held[id(held)]
        self.bytes -= held.size
        identity = held.incoming.identity
        if identity is not None:
            self._identities.pop(identity, None)
        lane = self._lanes[held.lane] if held.lane else None
        if held.failing:
            self.stuck -= 1 if lane is None else len(lane)
        if lane is None:
            return
        lane.popleft()
        if not lane:
            del self._lanes[held.lane]
            return
        self._make_ready(lane[0])

    def retry(
        self, held: Held, at: float, *, uncounted: bool = False, recorded: bool = True
    ) -> None:
        """
        Try a delivery again at loop time *at*, and not before it is recorded; its lane waits.

        Else the one who goes on after our end would count one delivery less than there were.
        """
        self._leave_state(held)
        if uncounted:
            held.attempt -= 1
            held.postponed += 1
        else:
            held.postponed = 0
        held.unrecorded = not recorded
        self._wait(held, at)

    def recorded(self, held: Held) -> None:
        """The broker knows of its failure."""
        if held.unrecorded and self.holds(held):
            held.unrecorded = False
            if held.state is State.RETRY and not held.timer:
                self._timers.start(held, held.due)

    def back(self, held: Held) -> None:
        """Untouched by its consumer, who left: first in line again, and the attempt not counted."""
        self._leave_state(held)
        held.attempt -= 1
        self._make_ready(held, first=True)

    def crashed(self, held: Held) -> None:
        """The app crashed with it in its hands: too often, and it is a suspect from now on."""
        held.crashes += 1

    def bury(self, held: Held) -> None:
        """A delivery is on its way to the dead letters: not out any more, its lane waits."""
        self._leave_state(held)
        self._leave(held)

    def give_back(self, *, but: Collection[State] = ()) -> list[Held]:
        """
        Forget what is here, oldest first, so that the broker gets it back; no attempt is counted.

        *but* in these states nothing is given back, nor what waits behind it: another sidecar
        would hand that over first. Where an event comes here again, its attempts are known, also
        if the broker could not keep them, and the wait for its retry goes on.
        """
        given = [held for held in self._held.values() if self._first(held).state not in but]
        if not given:
            return given
        for held in given:
            self._remember(held)
            self._leave_state(held)
            del self._held[id(held)]
            self.bytes -= held.size
            identity = held.incoming.identity
            if identity is not None:
                self._identities.pop(identity, None)
        self._ready.clear()
        self._suspects.clear()
        self._lanes = {key: lane for key, lane in self._lanes.items() if lane[0].state in but}
        self.stuck = sum(self._first(held).failing for held in self._held.values())
        return given

    def revoke(
        self, identities: Iterable[Hashable], *, but: Collection[State] = ()
    ) -> Sequence[Held]:
        """
        These are another sidecar's from now on: forget them, and their tokens are void.

        *but* in these states they stay, and are returned.
        """
        found = [held for i in identities if (held := self._identities.get(i)) is not None]
        stay = [held for held in found if held.state in but]
        revoked = [held for held in found if held.state not in but]
        if not revoked:
            return stay
        for held in revoked:
            del self._identities[held.incoming.identity]
            self._leave_state(held)
            del self._held[id(held)]
            self.bytes -= held.size
        self._ready = deque(held for held in self._ready if self.holds(held))
        self._suspects = deque(held for held in self._suspects if self.holds(held))
        lanes, self._lanes = self._lanes, {}
        for key, lane in lanes.items():
            left = deque(held for held in lane if self.holds(held))
            if left:
                self._lanes[key] = left
                if left[0].state is State.WAITING:
                    self._make_ready(left[0])
        self.stuck = sum(self._first(held).failing for held in self._held.values())
        return stay

    # -- time

    def next_time(self) -> float | None:
        """When something is due next, in loop time."""
        return self._timers.next_time()

    def due(self, now: float) -> list[Held]:
        """Make due retries ready; return the deliveries whose lease has ended, still out."""
        expired = []
        for held in self._timers.due(now):
            if held.unrecorded:
                continue
            if held.state is State.RETRY:
                self.retrying -= 1
                self._make_ready(held)
            else:
                self._expired.put(held.token, True)  # noqa: FBT003
                expired.append(held)
        return expired

    def out_to(self, consumer: object) -> list[Held]:
        """What a consumer has, oldest first."""
        return [held for held in self._out.values() if held.consumer is consumer]

    def out_by_consumer(self) -> Counter[object]:
        """How many each consumer has."""
        return Counter(held.consumer for held in self._out.values())

    # -- forgetting

    def clear(self) -> list[Held]:
        """Forget everything: the subscription was moved. Tokens are void. Returns what was here."""
        held = list(self._held.values())
        self._held.clear()
        self._identities.clear()
        self._lanes.clear()
        self._ready.clear()
        self._suspects.clear()
        self._suspect = None
        self._out.clear()
        self._timers.clear()
        self._past.clear()
        self.forget_acked()
        self.retrying = self.leaving = self.stuck = self.bytes = 0
        return held

    def forget_acked(self) -> None:
        """The source ended: what comes from the next one is meant, as after a move elsewhere."""
        self._acked.clear()

    # -- inside

    def _make_ready(self, held: Held, *, first: bool = False) -> None:
        held.state = State.READY
        line = self._ready
        if held.crashes >= self._suspect_from:
            if self._suspect is None:
                self._suspect = held
            else:
                line = self._suspects
        if first:
            line.appendleft(held)
        else:
            line.append(held)

    def _leave_state(self, held: Held) -> None:
        """Out of whatever it was in, but for `_ready`: who is ready leaves by take or give_back."""
        if held is self._suspect:
            self._next_suspect()
        if held.state is State.OUT:
            del self._out[held.token]
            held.consumer = None
        elif held.state is State.RETRY:
            self.retrying -= 1
        elif held.state is State.LEAVING:
            self.leaving -= 1
        self._timers.stop(held)

    def _next_suspect(self) -> None:
        """Another one may be handed over; those that were given back meanwhile are passed over."""
        self._suspect = None
        while self._suspects and self._suspect is None:
            suspect = self._suspects.popleft()
            if self.holds(suspect):
                self._suspect = suspect
                self._ready.append(suspect)

    def _wait(self, held: Held, at: float) -> None:
        held.state = State.RETRY
        self.retrying += 1
        self._fails(held)
        self._timers.start(held, at)

    def _leave(self, held: Held) -> None:
        held.state = State.LEAVING
        self.leaving += 1
        self._fails(held)

    def _first(self, held: Held) -> Held:
        """Of its lane."""
        return self._lanes[held.lane][0] if held.lane else held

    def _fails(self, held: Held) -> None:
        if not held.failing:
            held.failing = True
            self.stuck += len(self._lanes[held.lane]) if held.lane else 1

    def _remember(self, held: Held) -> None:
        identity = held.incoming.identity
        if identity is not None:
            counted = held.attempt - (held.state is State.OUT)
            retry_at = held.due if held.state is State.RETRY else 0.0
            failures = Failures(counted, held.crashes, held.first_failed)
            self._past.put(identity, Past(failures, retry_at))

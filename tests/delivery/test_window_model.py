"""The window against a naive model of it, over whatever brokers, apps and time may do."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sidecar.broker import Failures, Incoming
from sidecar.delivery.held import Held, State
from sidecar.delivery.recent import Recent
from sidecar.delivery.window import HELD_FACTOR, Window
from sidecar.event import Event

PREFIX = "billing.0a1b."
KEYS = ("a", "a", "a", "b", "")
VERDICTS = ("ack", "ack", "nack", "crash", "crash", "crash", "uncounted", "bury", "back")
CHANCE = st.integers(0, 3)


class Windows(RuleBasedStateMachine):
    """
    A broker with a log, a window, an app that settles as it likes, and a clock.

    The model knows of each event: how many deliveries of it counted, how often the broker handed
    it out, and when its lease or retry is due.
    """

    @initialize(
        keys=st.lists(st.sampled_from(KEYS), min_size=4, max_size=24),
        ordered=st.booleans(),
        distinct=st.booleans(),
        max_in_flight=st.integers(1, 4),
        max_bytes=st.sampled_from([600, 2_000, 1 << 40]),
        suspect_from=st.integers(1, 2),
    )
    def start(  # noqa: PLR0917 - hypothesis names them
        self,
        keys: list[str],
        ordered: bool,  # noqa: FBT001
        distinct: bool,  # noqa: FBT001
        max_in_flight: int,
        max_bytes: int,
        suspect_from: int,
    ) -> None:
        self.keys = keys
        self.lanes = [_lane(s, key, ordered, distinct) for s, key in enumerate(keys)]
        self.max = max_in_flight
        self.max_bytes = max_bytes
        self.window = Window(
            ordered=ordered,
            max_in_flight=max_in_flight,
            token_prefix=PREFIX,
            max_bytes=max_bytes,
            distinct=distinct,
            suspect_from=suspect_from,
        )
        self.suspect_from = suspect_from
        self.now = 1000.0
        self.at_broker = list(range(len(keys)))
        self.done: set[int] = set()
        self.delivered = [0] * len(keys)
        self.counted: dict[int, int] = {}
        self.crashes: dict[int, int] = {}
        self.here: dict[int, Held] = {}
        self.due: dict[int, float] = {}
        self.waits: dict[int, float] = {}
        self.tokens: dict[int, str] = {}
        self.expired: set[str] = set()
        self.over: set[str] = set()

    # -- the broker

    def _incoming(self, sequence: int) -> Incoming:
        self.delivered[sequence] += 1
        delivered = self.delivered[sequence]
        event = Event(
            id=_id(sequence),
            source="/s",
            type="t",
            time_ns=1,
            key=self.keys[sequence],
            data=b"x" * (sequence % 5 * 100),
        )
        failures = Failures(self.counted.get(sequence, 0), self.crashes.get(sequence, 0))
        return Incoming("t", (sequence, delivered), sequence, event, failures=failures)

    @precondition(lambda self: self.at_broker and self.window.room)
    @rule(count=st.integers(1, 8))
    def fetch(self, count: int) -> None:
        for _ in range(min(count, self.window.room, len(self.at_broker))):
            sequence = self.at_broker.pop(0)
            incoming = self._incoming(sequence)
            self.counted.setdefault(sequence, 0)
            held = self.window.arrived(incoming)
            assert held is not None
            self.here[sequence] = held
            waits_until = self.waits.pop(sequence, None)
            if waits_until is not None and self._first(sequence) == sequence:
                assert held.state is State.RETRY
                self.due[sequence] = waits_until

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def claim_runs_out(self, data: st.DataObject) -> None:
        """The broker hands out again what is here already."""
        sequence = data.draw(st.sampled_from(sorted(self.here)))

        assert self.window.arrived(self._incoming(sequence)) is None

    @rule(but=st.sampled_from([(), (State.OUT, State.LEAVING), tuple(State)[2:]]), rarely=CHANCE)
    def give_back(self, but: tuple[State, ...], rarely: int) -> None:
        if rarely:
            return
        kept = {s for s in self.here if self.here[self._first(s)].state in but}
        given = self.window.give_back(but=but)
        gone = [s for s in self.here if s not in kept]
        assert [held.incoming.identity for held in given] == gone
        for sequence in gone:
            if sequence in self.tokens:
                self._token_is_over(sequence)
                self.counted[sequence] -= 1
            elif sequence in self.due:
                self.waits[sequence] = self.due[sequence]
            self._leaves(sequence)
        self.at_broker = sorted(self.at_broker + gone)

    @rule(rarely=CHANCE)
    def moved(self, rarely: int) -> None:
        """To where it began, so that all but what is done comes again; counts begin anew."""
        if rarely:
            return
        for sequence in list(self.here):
            if sequence in self.tokens:
                self._token_is_over(sequence)
            self._leaves(sequence)
        self.at_broker = [s for s in range(len(self.keys)) if s not in self.done]
        self.counted.clear()
        self.crashes.clear()
        self.waits.clear()
        self.window.clear()

    # -- the app

    @rule(limit=st.integers(1, 5), lease=st.sampled_from([1.0, 2.0, 3.0]))
    def take(self, limit: int, lease: float) -> None:
        ready = self.window.ready
        taken = self.window.take(limit, self, self.now + lease)
        assert len(taken) == min(limit, ready)
        for held in taken:
            sequence = self._sequence(held)
            # Nothing of its key that came before it is still to be done, here or elsewhere.
            assert self._first(sequence) == sequence
            before = [s for s in self._lane(sequence) if s < sequence and s not in self.done]
            assert before == []
            self.counted[sequence] += 1
            assert held.attempt == self.counted[sequence]
            self.tokens[sequence] = held.token
            self.due[sequence] = self.now + lease

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), verdict=st.sampled_from(VERDICTS))
    def settle(self, data: st.DataObject, verdict: str) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        held = self.window.find(self.tokens[sequence])
        assert held is self.here[sequence]
        self._token_is_over(sequence)
        if verdict == "ack":
            self.window.done(held)
            self._finished(sequence)
        elif verdict == "bury":
            self.window.bury(held)
        elif verdict == "back":
            self.window.back(held)
            self.counted[sequence] -= 1
        else:
            if verdict == "crash":
                self.window.crashed(held)
                self.crashes[sequence] = self.crashes.get(sequence, 0) + 1
            at = self.now + data.draw(st.sampled_from([0.0, 1.0, 2.0]))
            self.due[sequence] = at
            self.window.retry(held, at, uncounted=verdict == "uncounted")
            self.counted[sequence] -= verdict == "uncounted"

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def app_dies(self, data: st.DataObject) -> None:
        """With all that it has in its hands; noticed in any order, and tried again at once."""
        for sequence in data.draw(st.permutations(sorted(self.tokens))):
            held = self.here[sequence]
            self._token_is_over(sequence)
            self.window.crashed(held)
            self.crashes[sequence] = self.crashes.get(sequence, 0) + 1
            self.due[sequence] = self.now
            self.window.retry(held, self.now)
        self.time_passes(0.0)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), lease=st.integers(0, 4))
    def extend(self, data: st.DataObject, lease: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        self.due[sequence] = self.now + lease
        self.window.extend(self.here[sequence], self.now + lease)

    @precondition(lambda self: self._leaving())
    @rule(data=st.data())
    def dead_letter_is_stored(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self._leaving()))
        self.window.done(self.here[sequence])
        self._finished(sequence)

    # -- time

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        late = {s for s, due in self.due.items() if due <= self.now}
        leases = {s for s in late if s in self.tokens}
        expired = self.window.due(self.now)
        assert {self._sequence(held) for held in expired} == leases
        assert len(expired) == len(leases)
        for sequence in late - leases:
            assert self.here[sequence].state is State.READY
            del self.due[sequence]
        for held in expired:
            sequence = self._sequence(held)
            self.expired.add(self.tokens[sequence])
            self._token_is_over(sequence)
            self.due[sequence] = self.now + 1
            self.window.retry(held, self.now + 1)

    # -- what holds at all times

    @invariant()
    def at_most_one_of_a_key_is_anything_but_waiting(self) -> None:
        for sequence in self.here:
            waiting = self.here[sequence].state is State.WAITING

            assert waiting == (self._first(sequence) != sequence)

    @invariant()
    def all_is_counted(self) -> None:
        states = [held.state for held in self.here.values()]
        lanes = {self.lanes[s] for s in self.here if not isinstance(self.lanes[s], int)}

        assert len(self.window) == len(self.here)
        assert self.window.out == states.count(State.OUT) == len(self.tokens)
        assert self.window.ready + self.window.suspects == states.count(State.READY)
        assert self.window.bytes == sum(held.size for held in self.here.values())
        assert self.window.retrying == states.count(State.RETRY)
        assert self.window.leaving == states.count(State.LEAVING)
        assert self.window.lanes == len(lanes)

    @invariant()
    def both_bounds_hold(self) -> None:
        failing = [s for s in self.here if self.here[self._first(s)].failing]

        assert self.window.stuck == len(failing)
        assert len(self.here) <= HELD_FACTOR * self.max
        room = max(
            0,
            min(self.max - len(self.here) + len(failing), HELD_FACTOR * self.max - len(self.here)),
        )
        if not self.here:
            assert self.window.room == room
        elif self.window.bytes >= self.max_bytes:
            assert self.window.room == 0
        else:
            mean = self.window.bytes / len(self.here)
            fit = max(1, int((self.max_bytes - self.window.bytes) / mean))
            assert self.window.room == min(room, fit)

    @invariant()
    def one_suspect_at_a_time_is_handed_over_and_none_is_forgotten(self) -> None:
        suspects = [held for held in self.here.values() if held.crashes >= self.suspect_from]
        assert all(held.crashes == self.crashes[self._sequence(held)] for held in suspects)
        active = [held for held in suspects if held.state in {State.READY, State.OUT}]

        assert len(active) - self.window.suspects == min(1, len(active))

    @invariant()
    def nothing_that_is_due_is_lost(self) -> None:
        assert self.window.next_time() == min(self.due.values(), default=None)

    @invariant()
    def an_expired_token_is_told_from_a_settled_one(self) -> None:
        for token in self.over:
            assert self.window.find(token) is None
            assert self.window.has_given(token)
            assert self.window.has_expired(token) == (token in self.expired)

    def teardown(self) -> None:
        """Everything is done in the end, and nothing stays behind."""
        if not hasattr(self, "window"):
            return
        turns = 0
        while len(self.done) < len(self.keys):
            turns += 1
            assert turns < 1000, "it stands still"
            self.time_passes(5.0)
            while self.at_broker and self.window.room:
                self.fetch(8)
            for sequence in self._leaving():
                self.window.done(self.here[sequence])
                self._finished(sequence)
            self.take(5, 1.0)
            for sequence, token in list(self.tokens.items()):
                held = self.window.find(token)
                assert held is not None
                self._token_is_over(sequence)
                self.window.done(held)
                self._finished(sequence)
        assert self.window.next_time() is None
        left = {
            name: value
            for name, value in vars(self.window).items()
            if hasattr(value, "__len__") and not isinstance(value, str | Recent)
        }
        assert not any(left.values()), left

    # -- the model

    def _sequence(self, held: Held) -> int:
        sequence = held.incoming.identity
        assert isinstance(sequence, int)
        return sequence

    def _lane(self, sequence: int) -> list[int]:
        lane = self.lanes[sequence]
        return [s for s in range(len(self.lanes)) if self.lanes[s] == lane]

    def _first(self, sequence: int) -> int:
        return next(s for s in self._lane(sequence) if s in self.here)

    def _leaving(self) -> list[int]:
        return [s for s, held in self.here.items() if held.state is State.LEAVING]

    def _token_is_over(self, sequence: int) -> None:
        self.over.add(self.tokens.pop(sequence))
        del self.due[sequence]

    def _finished(self, sequence: int) -> None:
        self.done.add(sequence)
        self._leaves(sequence)

    def _leaves(self, sequence: int) -> None:
        del self.here[sequence]
        self.due.pop(sequence, None)


def _id(sequence: int) -> str:
    """Two and two are copies of each other."""
    return str(sequence // 2)


def _lane(sequence: int, key: str, ordered: bool, distinct: bool) -> str | int:  # noqa: FBT001
    """Its name, or the event itself where it is in none."""
    if ordered and key:
        return key
    return f"copies of {_id(sequence)}" if distinct else sequence


Windows.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
test_windows = Windows.TestCase

"""Which offset of a partition to commit, and with what metadata, while acks come out of order."""

from __future__ import annotations

import base64
import math
import zlib
from bisect import bisect_right
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

import msgspec

from sidecar.broker import MAX_CRASHES, NO_FAILURES, Failures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

METADATA_BYTES = 4096
"""The most a commit's metadata may have: a broker's default for offset.metadata.max.bytes."""
FENCE_LENGTH = 8
MAX_GAP = 1 << 20
"""Offsets from the commit to the newest fetched one. A new owner reads them all again, to skip."""
MAX_ATTEMPTS = 1023
"""A larger count is kept as this one. The configuration allows fewer."""
_CRASH = MAX_ATTEMPTS + 1
_MOST_COUNTED = MAX_CRASHES * _CRASH + MAX_ATTEMPTS
_SECOND = 1_000_000_000


class PartitionPositions:
    """
    What one consumer group has done of one partition that is assigned to us. Does no I/O.

    An offset that was fetched is pending until it is acked. Everything else below the newest
    fetched one is done: it was acked, or is no record (compaction and transaction markers leave
    holes). The lowest pending offset is what to commit; the commit's metadata says what is done
    above it, and how often each pending one has failed. A new owner, made from both, hands out
    only what was not acked then.

    Ask `too_wide` before each `fetched`, also for what was fetched ahead, but not for what was
    released. While it is true, take
    nothing more: with one more offset the metadata could outgrow its limit, by what is acked or
    fails next. Go on at `next_offset` when it is false again.

    Non-obvious: a record of a former owner that is passed over while fetching is no record any
    more. And when the broker itself moves us back (its log was cut), begin with `at`: what is
    below the commit is otherwise taken for done.

    A move of the group leaves its mark in the metadata, the *fence*, and whoever goes on from
    there hands it down. So a member that commits without having seen the move is found out.
    """

    __slots__ = (
        "_ahead",
        "_changed",
        "_confirmed",
        "_current",
        "_failures",
        "_few",
        "_high",
        "_near",
        "_pending",
        "_top",
        "_wide",
        "fence",
    )

    def __init__(self, committed: int, metadata: str = "") -> None:
        """
        Go on from a group's commit. Metadata that is not ours, or not of this offset, is ignored.

        *committed* is an offset: see `at` for a group that has none.
        """
        # Offset -> is it handed out. Ascending: one is only ever put in above all others. Ordered
        # because a plain dict searches for its first key past all that were removed before it.
        self._pending: OrderedDict[int, bool] = OrderedDict()
        self._failures: dict[int, Failures] = {}
        self._ahead: deque[int] = deque()
        """Pending ones of a former owner that are to be fetched again."""
        self._high = committed
        """Above all that were fetched, by a former owner too as far as it said."""
        self._top = committed - 1
        """The highest acked one."""
        self._wide = False
        self._few, self._near = _MOST[-1], committed + MAX_GAP
        """As long as no more are pending, and the newest is below that, it is not too wide."""
        self._changed = False
        self._current = (committed, metadata)
        self._confirmed: tuple[int, str] | None = self._current
        self.fence = fence_of(metadata)
        known = _decode(committed, metadata)
        if known is not None:
            self._pending.update(dict.fromkeys(known.pending, False))
            self._failures.update(known.failures)
            self._ahead.extend(known.pending)
            self._high = known.end
            self._top = known.end - 1

    @classmethod
    def at(cls, offset: int, fence: str = "") -> PartitionPositions:
        """Begin at *offset*, in a new group or after a loss; `commit` says so at once."""
        positions = cls(offset, fence_metadata(fence) if fence else "")
        positions._confirmed = None
        return positions

    def __repr__(self) -> str:
        return (
            f"<PartitionPositions low={self._low} high={self._high} pending={len(self._pending)}"
            f" failing={len(self._failures)}{' too wide' if self._wide else ''}>"
        )

    # -- in

    @property
    def next_offset(self) -> int:
        """The offset to fetch next."""
        return self._ahead[0] if self._ahead else self._high

    @property
    def end(self) -> int:
        """The offset above all that were fetched, by us or by a former owner that said so."""
        return self._high

    @property
    def waiting(self) -> int:
        """How many below `end` are to be fetched (again): given back, or a former owner's."""
        return sum(not out for out in self._pending.values())

    @property
    def out(self) -> Sequence[int]:
        """The offsets that are handed out, ascending."""
        return [offset for offset, out in self._pending.items() if out]

    def fetched(self, offset: int) -> Failures | None:
        """
        The failures so far of an offset that is to be handed out now.

        None: skip it, it was acked before or is handed out already. Offsets come in ascending order
        from `next_offset` on; those that were released come at any time.
        """
        if self._ahead:
            self._pass_over(offset)
        if offset >= self._high:
            self._high = offset + 1
            self._pending[offset] = True
            return NO_FAILURES
        if self._pending.get(offset) is not False:
            return None
        self._pending[offset] = True
        return self._failures.get(offset, NO_FAILURES)

    def _pass_over(self, offset: int) -> None:
        """What was to come before *offset* and did not is no record any more."""
        ahead = self._ahead
        while ahead and ahead[0] <= offset:
            passed = ahead.popleft()
            if passed != offset:
                del self._pending[passed]
                self._failures.pop(passed, None)
                self._changed = True

    @property
    def too_wide(self) -> bool:
        """
        Fetch nothing more of this partition for now.

        True from when one more offset could be too much until half of that; never while released
        offsets are fetched again, since those add nothing.
        """
        if not self._wide and len(self._pending) <= self._few and self._high < self._near:
            return False
        return self._measure()

    def _measure(self) -> bool:
        low = self._low
        gap = self._high - low
        digits = min(gap, MAX_GAP).bit_length()
        most = _MOST[digits]
        # So many are not too many up to there, as the lowest one only rises: no need to measure.
        pending = len(self._pending)
        further = len(_MOST) - 1 if pending <= _MOST[-1] else min(digits + 1, len(_MOST) - 1)
        reach = further if pending <= _MOST[further] else digits
        self._few, self._near = _MOST[reach], low + min(1 << reach, MAX_GAP)
        if self._wide:
            pending, gap = 2 * pending, 2 * gap
        self._wide = not self._ahead and (pending > most or gap >= MAX_GAP)
        return self._wide

    # -- what became of it; nothing happens to an offset that is not handed out

    def acked(self, offset: int) -> None:
        if not self._pending.get(offset):
            return
        del self._pending[offset]
        if self._failures:
            self._failures.pop(offset, None)
        if offset > self._top:  # noqa: PLR1730 - max() costs as much as all the rest here
            self._top = offset
        self._changed = True

    def failed(self, offset: int, failures: Failures) -> None:
        """It failed and is still here to be tried again; so it did so far, this time too."""
        if not self._pending.get(offset):
            return
        if failures.attempts > 0:
            self._failures[offset] = failures
        else:
            self._failures.pop(offset, None)
        self._changed = True

    def released(self, offset: int) -> None:
        """Given back untouched: whoever fetches it next gets it, here or elsewhere."""
        if self._pending.get(offset):
            self._pending[offset] = False

    # -- out to the broker

    @property
    def _low(self) -> int:
        return next(iter(self._pending), self._high)

    def commit(self) -> tuple[int, str] | None:
        """
        (offset, metadata) to commit now, or None when the broker has just that.

        Costs as much as there are pending offsets; the same again until `confirm`.
        """
        if self._changed:
            self._current = (self._low, self._metadata())
            self._changed = False
        return None if self._current == self._confirmed else self._current

    def confirm(self, offset: int, metadata: str) -> None:
        """The broker has this commit."""
        self._confirmed = (offset, metadata)

    def _metadata(self) -> str:
        # All above what was acked or failed last is pending for whoever reads it: not worth a bit.
        end = max(self._top, max(self._failures, default=self._top)) + 1
        pending = [offset for offset in self._pending if offset < end]
        mark = fence_metadata(self.fence) if self.fence else ""
        if not pending:
            return mark
        head = mark or _PREFIX
        metadata = head + _encode(_Known(pending, end, self._failures), times=True)
        if len(metadata) > METADATA_BYTES:
            metadata = head + _encode(_Known(pending, end, self._failures), times=False)
        while len(metadata) > METADATA_BYTES:
            # Only when too_wide was not asked. What is not said is handed out again.
            end = pending[len(pending) // 2]
            pending = pending[: len(pending) // 2]
            metadata = head + _encode(_Known(pending, end, self._failures), times=False)
        return metadata


def fence_metadata(fence: str) -> str:
    """The metadata of a commit that moves a group; *fence* is FENCE_LENGTH hexadecimal digits."""
    return f"{_PREFIX}{fence};"


def fence_of(metadata: str) -> str:
    """The mark of the last move that this metadata knows of; empty where it is none of ours."""
    end = len(_PREFIX) + FENCE_LENGTH
    fence = metadata[len(_PREFIX) : end]
    ours = metadata.startswith(_PREFIX) and metadata[end : end + 1] == ";"
    return fence if ours and _HEXADECIMAL.issuperset(fence) else ""


# The metadata: a prefix with the version, the fence and a semicolon if there is one, and if there is
# more to say, in base64, a check sum and a string of bits. The sum covers the committed offset too: metadata that was copied to another offset says nothing of that.
#
# The bits: a one (it keeps the zeros after it), the lengths of the runs from the committed offset
# on, pending and done by turns, then the failing offsets: each as its distance in pending offsets
# from the last, and its counts: the crashes of the app in it, times 1,024, and the attempts. If there
# are any, one bit says whether it follows when they failed first: the earliest second, and of each,
# in order, how much later it was plus one, or zero for unknown. Only where there is room: that is left
# out before anything else. Numbers are in Elias' gamma code (as many zeros as the number has binary
# digits after its first, then the number: 1 bit for 1, 3 for 2 and 3, 5 up to 7); counts, and times,
# have one width, that of the largest.
#
# A reader of before there were crashes and times takes failing offsets with that bit for not written
# by us, and hands out again what was acked above the commit: at least once, for the length of an
# update. It reads all else, and we what it wrote (its bits end behind the counts).

_PREFIX = "sc1:"
_HEXADECIMAL = frozenset("0123456789abcdef")
_SUM_BYTES = 4
_BITS = 8 * ((METADATA_BYTES - len(_PREFIX) - FENCE_LENGTH - 1) // 4 * 3 - _SUM_BYTES)
_LAST_OFFSET = (1 << 63) - 1
_TIME_BITS = 34
"""Seconds since 1970, up to the year 2514."""
_MOST_READ = 1 << 16
"""Pending offsets that are believed when read; far more than we write."""


class _Known(msgspec.Struct, frozen=True):
    """What metadata says of the offsets below *end*: these are pending, all others are done."""

    pending: Sequence[int]
    """Ascending; the first is the committed one."""
    end: int
    failures: Mapping[int, Failures]


def _encode(known: _Known, *, times: bool) -> str:
    runs = _runs(known.pending, known.end)
    parts = ["1", _gamma(len(runs)), *map(_gamma, runs)]
    failures = known.failures
    failing = [place for place, offset in enumerate(known.pending, 1) if offset in failures]
    parts.append(_gamma(len(failing) + 1))
    if failing:
        found = [failures[known.pending[place - 1]] for place in failing]
        counts = [_count(one) for one in found]
        width = max(counts).bit_length()
        parts.append(_gamma(width))
        before = 0
        for place, count in zip(failing, counts, strict=True):
            parts += _gamma(place - before), f"{count:0{width}b}"
            before = place
        parts += _times(found) if times else "0"
    bits = "".join(parts)
    payload = int(bits, 2).to_bytes((len(bits) + 7) // 8)
    return base64.b64encode(_sum(known.pending[0], payload) + payload).decode()


def _count(failures: Failures) -> int:
    crashes = min(failures.crashes, MAX_CRASHES)
    return crashes * _CRASH + min(failures.attempts, MAX_ATTEMPTS)


def _times(found: Sequence[Failures]) -> list[str]:
    seconds = [failures.first_ns // _SECOND for failures in found]
    known = [one for one in seconds if one > 0]
    if not known:
        return ["0"]
    first = min(known)
    later = [one - first + 1 if one > 0 else 0 for one in seconds]
    width = max(later).bit_length()
    return ["1", _gamma(first), _gamma(width), *(f"{one:0{width}b}" for one in later)]


def _runs(pending: Sequence[int], end: int) -> list[int]:
    runs: list[int] = []
    start = due = pending[0]
    for offset in pending:
        if offset != due:
            runs += due - start, offset - due
            start = offset
        due = offset + 1
    runs.append(due - start)
    if end > due:
        runs.append(end - due)
    return runs


def _decode(committed: int, metadata: str) -> _Known | None:
    """None for what is not ours, not whole, or not of this offset. Never raises."""
    if not metadata.startswith(_PREFIX) or len(metadata) > METADATA_BYTES:
        return None
    start = len(fence_metadata(fence) if (fence := fence_of(metadata)) else _PREFIX)
    try:
        data = base64.b64decode(metadata[start:], validate=True)
        payload = data[_SUM_BYTES:]
        if data[:_SUM_BYTES] != _sum(committed, payload):
            return None
        return _read(committed, _Bits(payload))
    except (ValueError, OverflowError):
        return None


def _read(committed: int, bits: _Bits) -> _Known:
    """Raises ValueError for what _encode does not write."""
    pending: list[int] = []
    end = committed
    for number in range(bits.number()):
        length = bits.number()
        if number % 2 == 0:
            if len(pending) + length > _MOST_READ:
                raise ValueError("too many pending offsets")
            pending.extend(range(end, end + length))
        end += length
    counts: dict[int, int] = {}
    failing = bits.number() - 1
    width = bits.number() if failing else 0
    place = -1
    for _ in range(failing):
        place += bits.number()
        if place >= len(pending):
            raise ValueError("more failing offsets than pending ones")
        counts[pending[place]] = bits.take(width)
    times = _read_times(len(counts), bits) if counts and not bits.at_end else [0] * len(counts)
    if not bits.at_end or end > _LAST_OFFSET or max(counts.values(), default=0) > _MOST_COUNTED:
        raise ValueError("not written by us")
    failures = {
        offset: Failures(count % _CRASH, count // _CRASH, time * _SECOND)
        for (offset, count), time in zip(counts.items(), times, strict=True)
    }
    return _Known(pending, end, failures)


def _read_times(count: int, bits: _Bits) -> list[int]:
    """When each failed first, in seconds since 1970; 0 where that is unknown."""
    if not bits.take(1):
        return [0] * count
    first, width = bits.number(), bits.number()
    if first.bit_length() > _TIME_BITS or width > _TIME_BITS:
        raise ValueError("no time")
    later = [bits.take(width) for _ in range(count)]
    return [first + one - 1 if one else 0 for one in later]


class _Bits:
    """Reads a string of bits from its start. Past its end: a ValueError, or never `at_end`."""

    def __init__(self, payload: bytes) -> None:
        self._bits = f"{int.from_bytes(payload):b}"
        self._at = 1

    @property
    def at_end(self) -> bool:
        return self._at == len(self._bits)

    def number(self) -> int:
        one = self._bits.index("1", self._at)
        digits = one - self._at + 1
        self._at = one
        return self.take(digits)

    def take(self, digits: int) -> int:
        start = self._at
        self._at += digits
        return int(self._bits[start : self._at], 2)


def _gamma(number: int) -> str:
    return "0" * (number.bit_length() - 1) + f"{number:b}"


def _sum(committed: int, payload: bytes) -> bytes:
    offset = committed.to_bytes(8, signed=True)
    return zlib.crc32(payload, zlib.crc32(offset)).to_bytes(_SUM_BYTES)


# How many offsets may be pending. Nothing is fetched while it is too wide, so what can still happen
# is that any of them are acked, and that all others have failed as often as can be. The bounds
# below hold for every such outcome, since they rise with both numbers.

_HEAD_BITS = 81
"""The leading one, the one before the times, how many runs and failing offsets there are, a width, and a last partial byte:
each number stays below 2^13."""
_FAILING_BITS = 1 + _MOST_COUNTED.bit_length()
"""A failing offset, when all are failing. With fewer, the distances cost less than what is spared:
a distance of n is at most 1.5 n bits, for n - 1 counts less."""
_STEP_BITS = 160
"""One offset that is fetched after the question: a hole before it of any length (125 bits), its own
run or a longer one (2), its failing."""


def _worst_bits(pending: int, gap: int) -> float:
    """
    The most bits that any outcome takes, of so many pending offsets in so many offsets.

    Runs of n offsets cost 2 log2 n + 1 bits at most, and never more than 1.5 n: so all runs together
    at most 1.5 gap. Each done run ends at another pending one or at the end, so there are no more
    than pending offsets; that function being concave, they cost most when there are so many of
    one length, unless that were less than two offsets. The pending runs add at most 1.5 each.
    """
    runs = 1.5 * gap
    if 2 * pending <= gap:
        runs = min(runs, 1.5 * pending + pending * (2 * math.log2(gap / pending) + 1))
    return _HEAD_BITS + pending * _FAILING_BITS + runs


def _most_pending(gap: int) -> int:
    room: float = _BITS - _STEP_BITS
    return bisect_right(range(1, _BITS), room, key=lambda count: _worst_bits(count, gap))


_MOST = [_most_pending(1 << digits) for digits in range(MAX_GAP.bit_length() + 1)]
"""By the binary digits of the gap: 1,409 pending in up to 2,047 offsets, 621 in a million."""

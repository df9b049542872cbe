"""Which events were acked lately: exactly as long as the window is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis.strategies as st
from hypothesis import given

from sidecar.delivery import duplicates
from sidecar.delivery.duplicates import Duplicates
from tests.delivery.stage import event as make

if TYPE_CHECKING:
    import pytest

STEPS = st.lists(
    st.tuples(st.sampled_from(["ack", "ask"]), st.integers(0, 6), st.floats(0, 20)), max_size=60
)


@given(STEPS)
def test_an_event_is_known_for_the_window_after_its_last_ack_and_not_longer(
    steps: list[tuple[str, int, float]],
) -> None:
    known = Duplicates(10)
    now, acked = 1000.0, {}
    for what, number, seconds in steps:
        now += seconds
        event = make(str(number))
        if what == "ack":
            known.acked(event, now)
            acked[number] = now
        expected = number in acked and now - acked[number] <= 10

        assert known.has(event, now) == expected


def test_source_and_id_together_are_what_an_event_is_known_by() -> None:
    known = Duplicates(10)
    known.acked(make("1", source="/a"), 0.0)

    assert known.has(make("1", source="/a", type="other"), 1.0)
    assert not known.has(make("1", source="/b"), 1.0)


def test_memory_is_bounded_and_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST", 100)
    known = Duplicates(1e9)
    for number in range(1000):
        known.acked(make(str(number)), float(number))
    kept = [number for number in range(1000) if known.has(make(str(number)), 1000.0)]

    assert kept == list(range(1000 - len(kept), 1000))
    assert 100 <= len(kept) <= 200

"""Drills: many events over servers and sidecars that are stopped and killed, every id counted."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING, Protocol

from tests.drills import (
    chaos,
    dead_letters,
    failing_key,
    kafka,
    push_app_down,
    shared_subscription,
    slow_consumer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping


class Report(Protocol):
    @property
    def holds(self) -> bool: ...

    def text(self) -> str: ...


SCENARIOS: Mapping[str, Callable[[int], Coroutine[None, None, Report]]] = {
    **chaos.SCENARIOS,
    **shared_subscription.SCENARIOS,
    **kafka.SCENARIOS,
    **failing_key.SCENARIOS,
    **slow_consumer.SCENARIOS,
    **push_app_down.SCENARIOS,
    **dead_letters.SCENARIOS,
}
EVENTS = {
    **dict.fromkeys(chaos.SCENARIOS, chaos.EVENTS),
    **dict.fromkeys(shared_subscription.SCENARIOS, shared_subscription.EVENTS),
    **dict.fromkeys(kafka.SCENARIOS, kafka.EVENTS),
    **dict.fromkeys(failing_key.SCENARIOS, failing_key.EVENTS),
    **dict.fromkeys(slow_consumer.SCENARIOS, slow_consumer.EVENTS),
    **dict.fromkeys(push_app_down.SCENARIOS, push_app_down.EVENTS),
    **dict.fromkeys(dead_letters.SCENARIOS, dead_letters.EVENTS),
}


def main() -> int:
    """Run the drills that are named, or all; exit 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(prog="make drill", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(SCENARIOS))
    parser.add_argument("--events", type=int, help="200,000 on JetStream, 100,000 on Kafka")
    arguments = parser.parse_args()
    unknown = {*arguments.names} - {*SCENARIOS}
    if unknown:
        parser.error(f"no drill is called {', '.join(sorted(unknown))}")
    failed = 0
    for name in arguments.names or SCENARIOS:
        scenario = SCENARIOS[name]
        print(f"== {name}: {scenario.__doc__}", flush=True)
        report = asyncio.run(scenario(arguments.events or EVENTS[name]))
        print(report.text(), flush=True)
        failed += not report.holds
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

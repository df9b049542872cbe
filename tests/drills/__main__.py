"""Drills: many events over servers and sidecars that are stopped and killed, every id counted."""

from __future__ import annotations

import argparse
import asyncio
import sys

from tests.drills import shared_subscription


def main() -> int:
    """Run the drills that are named, or all; exit 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(prog="make drill", description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(shared_subscription.SCENARIOS))
    parser.add_argument("--events", type=int, default=200_000)
    arguments = parser.parse_args()
    failed = 0
    for name, scenario in shared_subscription.SCENARIOS.items():
        if arguments.names and name not in arguments.names:
            continue
        print(f"== {name}: {scenario.__doc__}", flush=True)
        report = asyncio.run(scenario(arguments.events))
        print(report.text(), flush=True)
        failed += not report.holds
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

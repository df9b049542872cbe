"""One load in a process of its own: `python -m tests.benchmarks.worker SPEC` prints a Sample."""

from __future__ import annotations

import asyncio
import importlib
import sys
from typing import TYPE_CHECKING

import msgspec
import uvloop

from tests.benchmarks.loads import grpc, http, latency, push
from tests.benchmarks.spec import Sample, Spec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

LOADS: Mapping[str, Callable[[Spec], Awaitable[Sample]]] = {
    "unary": grpc.unary,
    "stream": grpc.stream,
    "connect": http.connect,
    "cloudevents": http.cloudevents,
    "consume": grpc.consume,
    "latency": latency.latency,
    "push": push.push,
}


async def run(spec: Spec) -> Sample:
    load = LOADS.get(spec.load)
    if load is None:
        # Only here: the loads on the sidecar know no client library.
        table = importlib.import_module("tests.benchmarks.targets.table")
        load = table.TARGETS[spec.target].raw_loads[spec.load]
    return await load(spec)


if __name__ == "__main__":
    spec = msgspec.json.decode(sys.argv[1], type=Spec)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sample = runner.run(run(spec))
    sys.stdout.write(msgspec.json.encode(sample).decode())
    sys.stdout.flush()

"""The brokers that can be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.benchmarks.targets.jetstream import JetStream
from tests.benchmarks.targets.kafka import Kafka

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.benchmarks.targets.target import Target

TARGETS: Mapping[str, type[Target]] = {one.name: one for one in (JetStream, Kafka)}

"""`sidecar check`: what a configuration means, or all that is wrong with it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sidecar.cli import configuration, exits
from sidecar.config import Config, Kafka, NatsConnection
from sidecar.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sidecar.config import BrokerSettings, Route, Subscription


def check(path: Path | None, *, connect: bool) -> int:
    try:
        config = configuration.load(path)
    except ConfigInvalid as error:
        configuration.complain_of(error, path)
        return exits.CONFIGURATION
    exits.say(f"{configuration.name_of(path)} is valid")
    for title, rows in _found(config):
        _print(title, rows)
    return _try_brokers(config) if connect else exits.OK


def _found(config: Config) -> Iterator[tuple[str, Sequence[tuple[str, str]]]]:
    yield "brokers", [(name, _broker(broker)) for name, broker in config.brokers.items()]
    yield "routes, the first match wins", [(_match(route), route.broker) for route in config.routes]
    yield "subscriptions", [(s.name, _subscription(s)) for s in config.subscriptions]
    yield (
        "sockets",
        [
            (name, address)
            for name, address in (
                ("gRPC", config.grpc.unix_socket),
                ("gRPC", config.grpc.address),
                ("HTTP", config.http.unix_socket),
                ("HTTP", config.http.address),
                ("admin", config.admin.address),
            )
            if address
        ],
    )


def _print(title: str, rows: Sequence[tuple[str, str]]) -> None:
    exits.say(f"\n{title}" if rows else f"\n{title}: none")
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        exits.say(f"  {name:{width}}  {text}")


def _broker(broker: BrokerSettings) -> str:
    if isinstance(broker, Kafka):
        return f"{broker.type} at {', '.join(broker.bootstrap_servers)}"
    if not isinstance(broker, NatsConnection):
        return broker.type
    if broker.embedded:
        return f"{broker.type}, the embedded server"
    return f"{broker.type} at {', '.join(broker.servers)}"


def _match(route: Route) -> str:
    parts = [("topic", route.topic), ("event_type", route.event_type)]
    return ", ".join(f"{name} {pattern}" for name, pattern in parts if pattern is not None)


def _subscription(subscription: Subscription) -> str:
    broker = f" at {subscription.broker}" if subscription.broker else ""
    attempts = subscription.retry.max_attempts
    push = f", pushed to {subscription.push.url}" if subscription.push is not None else ""
    return (
        f"{subscription.topic}{broker}, ordering {subscription.ordering}, {attempts} attempts, "
        f"lease {subscription.lease_seconds:g} s{push}"
    )


def _try_brokers(config: Config) -> int:
    from sidecar.app import try_brokers  # noqa: PLC0415 - drivers, only when asked

    results = asyncio.run(try_brokers(config))
    _print("connections", [(name, problem or "connected") for name, problem in results])
    return exits.FAILED if any(problem for _, problem in results) else exits.OK

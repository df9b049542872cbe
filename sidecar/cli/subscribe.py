"""`sidecar subscribe`: deliveries as lines of JSON, each acked when it is printed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
import typer

from sidecar.cli import calling, events, exits
from sidecar.client import Filter, SubscriptionSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sidecar.client import Consumer, SettleFailed, Sidecar, StartAt, StreamDelivery

_CREDIT = 256
_UNSETTLED_CREDIT = 10_000
"""With --no-ack nothing makes room again: the subscription's max_in_flight is the limit."""


class Job(msgspec.Struct, frozen=True):
    """What to consume: a subscription's name, or a description."""

    target: str
    subscription: str | SubscriptionSpec
    count: int | None
    ack: bool


def job_of(
    *,
    target: str,
    subscription: str,
    name: str,
    start: str,
    broker: str,
    filters: Sequence[str],
    count: int | None,
    ack: bool,
) -> Job:
    """Raises BadParameter."""
    if not name:
        if start or broker or filters:
            raise typer.BadParameter(
                "--start, --broker and --filter describe a subscription: give it a --name"
            )
        return Job(target, subscription, count, ack)
    begin = _start(start) if start else None
    spec = SubscriptionSpec(
        name=name,
        topic=subscription,
        broker=broker,
        start=begin,
        filters=[_filter(text) for text in filters],
    )
    return Job(target, spec, count, ack)


def _filter(text: str) -> Filter:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(
            f'--filter {text!r}: use ATTRIBUTE=VALUE, as "type=order.created", or "type=order.*"'
        )
    if value.endswith("*"):
        return Filter.prefix(**{name: value[:-1]})
    return Filter.exact(**{name: value})


def _start(text: str) -> StartAt:
    if text == "earliest":
        return "earliest"
    if text == "latest":
        return "latest"
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError as error:
        raise typer.BadParameter(
            f'--start {text!r}: use earliest, latest or a time, as "2026-01-31T12:00:00Z"'
        ) from error


def subscribe(job: Job) -> int:
    async def work(sidecar: Sidecar) -> int:
        consumer = sidecar.subscribe(
            job.subscription,
            credit=_CREDIT if job.ack else _UNSETTLED_CREDIT,
            limit=job.count,
            consumer_name="sidecar subscribe",
            on_rejected=_complain,
        )
        with calling.ended_by_signals(consumer.end), _watched_stdout(consumer.end):
            async with consumer:
                await (_print_and_ack(consumer) if job.ack else _print_and_hold(consumer))
        return exits.OK

    return calling.call(job.target, work)


async def _print_and_ack(consumer: Consumer) -> None:
    async for delivery in consumer:
        _print(delivery)
        delivery.ack()


async def _print_and_hold(consumer: Consumer) -> None:
    """Keep what is shown from being delivered again, until the end releases it."""
    held: list[StreamDelivery] = []
    loop = asyncio.get_running_loop()
    opened = await consumer.wait_opened()
    extend_at = loop.time()
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(extend_at):
                async for delivery in consumer:
                    _print(delivery)
                    held.append(delivery)
                return
        for delivery in held:
            delivery.extend()
        extend_at = loop.time() + opened.lease_seconds / 3


def _print(delivery: StreamDelivery) -> None:
    exits.write(events.delivery_line(delivery) + b"\n")


def _complain(failed: SettleFailed) -> None:
    exits.complain(f"not settled: {failed.reason}: {failed.message}")


@contextlib.contextmanager
def _watched_stdout(end: Callable[[], None]) -> Iterator[None]:
    """Call *end* when the reader of standard output has gone, also while nothing is printed."""
    fd = exits.output().fileno()
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        yield
        return
    loop = asyncio.get_running_loop()

    def gone() -> None:
        loop.remove_reader(fd)
        end()

    # The writing end of a pipe is "readable" only in that its reader has gone (poll: POLLERR).
    loop.add_reader(fd, gone)
    try:
        yield
    finally:
        loop.remove_reader(fd)

"""The DeadLetters service: looking at dead letters, redriving and discarding them."""

from __future__ import annotations

import math
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from google.protobuf.timestamp_pb2 import Timestamp

from sidecar.delivery.redrive.batch import Order, Progress
from sidecar.delivery.redrive.filters import Filter
from sidecar.delivery.redrive.letter import LetterId
from sidecar.delivery.redrive.marks import Kind, State
from sidecar.errors import InvalidRequest, InvalidTopic
from sidecar.event import check_pattern, check_topic, check_type_pattern
from sidecar.services.rpc import Call, ServerStreamMethod, UnaryMethod
from sidecar.v1 import dead_letters_pb2 as pb
from sidecar.wire import proto

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from sidecar.delivery.redrive.desk import Desk, Found

SERVICE = "sidecar.v1.DeadLetters"
PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_IDS = 1000
RATE = 100.0
MAX_RATE = 100_000.0
_NS = 1_000_000_000
_STATES = {
    State.OPEN: pb.DEAD_LETTER_STATE_OPEN,
    State.CLAIMED: pb.DEAD_LETTER_STATE_CLAIMED,
    State.REDRIVEN: pb.DEAD_LETTER_STATE_REDRIVEN,
    State.DISCARDED: pb.DEAD_LETTER_STATE_DISCARDED,
}
_PLACEHOLDER = "{topic}"


class DeadLetters:
    """List, Get, Redrive, Discard."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def methods(self) -> Sequence[UnaryMethod[Any, Any]]:
        return (
            UnaryMethod(
                SERVICE, "List", pb.DeadLettersListRequest, pb.DeadLettersListResponse, self.list
            ),
            UnaryMethod(
                SERVICE, "Get", pb.DeadLettersGetRequest, pb.DeadLettersGetResponse, self.get
            ),
        )

    def streams(self) -> Sequence[ServerStreamMethod[Any, Any]]:
        return (
            ServerStreamMethod(
                SERVICE,
                "Redrive",
                pb.DeadLettersRedriveRequest,
                pb.DeadLettersRedriveResponse,
                self.redrive,
            ),
            ServerStreamMethod(
                SERVICE,
                "Discard",
                pb.DeadLettersDiscardRequest,
                pb.DeadLettersDiscardResponse,
                self.discard,
            ),
        )

    async def list(
        self, request: pb.DeadLettersListRequest, call: Call
    ) -> pb.DeadLettersListResponse:
        page = await self._desk.page(
            filter_from(request.filter),
            size=min(request.page_size or PAGE_SIZE, MAX_PAGE_SIZE),
            token=request.page_token,
            oldest_first=request.oldest_first,
            settled=request.include_settled,
            with_data=request.include_data,
        )
        response = pb.DeadLettersListResponse(next_page_token=page.token)
        for found in page.letters:
            _put(response.dead_letters.add(), found)
        return response

    async def get(self, request: pb.DeadLettersGetRequest, call: Call) -> pb.DeadLettersGetResponse:
        found = await self._desk.get(LetterId.parse(request.id))
        response = pb.DeadLettersGetResponse()
        _put(response.dead_letter, found)
        return response

    async def redrive(
        self, request: pb.DeadLettersRedriveRequest, call: Call
    ) -> AsyncGenerator[pb.DeadLettersRedriveResponse]:
        if request.to_topic:
            _check_template(request.to_topic)
        order = Order(
            Kind.REDRIVE,
            _wanted(request),
            rate=_rate(request.rate_per_second),
            to_topic=request.to_topic,
            to_broker=request.to_broker,
            dry_run=request.dry_run,
            limit=request.limit or None,
        )
        async with aclosing(self._desk.run(order)) as run:
            async for progress, finished in run:
                yield pb.DeadLettersRedriveResponse(progress=_progress(progress), finished=finished)

    async def discard(
        self, request: pb.DeadLettersDiscardRequest, call: Call
    ) -> AsyncGenerator[pb.DeadLettersDiscardResponse]:
        order = Order(
            Kind.DISCARD, _wanted(request), dry_run=request.dry_run, limit=request.limit or None
        )
        async with aclosing(self._desk.run(order)) as run:
            async for progress, finished in run:
                yield pb.DeadLettersDiscardResponse(progress=_progress(progress), finished=finished)


# -- requests


def filter_from(message: pb.DeadLetterFilter) -> Filter:
    """Raises InvalidRequest."""
    if len(message.ids) > MAX_IDS:
        raise InvalidRequest(
            f"filter.ids: {len(message.ids)} of them, at most {MAX_IDS}", field="filter.ids"
        )
    for field, check in (
        ("event_type", check_type_pattern),
        ("topic", check_pattern),
        ("dead_letter_topic", check_pattern),
    ):
        value: str = getattr(message, field)
        if value:
            try:
                check(value)
            except InvalidTopic as error:
                raise InvalidRequest(
                    f"filter.{field}: {error.message}", field=f"filter.{field}"
                ) from error
    return Filter(
        ids=frozenset(LetterId.parse(text) for text in message.ids),
        subscription=message.subscription,
        reasons=frozenset(message.reasons),
        after_ns=_ns(message.after) if message.HasField("after") else None,
        before_ns=_ns(message.before) if message.HasField("before") else None,
        event_type=message.event_type,
        key=message.key,
        error_contains=message.error_contains,
        topic=message.topic,
        dead_letter_broker=message.dead_letter_broker,
        dead_letter_topic=message.dead_letter_topic,
    )


def _wanted(request: pb.DeadLettersRedriveRequest | pb.DeadLettersDiscardRequest) -> Filter:
    """Raises InvalidRequest when it is not said which: every one of them is seldom meant."""
    wanted = filter_from(request.filter)
    if not wanted and not request.all:
        raise InvalidRequest(
            "say which dead letters, in the filter, or set all for every one of them",
            field="filter",
        )
    return wanted


def _rate(rate: float) -> float:
    if not math.isfinite(rate) or rate < 0 or (rate and rate < 1 / 3600):
        raise InvalidRequest(
            f"rate_per_second: {rate} is none; use a number above 0", field="rate_per_second"
        )
    return min(rate or RATE, MAX_RATE)


def _check_template(topic: str) -> None:
    try:
        check_topic(topic.replace(_PLACEHOLDER, "topic"))
    except InvalidTopic as error:
        raise InvalidRequest(f"to_topic: {error.message}", field="to_topic") from error


# -- answers


def _put(message: pb.DeadLetter, found: Found) -> None:
    letter = found.letter
    message.id = str(letter.id)
    proto.put_event(message.event, letter.original())
    message.subscription = letter.says("subscription")
    message.reason = letter.says("reason")
    message.error = letter.says("error")
    message.broker = letter.says("broker")
    message.topic = letter.says("topic")
    if letter.came_from is not None:
        proto.put_position(message.position, letter.came_from)
    message.attempts = min(letter.attempts, 2**32 - 1)
    if letter.first_failed_ns:
        message.first_failed_at.CopyFrom(_timestamp(letter.first_failed_ns))
    if letter.last_failed_ns:
        message.last_failed_at.CopyFrom(_timestamp(letter.last_failed_ns))
    message.generation = min(letter.generation, 2**32 - 1)
    message.dead_letter_broker = letter.broker
    message.dead_letter_topic = letter.topic
    proto.put_position(message.dead_letter_position, letter.position)
    message.stored_at.CopyFrom(_timestamp(letter.stored_ns))
    message.state = _STATES[found.state]
    message.data_bytes = letter.data_bytes


def _progress(progress: Progress) -> pb.DeadLettersProgress:
    message = pb.DeadLettersProgress(
        scanned=progress.scanned,
        matched=progress.matched,
        done=progress.done,
        failed=progress.failed,
        waiting=progress.waiting,
        total=progress.total,
    )
    if progress.failure is not None:
        message.failure.CopyFrom(proto.failure_to(progress.failure))
    return message


def _ns(time: Timestamp) -> int:
    return time.seconds * _NS + time.nanos


def _timestamp(time_ns: int) -> Timestamp:
    return Timestamp(seconds=time_ns // _NS, nanos=time_ns % _NS)

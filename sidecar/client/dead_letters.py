"""The client's view of dead letters: list, get, redrive, discard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from sidecar.client import messages
from sidecar.client.values import DeadLetter, DeadLetterFilter, Failure, RedriveProgress
from sidecar.v1 import dead_letters_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from datetime import datetime

PAGE_SIZE = 500


class DeadLetters:
    """
    What lies at the brokers of a sidecar and could not be delivered; of an entered Sidecar.

    Every call raises CallFailed.
    """

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def list(
        self,
        filter: DeadLetterFilter | None = None,  # noqa: A002 - as in the API
        *,
        oldest_first: bool = False,
        include_settled: bool = False,
        include_data: bool = False,
        limit: int | None = None,
    ) -> AsyncGenerator[DeadLetter, None]:
        """
        Newest first, page by page as they are taken.

        *include_settled*: also those that were redriven or discarded, as long as the broker has them.
        """
        request = pb.DeadLettersListRequest(
            filter=_filter_to(filter),
            oldest_first=oldest_first,
            include_settled=include_settled,
            include_data=include_data,
        )
        left = limit
        while left is None or left > 0:
            request.page_size = PAGE_SIZE if left is None else min(PAGE_SIZE, left)
            try:
                page = await self._stub.List(request)
            except grpc.aio.AioRpcError as error:
                raise messages.call_failed(error) from error
            for message in page.dead_letters:
                yield _letter_from(message)
            if left is not None:
                left -= len(page.dead_letters)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return

    async def get(self, id: str) -> DeadLetter:  # noqa: A002 - as in the API
        """One of them, with its data."""
        try:
            answer = await self._stub.Get(pb.DeadLettersGetRequest(id=id))
        except grpc.aio.AioRpcError as error:
            raise messages.call_failed(error) from error
        return _letter_from(answer.dead_letter)

    async def redrive(
        self,
        filter: DeadLetterFilter | None = None,  # noqa: A002
        *,
        all: bool = False,  # noqa: A002
        rate_per_second: float = 0.0,
        to_topic: str = "",
        to_broker: str = "",
        dry_run: bool = False,
        limit: int = 0,
    ) -> AsyncGenerator[RedriveProgress, None]:
        """
        Publish them again, oldest first; yields how far it is about once a second.

        Leaving the loop early stops it after what is under way. Each is redriven once, however often
        it is called: after an error, call it again. *rate_per_second* 0: 100. *limit* 0: none.
        """
        request = pb.DeadLettersRedriveRequest(
            filter=_filter_to(filter),
            all=all,
            rate_per_second=rate_per_second,
            to_topic=to_topic,
            to_broker=to_broker,
            dry_run=dry_run,
            limit=limit,
        )
        async for progress in _followed(self._stub.Redrive(request)):
            yield progress

    async def discard(
        self,
        filter: DeadLetterFilter | None = None,  # noqa: A002
        *,
        all: bool = False,  # noqa: A002
        dry_run: bool = False,
        limit: int = 0,
    ) -> AsyncGenerator[RedriveProgress, None]:
        """Give them up for good; as `redrive`."""
        request = pb.DeadLettersDiscardRequest(
            filter=_filter_to(filter), all=all, dry_run=dry_run, limit=limit
        )
        async for progress in _followed(self._stub.Discard(request)):
            yield progress


async def _followed(call: Any) -> AsyncGenerator[RedriveProgress, None]:
    try:
        async for response in call:
            yield _progress_from(response)
    except grpc.aio.AioRpcError as error:
        raise messages.call_failed(error) from error
    finally:
        call.cancel()


# -- messages to values and back


def _filter_to(wanted: DeadLetterFilter | None) -> pb.DeadLetterFilter:
    wanted = wanted or DeadLetterFilter()
    return pb.DeadLetterFilter(
        ids=wanted.ids,
        subscription=wanted.subscription,
        reasons=wanted.reasons,
        after=_timestamp(wanted.after),
        before=_timestamp(wanted.before),
        event_type=wanted.event_type,
        key=wanted.key,
        error_contains=wanted.error_contains,
        topic=wanted.topic,
        dead_letter_broker=wanted.dead_letter_broker,
        dead_letter_topic=wanted.dead_letter_topic,
    )


def _timestamp(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    time = Timestamp()
    time.FromDatetime(moment)
    return time


def _letter_from(message: pb.DeadLetter) -> DeadLetter:
    state = pb.DeadLetterState.Name(message.state)
    return DeadLetter(
        id=message.id,
        event=messages.event_from(message.event),
        subscription=message.subscription,
        reason=message.reason,
        error=message.error,
        broker=message.broker,
        topic=message.topic,
        position=messages.position_from(message.position) if message.HasField("position") else None,
        attempts=message.attempts,
        first_failed_at=messages.datetime_from(message, "first_failed_at"),
        last_failed_at=messages.datetime_from(message, "last_failed_at"),
        generation=message.generation,
        dead_letter_broker=message.dead_letter_broker,
        dead_letter_topic=message.dead_letter_topic,
        dead_letter_position=messages.position_from(message.dead_letter_position),
        stored_at=messages.datetime_from(message, "stored_at"),
        state=state.removeprefix("DEAD_LETTER_STATE_").lower(),
        data_bytes=message.data_bytes,
    )


def _progress_from(
    response: pb.DeadLettersRedriveResponse | pb.DeadLettersDiscardResponse,
) -> RedriveProgress:
    progress = response.progress
    failure = None
    if progress.HasField("failure"):
        failure = Failure(**messages.failure_fields(progress.failure))
    return RedriveProgress(
        scanned=progress.scanned,
        matched=progress.matched,
        done=progress.done,
        failed=progress.failed,
        waiting=progress.waiting,
        total=progress.total,
        failure=failure,
        finished=response.finished,
    )

"""The gRPC door: every RPC, health and reflection, on a Unix socket and on loopback TCP."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from sidecar.errors import AddressUnavailable, Internal, MalformedBody, SidecarError
from sidecar.services.pubsub import SERVICE as PUBSUB
from sidecar.services.pubsub import PubSub
from sidecar.services.rpc import Call, ServerStreamMethod, UnaryMethod
from sidecar.v1 import pubsub_pb2 as pb
from sidecar.wire import status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sidecar.config import Limits

MessageT = TypeVar("MessageT", bound=Message)

log = logging.getLogger(__name__)

SLACK_BYTES = 1024 * 1024
"""What a message may be larger than the events in it."""
_STATUS = {code.value[0]: code for code in grpc.StatusCode}


LEAVING_SECONDS = 0.05
"""Not cancelled for so long after its last request, a call is left in order. (It takes a turn or two.)"""


class GrpcDoor:
    """Serves while open; `stop` lets calls under way end."""

    def __init__(
        self,
        methods: Sequence[UnaryMethod[Any, Any]],
        pubsub: PubSub,
        limits: Limits,
        *,
        streams: Sequence[ServerStreamMethod[Any, Any]] = (),
    ) -> None:
        size = limits.max_batch_bytes + SLACK_BYTES
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size + limits.max_event_bytes),
                ("grpc.max_concurrent_streams", limits.max_streams),
                ("grpc.so_reuseport", 0),
                # A peer that vanished without a word is noticed within a minute.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ]
        )
        self._pubsub = pubsub
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = self._register(methods, streams)
        reflection.enable_server_reflection(
            [*services, HEALTH, reflection.SERVICE_NAME], self._server
        )
        self._services = services

    def _register(
        self,
        methods: Sequence[UnaryMethod[Any, Any]],
        streams: Sequence[ServerStreamMethod[Any, Any]],
    ) -> list[str]:
        handlers: dict[str, dict[str, grpc.RpcMethodHandler]] = {}
        for method in methods:
            handlers.setdefault(method.service, {})[method.name] = (
                grpc.unary_unary_rpc_method_handler(
                    _unary(method),
                    request_deserializer=_reader(method.request),
                    response_serializer=method.response.SerializeToString,
                )
            )
        for stream in streams:
            handlers.setdefault(stream.service, {})[stream.name] = (
                grpc.unary_stream_rpc_method_handler(
                    _streaming(stream),
                    request_deserializer=_reader(stream.request),
                    response_serializer=stream.response.SerializeToString,
                )
            )
        handlers.setdefault(PUBSUB, {}).update(
            PublishStream=grpc.stream_stream_rpc_method_handler(
                self._publish_stream,
                request_deserializer=_reader(pb.PublishStreamRequest),
                response_serializer=pb.PublishStreamResponse.SerializeToString,
            ),
            Subscribe=grpc.stream_stream_rpc_method_handler(
                self._subscribe,
                request_deserializer=_reader(pb.SubscribeRequest),
                response_serializer=pb.SubscribeResponse.SerializeToString,
            ),
        )
        for service, of_service in handlers.items():
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, of_service),)
            )
        return list(handlers)

    # -- life

    def listen(self, address: str, setting: str) -> int:
        """
        Open "host:port" or "unix:/path" before `start`; returns the port (1 for a Unix socket).

        Raises AddressUnavailable.
        """
        try:
            port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressUnavailable(
                f"{setting}: cannot listen on {address}. Is another sidecar running? Stop it, or set "
                f"{setting} to another place",
                address=address,
            ) from error
        return port

    async def start(self) -> None:
        await self._server.start()

    async def set_ready(self, *, ready: bool) -> None:
        """What the health service answers, for the server as a whole and for each service."""
        serving = health_pb2.HealthCheckResponse
        state = serving.SERVING if ready else serving.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, state)

    async def stop(self, grace_seconds: float) -> None:
        await self._server.stop(grace_seconds)

    # -- streams

    async def _publish_stream(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        stream, send = self._pubsub.publish_stream(), _writer(context)
        malformed: MalformedBody | None = None

        async def write() -> None:
            async for answer in stream.answers():
                await send(answer)

        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write())
                while (request := await context.read()) is not grpc.aio.EOF:
                    if isinstance(request, MalformedBody):
                        # Which request it was cannot be said: what came before is answered first.
                        malformed = request
                        break
                    await stream.take(request)
                stream.end()
        except* ConnectionError:
            malformed = None  # the client has gone; what it published is published
        if malformed is not None:
            await _abort(context, malformed)

    async def _subscribe(self, _requests: object, context: grpc.aio.ServicerContext) -> None:
        async def read() -> pb.SubscribeRequest | None:
            message = await context.read()
            if isinstance(message, MalformedBody):
                raise message
            if message is not grpc.aio.EOF:
                return cast("pb.SubscribeRequest", message)
            # Non-obvious: a client that dies ends its requests first, as one does that leaves; only
            # then is the call cancelled. It is this wait that is cancelled then.
            await asyncio.sleep(LEAVING_SECONDS)
            return None

        try:
            await self._pubsub.consume(read, _writer(context))
        except SidecarError as error:
            await _abort(context, error)
        except Exception:
            log.exception("Subscribe failed")
            await _abort(context, _internal("Subscribe"))


def _reader(kind: type[MessageT]) -> Callable[[bytes], MessageT | MalformedBody]:
    """
    kind.FromString, with a value for bytes that are none.

    What a deserializer raises, gRPC itself answers: as UNKNOWN, with a traceback in the log.
    """

    def read(body: bytes) -> MessageT | MalformedBody:
        try:
            return kind.FromString(body)
        except DecodeError:
            return MalformedBody(
                f"the message is not a {kind.DESCRIPTOR.full_name}: cut short, another message, or "
                "a string that is not UTF-8"
            )

    return read


def _writer(context: grpc.aio.ServicerContext) -> Callable[[Message], Awaitable[None]]:
    """context.write, with one error for a client that has gone: ConnectionError."""

    async def write(message: Message) -> None:
        try:
            await context.write(message)
        except grpc.aio.UsageError:
            raise
        except Exception as error:  # cygrpc's own classes are not public
            raise ConnectionResetError("the client has gone") from error

    return write


def _unary(
    method: UnaryMethod[Any, Any],
) -> Callable[[Message | MalformedBody, grpc.aio.ServicerContext], Awaitable[Message]]:
    handler, name = method.handler, method.path

    async def handle(
        request: Message | MalformedBody, context: grpc.aio.ServicerContext
    ) -> Message:
        if isinstance(request, MalformedBody):
            return await _abort(context, request)
        try:
            answer: Message = await handler(request, Call(context.time_remaining(), "grpc"))
        except SidecarError as error:
            return await _abort(context, error)
        except Exception:
            log.exception("%s failed", name)
            return await _abort(context, _internal(name))
        return answer

    return handle


def _streaming(
    method: ServerStreamMethod[Any, Any],
) -> Callable[[Message | MalformedBody, grpc.aio.ServicerContext], Awaitable[None]]:
    handler, name = method.handler, method.path

    async def handle(request: Message | MalformedBody, context: grpc.aio.ServicerContext) -> None:
        if isinstance(request, MalformedBody):
            await _abort(context, request)
        send = _writer(context)
        try:
            async with aclosing(
                handler(request, Call(context.time_remaining(), "grpc"))
            ) as answers:
                async for answer in answers:
                    await send(answer)
        except ConnectionError:
            return  # the client has gone
        except SidecarError as error:
            await _abort(context, error)
        except Exception:
            log.exception("%s failed", name)
            await _abort(context, _internal(name))

    return handle


def _internal(where: str) -> Internal:
    return Internal(f"{where} failed inside the sidecar: its log has the reason", method=where)


async def _abort(context: grpc.aio.ServicerContext, error: SidecarError) -> NoReturn:
    details = status.status_of(error)
    await context.abort(
        _STATUS[details.code],
        error.message,
        (("grpc-status-details-bin", details.SerializeToString()),),
    )
    raise AssertionError("abort raises")

"""The Connect protocol's unary form: JSON and protobuf, timeouts, and an error for every mistake."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from sidecar import errors
from sidecar.config import Limits
from sidecar.servers import connect
from sidecar.servers.http import HttpApp
from sidecar.services.rpc import Call, UnaryMethod
from sidecar.v1 import event_pb2, pubsub_pb2
from sidecar.wire.cloudevents import Defaults
from tests.support.http import request, serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from sidecar.event import Event, Outcome

PUBLISH = "/sidecar.v1.PubSub/Publish"
JSON = {"content-type": "application/json"}
PROTO = {"content-type": "application/proto"}
LIMITS = Limits(max_event_bytes=1024, max_batch_bytes=100_000)
MAX_BODY = 100_000 * 3 // 2 + 65536


@pytest.fixture(
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


async def echo(request: pubsub_pb2.PublishRequest, call: Call) -> pubsub_pb2.PublishResponse:
    """One receipt per event; the topic and the caller's deadline come back in it."""
    results = [
        pubsub_pb2.PublishResult(
            receipt=event_pb2.Receipt(
                event_id=event.id,
                broker=call.peer,
                topic=request.topic,
                durability=event_pb2.DURABILITY_STORED,
                position=event_pb2.Position(sequence=len(event.data)),
            )
        )
        for event in request.events
    ]
    return pubsub_pb2.PublishResponse(results=results)


Handler = Any


def app(handler: Handler = echo) -> HttpApp:
    async def no_publish(
        topic: str, events: Sequence[Event | errors.SidecarError], call: Call
    ) -> Sequence[Outcome]:
        raise AssertionError(topic)

    methods: list[UnaryMethod[Any, Any]] = [
        UnaryMethod(
            "sidecar.v1.PubSub",
            "Publish",
            pubsub_pb2.PublishRequest,
            pubsub_pb2.PublishResponse,
            handler,
        )
    ]
    return HttpApp(methods, no_publish, lambda _: Defaults(source="app", type=""), LIMITS)


def failing(error: Exception) -> Callable[..., Awaitable[Any]]:
    async def fail(request: object, call: Call) -> Any:
        raise error

    return fail


def example(data: bytes = b"\x00\xff") -> pubsub_pb2.PublishRequest:
    event = event_pb2.Event(id="1", type="orders.created", data=data)
    return pubsub_pb2.PublishRequest(topic="orders", events=[event])


# -- what works


@pytest.mark.parametrize(
    "content_type", ["application/proto", "application/proto; x=y", "Application/PROTO"]
)
async def test_protobuf_in_is_protobuf_out(content_type: str, tmp_path: Path) -> None:
    async with serving(app(), tmp_path / "s") as served:
        body = example().SerializeToString()
        reply = await served.ask("POST", PUBLISH, body, {"content-type": content_type})

    assert (reply.status, reply.headers["content-type"]) == (200, "application/proto")
    receipt = pubsub_pb2.PublishResponse.FromString(reply.body).results[0].receipt
    assert (receipt.event_id, receipt.topic, receipt.position.sequence) == ("1", "orders", 2)


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON"]
)
async def test_json_in_is_json_out_in_the_protobuf_mapping(
    content_type: str, tmp_path: Path
) -> None:
    body = b'{"topic":"orders","events":[{"id":"1","type":"t","data":"AP8="}]}'
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, body, {"content-type": content_type})

    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.body == (
        b'{"results":[{"receipt":{"eventId":"1","broker":"unix","topic":"orders",'
        b'"durability":"DURABILITY_STORED","position":{"sequence":"2"}}}]}'
    )


@pytest.mark.parametrize("data", ["AP8", "AP8=", "AP-_", "AP+/", ""])
async def test_json_takes_base64_in_every_form_of_the_mapping(data: str, tmp_path: Path) -> None:
    """Standard and URL-safe, padded or not (protobuf JSON mapping, bytes)."""
    body = json.dumps({"topic": "a", "events": [{"data": data}]}).encode()
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, body, JSON)

    assert reply.status == 200


async def test_json_takes_original_field_names(tmp_path: Path) -> None:
    body = b'{"topic":"a","events":[{"data_content_type":"text/plain"}],"options":null}'
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, body, JSON)

    assert reply.status == 200


async def test_an_empty_protobuf_body_is_the_empty_message(tmp_path: Path) -> None:
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, b"", PROTO)

    assert (reply.status, reply.body) == (200, b"")


async def test_gzip_is_undone(tmp_path: Path) -> None:
    body = gzip.compress(example().SerializeToString())
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, body, PROTO | {"content-encoding": "gzip"})

    assert reply.status == 200


@pytest.mark.parametrize("encoding", ["identity", "Identity"])
async def test_identity_is_no_encoding(encoding: str, tmp_path: Path) -> None:
    body = example().SerializeToString()
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, body, PROTO | {"content-encoding": encoding})

    assert reply.status == 200


async def test_a_body_of_many_pieces_is_one(tmp_path: Path) -> None:
    """Chunked, and larger than what one read brings."""
    body = example(b"x" * 90_000).SerializeToString()
    chunks = [body[i : i + 1000] for i in range(0, len(body), 1000)]
    head = (
        f"POST {PUBLISH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/proto\r\n"
        "transfer-encoding: chunked\r\n\r\n"
    )
    async with serving(app(), tmp_path / "s") as served, served.connect() as connection:
        await connection.send(head.encode())
        for chunk in chunks:
            await connection.send(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        await connection.send(b"0\r\n\r\n")
        reply = await connection.reply()

    receipt = pubsub_pb2.PublishResponse.FromString(reply.body).results[0].receipt
    assert receipt.position.sequence == 90_000


# -- deadlines


async def test_the_deadline_reaches_the_handler(tmp_path: Path) -> None:
    seen: list[Call] = []

    async def note(request: object, call: Call) -> pubsub_pb2.PublishResponse:
        seen.append(call)
        return pubsub_pb2.PublishResponse()

    async with serving(app(note), tmp_path / "s") as served:
        await served.ask("POST", PUBLISH, b"", PROTO | {"connect-timeout-ms": "1500"})
        await served.ask("POST", PUBLISH, b"", PROTO | {"connect-protocol-version": "1"})

    assert seen == [Call(1.5, "unix"), Call(None, "unix")]


async def test_a_handler_that_takes_longer_is_cancelled(tmp_path: Path) -> None:
    cancelled = []

    async def slow(request: object, call: Call) -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(call)
            raise

    async with serving(app(slow), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, b"", PROTO | {"connect-timeout-ms": "20"})

    assert (reply.status, reply.json()["code"]) == (504, "deadline_exceeded")
    assert reply.json()["message"] == "no answer within 0.02 s, the caller's deadline"
    assert cancelled == [Call(0.02, "unix")]


async def test_a_time_out_inside_the_handler_is_not_the_callers_deadline(tmp_path: Path) -> None:
    async with serving(app(failing(TimeoutError())), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, b"", PROTO | {"connect-timeout-ms": "60000"})

    assert (reply.status, reply.json()["code"]) == (500, "internal")


async def test_a_call_whose_client_has_gone_is_cancelled(tmp_path: Path) -> None:
    """A long poll must not hand deliveries to nobody."""
    begun = asyncio.Event()
    ended = asyncio.Event()

    async def poll(request: object, call: Call) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with serving(app(poll), tmp_path / "s") as served:
        async with served.connect() as connection:
            await connection.send(request("POST", PUBLISH, b"", PROTO))
            await begun.wait()
        async with asyncio.timeout(5):
            await ended.wait()
        await wait_until(lambda: served.door.calls == 0)

        assert served.door.connections == 0


# -- errors


@pytest.mark.parametrize(
    ("error", "http_status", "code"),
    [
        (errors.InvalidRequest("m"), 400, "invalid_argument"),
        (errors.EventTooLarge("m"), 400, "invalid_argument"),
        (errors.NoRoute("m"), 404, "not_found"),
        (errors.NotSupported("m"), 400, "failed_precondition"),
        (errors.QueueFull("m"), 429, "resource_exhausted"),
        (errors.BrokerUnavailable("m"), 503, "unavailable"),
        (errors.OutcomeUnknown("m"), 504, "deadline_exceeded"),
        (errors.Internal("m"), 500, "internal"),
    ],
)
async def test_an_error_is_in_connects_words(
    error: errors.SidecarError, http_status: int, code: str, tmp_path: Path
) -> None:
    async with serving(app(failing(error)), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, b"", PROTO)

    assert (reply.status, reply.headers["content-type"]) == (http_status, "application/json")
    assert (reply.json()["code"], reply.json()["message"]) == (code, "m")


async def test_an_error_carries_its_details_and_when_to_try_again(tmp_path: Path) -> None:
    full = errors.QueueFull("the queue is full", retry_after=1.2, broker="work")
    async with serving(app(failing(full)), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, b"", JSON | {"content-length": "0"})
        reply = await served.ask("POST", PUBLISH, b"{}", JSON)

    info, retry = reply.json()["details"]
    assert info["type"] == "google.rpc.ErrorInfo"
    assert info["debug"] == {
        "reason": "QUEUE_FULL",
        "domain": "sidecar",
        "metadata": {"broker": "work"},
    }
    value = base64.b64decode(info["value"] + "=" * (-len(info["value"]) % 4))
    assert error_details_pb2.ErrorInfo.FromString(value).reason == "QUEUE_FULL"
    assert "=" not in info["value"]
    assert retry["debug"] == {"retryDelay": "1.200s"}
    assert reply.headers["retry-after"] == "2"


async def test_a_fault_is_logged_once_without_event_data_and_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        serving(app(failing(KeyError("secret"))), tmp_path / "s") as served,
        served.connect() as connection,
    ):
        first = await connection.ask("POST", PUBLISH, b"", PROTO)
        after = await connection.ask("GET", "/")

    assert (first.status, first.json()["code"]) == (500, "internal")
    assert after.status == 200
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "/sidecar.v1.PubSub/Publish failed: KeyError" in record.getMessage()
    assert "secret" not in caplog.text
    assert b"secret" not in first.body


_DEEP = b'{"events":' + b"[" * 100_000
BAD_JSON = [
    (b"", "the body is not JSON: Expecting value"),
    (b"{", "the body is not JSON: Expecting property name"),
    (b"[]", "the body must be a JSON object"),
    (b"null", "the body must be a JSON object"),
    (b'"topic"', "the body must be a JSON object"),
    (b'{"topic":"\xff"}', "the body is not UTF-8: byte 10"),
    (_DEEP, "the body is nested too deeply"),
    (b'{"events":[' + b"1" * 5000 + b"]}", "the body is not JSON: Exceeds the limit"),
    (b'{"topic":"a","topic":"b"}', "the body is not JSON: a key comes twice"),
    (b'{"foo":1}', "foo: unknown field; accepted here: topic, events, options"),
    (b'{"events":[{},{"idd":1}]}', "events[1].idd: unknown field; accepted here: id, source"),
    (b'{"options":{"[a.b]":1}}', "options.[a.b]: unknown field; accepted here: minDurability"),
    (b'{"topic":1}', "topic: must be a string, not int"),
    (b'{"topic":"\\ud800"}', "topic: Unpaired surrogate"),
    (b'{"events":{"id":"x"}}', "events: repeated field events must be in []"),
    (b'{"events":"x"}', "events: must be an object"),
    (b'{"events":[null]}', "events[0]: null is not allowed"),
    (b'{"events":[1]}', "events[0]: must be an object"),
    (b'{"options":[1]}', "options[0]: must be an object"),
    (b'{"options":7}', "options: must be an object"),
    (b'{"events":[{"data":"hello, world"}]}', "events[0].data: must be base64"),
    (b'{"events":[{"data":"a"}]}', "events[0].data: must be base64"),
    (b'{"events":[{"data":1}]}', "events"),
    (b'{"events":[{"time":"zz"}]}', "events[0].time: Failed to parse timestamp"),
    (b'{"events":[{"time":{}}]}', "events[0].time: Timestamp JSON value not a string"),
    (b'{"events":[{"extensions":{"a":1}}]}', "events.extensions: must be a string, not int"),
    (b'{"events":[{"extensions":[]}]}', "events[0].extensions: "),
    (b'{"options":{"timeout":"5"}}', 'options.timeout: Duration must end with letter "s"'),
    (b'{"options":{"minDurability":"X"}}', "options.minDurability: Invalid enum value X"),
    (
        b'{"options":{"deliverAt":"2030-01-01T00:00:00Z","deliverAfter":"1s"}}',
        "options.deliverAfter: comes beside deliverAt; use one of them",
    ),
    (
        b'{"options":{"minDurability":0,"min_durability":0}}',
        "options.min_durability: comes beside minDurability; use one of them",
    ),
]


@pytest.mark.parametrize(("body", "message"), BAD_JSON, ids=range(len(BAD_JSON)))
async def test_bad_json_is_named_with_its_place(body: bytes, message: str, tmp_path: Path) -> None:
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask("POST", PUBLISH, body, JSON)

    assert (reply.status, reply.json()["code"]) == (400, "invalid_argument")
    assert reply.json()["message"].startswith(message)
    assert len(reply.json()["message"]) <= connect.MAX_TEXT + 200


def test_two_fields_of_a_oneof_are_named_at_the_top_of_a_message_too() -> None:
    body = b'{"subscription": "billing", "spec": {"name": "billing"}}'
    with pytest.raises(errors.InvalidRequest) as caught:
        connect._decode_json(pubsub_pb2.PullRequest, body)

    assert caught.value.message == "spec: comes beside subscription; use one of them"
    assert caught.value.metadata == {"field": "spec"}


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["topic", "events", "options", "id", "data", "time", "extensions", "x"])
            | st.sampled_from(["headers", "timeout", "minDurability", "deliverAt", "atomic", ""]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(_json)
def test_no_json_gets_past_the_checks_in_another_way_than_an_error_of_ours(value: object) -> None:
    """Either a message, or an error that blames the caller."""
    body = json.dumps(value).encode()
    answers: list[object] = []
    try:
        answers.append(connect._decode_json(pubsub_pb2.PublishRequest, body))
    except errors.InvalidRequest as error:
        answers.append(error)

    assert len(answers) == 1


BAD_REQUESTS = [
    ({}, b"{}", 415, "invalid_argument", "content-type '': must be"),
    (
        {"content-type": "application/x-www-form-urlencoded"},
        b"{}",
        415,
        "invalid_argument",
        "content-type 'application/x-www-form-urlencoded': must be application/json or",
    ),
    ({"content-type": "application/grpc"}, b"", 415, "invalid_argument", "content-type"),
    ({"content-type": "application/\xff"}, b"", 415, "invalid_argument", "content-type"),
    (PROTO, b"\x0a\xff", 400, "invalid_argument", "the body is not a sidecar.v1.PublishRequest"),
    (PROTO, b"\x0a\x01\xff", 400, "invalid_argument", "the body is not a sidecar.v1.Publish"),
    (
        PROTO | {"connect-protocol-version": "2"},
        b"",
        400,
        "invalid_argument",
        "connect-protocol-version",
    ),
    (PROTO | {"connect-timeout-ms": "-1"}, b"", 400, "invalid_argument", "connect-timeout-ms"),
    (PROTO | {"connect-timeout-ms": "1s"}, b"", 400, "invalid_argument", "connect-timeout-ms"),
    (PROTO | {"connect-timeout-ms": "1" * 11}, b"", 400, "invalid_argument", "connect-timeout"),
    (PROTO | {"connect-timeout-ms": "0"}, b"", 504, "deadline_exceeded", "no answer within 0 s"),
    (PROTO | {"content-encoding": "br"}, b"x", 501, "unimplemented", "content-encoding 'br'"),
    (
        PROTO | {"content-encoding": "gzip"},
        b"not gzip",
        400,
        "invalid_argument",
        "the body is not gzip",
    ),
    (
        PROTO | {"content-encoding": "gzip"},
        gzip.compress(b"\x0a\x01a")[:-3],
        400,
        "invalid_argument",
        "the body's gzip stream is cut short",
    ),
    (
        PROTO | {"content-encoding": "gzip"},
        gzip.compress(b"") + b"more",
        400,
        "invalid_argument",
        "the body's gzip stream goes on",
    ),
    (
        PROTO | {"content-encoding": "gzip"},
        gzip.compress(bytes(10_000_000)),
        413,
        "resource_exhausted",
        f"the body is larger than {MAX_BODY} bytes",
    ),
]


@pytest.mark.parametrize(
    ("headers", "body", "http_status", "code", "message"),
    BAD_REQUESTS,
    ids=range(len(BAD_REQUESTS)),
)
async def test_a_bad_request_is_answered_and_the_connection_goes_on(
    headers: dict[str, str],
    body: bytes,
    http_status: int,
    code: str,
    message: str,
    *,
    tmp_path: Path,
) -> None:
    async def late(request: Any, call: Call) -> Any:
        await asyncio.sleep(0)
        return await echo(request, call)

    async with serving(app(late), tmp_path / "s") as served, served.connect() as connection:
        reply = await connection.ask("POST", PUBLISH, body, headers)
        after = await connection.ask("POST", PUBLISH, example().SerializeToString(), PROTO)

    assert (reply.status, reply.json()["code"]) == (http_status, code)
    assert reply.json()["message"].startswith(message)
    assert after.status == 200


# -- what is not there


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
async def test_only_post_calls(method: str, tmp_path: Path) -> None:
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask(method, PUBLISH)

    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert reply.json()["message"] == f"{method} is not for {PUBLISH}: use POST"


@pytest.mark.parametrize("stream", ["PublishStream", "Subscribe"])
async def test_a_stream_is_unimplemented_and_names_what_to_use(stream: str, tmp_path: Path) -> None:
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask("POST", f"/sidecar.v1.PubSub/{stream}", b"{}", JSON)

    assert (reply.status, reply.json()["code"]) == (501, "unimplemented")
    assert reply.json()["message"] == f"{stream} is a stream: use gRPC, or here Publish"


@pytest.mark.parametrize(
    "path", ["/sidecar.v1.PubSub/Nothing", "/sidecar.v1.Nothing/Publish", "/sidecar.v1.PubSub/"]
)
async def test_an_unknown_rpc_is_unimplemented(path: str, tmp_path: Path) -> None:
    async with serving(app(), tmp_path / "s") as served:
        reply = await served.ask("POST", path, b"{}", JSON)

    assert (reply.status, reply.json()["code"]) == (404, "unimplemented")
    assert reply.json()["message"] == f"no RPC {path}; there are: {PUBLISH}"
    assert reply.json()["details"][0]["debug"]["reason"] == "METHOD_MISSING"

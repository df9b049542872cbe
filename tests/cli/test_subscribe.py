"""`sidecar subscribe` against a running sidecar: what is shown, acked, held and released."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING

import pytest

from sidecar.client import Sidecar, SubscriptionSpec
from tests.cli.command import at, consume, in_shell, name_of, publish, run, started, status

if TYPE_CHECKING:
    from tests.cli.command import Running


def test_what_was_printed_is_acked(sidecar: Running, topic: str) -> None:
    publish(sidecar, topic, "--raw", "-", "--key", "k", stdin=b"1\n2\n3\n4\n")
    first = consume(sidecar, topic, 2).lines
    rest = consume(sidecar, topic, 2).lines

    assert [line["event"]["data"] for line in first] == [1, 2]
    assert [line["event"]["data"] for line in rest] == [3, 4]
    assert {line["attempt"] for line in first + rest} == {1}


def test_no_ack_releases_what_it_showed(sidecar: Running, topic: str) -> None:
    """Looking leaves no trace: the same events come again, in their first attempt."""
    publish(sidecar, topic, "--raw", "-", stdin=b"1\n2\n3\n")
    looked = consume(sidecar, topic, 3, "--no-ack").lines
    consumed = consume(sidecar, topic, 3).lines

    assert sorted(line["event"]["data"] for line in looked) == [1, 2, 3]
    assert sorted(line["event"]["data"] for line in consumed) == [1, 2, 3]
    assert {line["attempt"] for line in looked + consumed} == {1}


def test_a_filter_shows_only_what_it_says(sidecar: Running, topic: str) -> None:
    """All of them must be true; one that ends in a star is for values that begin so."""
    for kind, subject in (("a.x", "eu/1"), ("a.y", "us/1"), ("b.x", "eu/2"), ("a.z", "eu/3")):
        publish(sidecar, topic, "data", "--type", kind, "--subject", subject)
    filters = ("--filter", "type=a.*", "--filter", "subject=eu/*")
    shown = consume(sidecar, topic, 2, *filters).lines

    assert sorted(line["event"]["subject"] for line in shown) == ["eu/1", "eu/3"]


async def test_no_ack_keeps_what_it_shows_beyond_the_lease(sidecar: Running, topic: str) -> None:
    """A long look must not use up attempts: nobody else gets what it holds, until it ends."""
    spec = SubscriptionSpec(name_of(topic), topic, lease_seconds=0.5)
    publish(sidecar, topic, "data")
    async with Sidecar(f"unix:{sidecar.grpc_socket}") as client:
        async with client.subscribe(spec, limit=0) as described:
            await described.wait_opened()
        with started("subscribe", spec.name, "--no-ack", *at(sidecar)) as command:
            shown = command.line()
            meanwhile = await client.pull(spec.name, wait_seconds=1.5)
            command.process.send_signal(signal.SIGINT)
            status_of_look = command.wait()
        [afterwards] = await client.pull(spec.name, wait_seconds=10)

        assert status_of_look == 0
        assert meanwhile == []
        assert (shown["attempt"], afterwards.attempt) == (1, 1)
        assert shown["event"]["id"] == afterwards.event.id


def test_ctrl_c_ends_a_subscribe_with_0(sidecar: Running, topic: str) -> None:
    publish(sidecar, topic, "data")
    with started("subscribe", topic, "--name", name_of(topic), *at(sidecar)) as command:
        command.line()
        command.process.send_signal(signal.SIGINT)

        assert command.wait() == 0
        assert command.stderr.read() == b""


@pytest.mark.parametrize("more", [True, False])
def test_a_reader_that_goes_ends_a_subscribe(sidecar: Running, topic: str, more: bool) -> None:  # noqa: FBT001
    """`| head -1` ends it without a word; also when no further event comes."""
    publish(sidecar, topic, "data")
    with started("subscribe", topic, "--name", name_of(topic), *at(sidecar)) as command:
        command.line()
        command.stdout.close()
        if more:
            publish(sidecar, topic, "more")

        assert command.wait() == 0
        assert command.stderr.read() == b""


def test_latest_starts_behind_what_is_there(sidecar: Running, topic: str) -> None:
    name = name_of(topic)
    publish(sidecar, topic, "old")
    arguments = ("--name", name, "--start", "latest", "--count", "1")
    with started("subscribe", topic, *arguments, *at(sidecar)) as command:
        wait_active(sidecar, name)
        publish(sidecar, topic, "new")
        line = command.line()

        assert command.wait() == 0
        assert line["event"]["data"] == "new"


def test_a_subscription_that_is_not_there_is_told(sidecar: Running) -> None:
    ended = run("subscribe", "nobody-made-this", *at(sidecar))

    assert ended.status == 1
    assert ended.out == ""
    assert ended.err.startswith("SUBSCRIPTION_MISSING: ")
    assert ended.err.count("\n") == 1


def wait_active(sidecar: Running, name: str) -> None:
    """Wait until the subscription is open at its broker."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = json.loads(status(sidecar, "--json").out)
        states = {s["name"]: s["state"] for s in found["subscriptions"]}
        if states.get(name) == "active":
            return
    raise TimeoutError(f"subscription {name} is not active")


@pytest.mark.parametrize(
    ("redirection", "why"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")]
)
def test_what_cannot_be_printed_is_not_acked(
    sidecar: Running, topic: str, redirection: str, why: str
) -> None:
    publish(sidecar, topic, "1")
    options = ("--name", name_of(topic), "--count", "1", *at(sidecar))
    ended = in_shell("subscribe", topic, *options, redirection=redirection)

    assert (ended.status, ended.err) == (1, f"cannot write to standard output: {why}\n")
    assert [line["event"]["data"] for line in consume(sidecar, topic, 1).lines] == [1]

"""`sidecar status` of a running sidecar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from sidecar import __version__
from tests.cli.command import at, consume, in_shell, name_of, publish, run, status

if TYPE_CHECKING:
    from tests.cli.command import Running


def test_status_shows_brokers_routes_and_subscriptions(sidecar: Running, topic: str) -> None:
    publish(sidecar, topic, "data")
    consume(sidecar, topic, 1)
    ended = status(sidecar)

    assert ended.status == 0
    assert "ready" in ended.out.splitlines()[0]
    for head in ("broker ", "route: topic", "subscription "):
        assert head in ended.out
    assert name_of(topic) in ended.out


def test_status_is_json_for_programs(sidecar: Running, topic: str) -> None:
    publish(sidecar, topic, "data")
    consume(sidecar, topic, 1)
    ended = status(sidecar, "--json")
    found = json.loads(ended.out)
    [subscription] = [s for s in found["subscriptions"] if s["name"] == name_of(topic)]

    assert ended.status == 0
    assert (found["ready"], found["version"]) == (True, __version__)
    assert found["brokers"]
    assert all(broker["connected"] for broker in found["brokers"])
    assert (subscription["topic"], subscription["declared"]) == (topic, False)


def test_status_comes_over_tcp_too(sidecar: Running) -> None:
    assert run("status", "--address", sidecar.grpc_address).status == 0


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_status_that_cannot_be_written_is_told(
    sidecar: Running, arguments: tuple[str, ...]
) -> None:
    ended = in_shell("status", *arguments, *at(sidecar), redirection=">/dev/full")

    assert ended.status == 1
    assert ended.err == "cannot write to standard output: No space left on device\n"

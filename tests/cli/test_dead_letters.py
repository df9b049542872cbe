"""`sidecar dead-letters …` as an operator types it, against a sidecar with dead letters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sidecar.client import DeadLetterFilter, Sidecar, new_event
from tests.cli.command import Ended, at, run, started
from tests.support.sidecar_process import SidecarProcess
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.timeout(120)

CONFIG = """
[brokers.events]
type = "memory"

[[subscriptions]]
name = "billing"
topic = "orders.created"
retry = { max_attempts = 1 }

[[subscriptions]]
name = "mailing"
topic = "mails.>"
retry = { max_attempts = 1 }
"""


@pytest.fixture
async def sidecar() -> AsyncIterator[SidecarProcess]:
    with SidecarProcess(CONFIG) as running:
        yield running


async def fail(sidecar: SidecarProcess, *ids: str, topic: str = "orders.created") -> None:
    """Publish these, and reject them: dead letters, in this order."""
    name = "billing" if topic.startswith("orders") else "mailing"
    events = [
        new_event("order.created", {"order": id_}, id=id_, key=f"customer-{int(id_) % 2}")
        for id_ in ids
    ]
    async with Sidecar(f"unix:{sidecar.grpc_socket}") as client:
        await client.publish(topic, events)
        async with client.subscribe(name, limit=len(ids), credit=1) as deliveries:
            async for delivery in deliveries:
                delivery.reject(f"no such customer: {delivery.event.id}")

        async def are_there() -> bool:
            found = client.dead_letters.list(DeadLetterFilter(subscription=name))
            return {letter.event.id async for letter in found} >= set(ids)

        await until(are_there)


def listed_count(sidecar: SidecarProcess) -> int:
    return len(listed(sidecar, "--json").lines)


def letters(sidecar: SidecarProcess, *arguments: str) -> Ended:
    return run("dead-letters", *arguments, *at(sidecar))


def listed(sidecar: SidecarProcess, *arguments: str) -> Ended:
    return letters(sidecar, "list", *arguments)


def ids(ended: Ended) -> list[str]:
    assert ended.status == 0, ended.err
    return [line["event"]["id"] for line in ended.lines]


async def test_a_list_tells_what_failed_and_why(sidecar: SidecarProcess) -> None:
    await fail(sidecar, "1", "2", "3")
    table = listed(sidecar)
    newest, *_ = listed(sidecar, "--json").lines

    assert table.status == 0
    assert len(table.out.splitlines()) == 4
    assert "no such customer: 3" in table.out.splitlines()[1]
    assert newest["id"] in table.out
    assert (newest["subscription"], newest["reason"], newest["state"]) == (
        "billing",
        "rejected",
        "open",
    )
    assert (newest["error"], newest["topic"]) == ("no such customer: 3", "orders.created")
    assert newest["event"]["id"] == "3"
    assert "data" not in newest["event"]


async def test_a_list_is_of_what_is_asked_for(sidecar: SidecarProcess) -> None:
    await fail(sidecar, "1", "2", "3", "4")
    await fail(sidecar, "5", topic="mails.in")
    expected: dict[tuple[str, ...], list[str]] = {
        (): ["5", "4", "3", "2", "1"],
        ("--oldest-first", "-n", "2"): ["1", "2"],
        ("-s", "mailing"): ["5"],
        ("--key", "customer-0"): ["4", "2"],
        ("--error", "customer: 3"): ["3"],
        ("--topic", "mails.*"): ["5"],
        ("--type", "order.*", "--since", "1h"): ["5", "4", "3", "2", "1"],
        ("--until", "1h"): [],
        ("--reason", "expired"): [],
        ("--in", "events/dlq.mails.>"): ["5"],
    }
    found = {asked: ids(listed(sidecar, *asked, "--json")) for asked in expected}
    more = listed(sidecar, "-n", "2")

    assert found == expected
    assert "more than 2" in more.err
    assert listed(sidecar, "-s", "nobody").status == 1
    assert "SUBSCRIPTION_MISSING" in listed(sidecar, "-s", "nobody").err


async def test_one_is_shown_with_its_data(sidecar: SidecarProcess) -> None:
    await fail(sidecar, "7")
    (line,) = listed(sidecar, "--json").lines
    shown = letters(sidecar, "show", line["id"])
    as_json = json.loads(letters(sidecar, "show", line["id"], "--json").out)
    missing = letters(sidecar, "show", "events/dlq.orders.created/999~00000000")

    assert '"order": "7"' in shown.out
    assert "no such customer: 7" in shown.out
    assert as_json["event"]["data"] == {"order": "7"}
    assert missing.status == 1
    assert "DEAD_LETTER_MISSING" in missing.err


async def test_redrive_brings_back_what_is_asked_for_and_only_once(sidecar: SidecarProcess) -> None:
    await fail(sidecar, *map(str, range(1, 11)))
    counted = letters(sidecar, "redrive", "--key", "customer-0", "--dry-run")
    done = letters(sidecar, "redrive", "--key", "customer-0", "--rate", "1000")
    again = letters(sidecar, "redrive", "--key", "customer-0")
    left = ids(listed(sidecar, "--json", "--oldest-first"))
    back = run("subscribe", "billing", "--count", "5", *at(sidecar))

    assert (counted.status, done.status, again.status) == (0, 0, 0)
    assert counted.err.startswith("5 would be redriven")
    assert done.err.startswith("5 redriven")
    assert again.err.startswith("0 redriven")
    assert left == ["1", "3", "5", "7", "9"]
    assert [line["event"]["id"] for line in back.lines] == ["2", "4", "6", "8", "10"]


async def test_redrive_takes_ids_and_another_topic(sidecar: SidecarProcess) -> None:
    await fail(sidecar, "1", "2", "3")
    _, second, _ = listed(sidecar, "--json").lines
    done = letters(sidecar, "redrive", second["id"], "--to", "events/mails.{topic}")
    back = run("subscribe", "mailing", "--count", "1", *at(sidecar))

    assert done.err.startswith("1 redriven")
    assert [(line["topic"], line["event"]["id"]) for line in back.lines] == [
        ("mails.orders.created", "2")
    ]


async def test_discard_asks_or_is_told(sidecar: SidecarProcess) -> None:
    await fail(sidecar, "1", "2", "3")
    refused = letters(sidecar, "discard", "--all")
    counted = letters(sidecar, "discard", "--all", "--dry-run")
    done = letters(sidecar, "discard", "--key", "customer-1", "--yes")

    assert refused.status == 64
    assert "--yes" in refused.err
    assert counted.err.startswith("3 would be discarded")
    assert done.err.startswith("2 discarded")
    assert ids(listed(sidecar, "--json")) == ["2"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("redrive",),
        ("discard", "--yes"),
        ("list", "--since", "yesterday"),
        ("list", "--in", "nothing"),
        ("redrive", "--all", "--to", "events/"),
        ("redrive", "--all", "--rate", "0"),
        ("show",),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run("dead-letters", *arguments).status == 64


async def test_without_dead_letters_that_is_said(sidecar: SidecarProcess) -> None:
    table, lines = listed(sidecar), listed(sidecar, "--json")
    redriven = letters(sidecar, "redrive", "--all")

    assert (table.status, table.out, table.err) == (0, "", "no dead letters\n")
    assert (lines.status, lines.out) == (0, "")
    assert redriven.err.startswith("0 redriven")


async def test_ctrl_c_ends_it_and_the_rest_stays(sidecar: SidecarProcess) -> None:
    """At one a second the second one is not due; the next call does it."""
    await fail(sidecar, *map(str, range(1, 6)))
    with started("dead-letters", "redrive", "--all", "--rate", "1", *at(sidecar)) as command:
        await until(lambda: listed_count(sidecar) < 5)
        command.process.terminate()
        status = command.wait()
    stopped = listed_count(sidecar)
    await until(lambda: states(sidecar) <= {"open"})
    rest = letters(sidecar, "redrive", "--all")
    back = run("subscribe", "billing", "--count", "5", *at(sidecar))

    assert status == 130
    assert 0 < stopped < 5
    assert f"{stopped} redriven" in rest.err
    assert sorted(line["event"]["id"] for line in back.lines) == ["1", "2", "3", "4", "5"]


def states(sidecar: SidecarProcess) -> set[Any]:
    return {line["state"] for line in listed(sidecar, "--json").lines}


async def test_without_a_sidecar_it_says_so() -> None:
    ended = run("dead-letters", "list", "--socket", "/nowhere/grpc.sock")

    assert ended.status == 1
    assert "no sidecar answers" in ended.err

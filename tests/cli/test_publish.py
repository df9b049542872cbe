"""`sidecar publish` against a running sidecar: what goes in comes out."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.command import at, consume, in_shell, publish, run, started

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.command import Running

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def envelope(topic: str, number: int, **more: Any) -> dict[str, Any]:
    """An event of its own: no other test publishes one of this source."""
    return {
        "specversion": "1.0",
        "id": f"id-{number}",
        "source": f"/{topic}",
        "type": "counted",
        "data": {"n": number},
        **more,
    }


def json_lines(*events: object) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


# -- one event


def test_an_event_of_arguments_comes_out_as_it_went_in(sidecar: Running, topic: str) -> None:
    options = (
        f"--type made --source /{topic} --id e1 --key k1 --subject s1 --extension tenant=acme "
        f"--header traceparent={TRACE}"
    )
    published = publish(sidecar, topic, '{"order": 1}', *options.split())
    [line] = consume(sidecar, topic, 1).lines
    event = line["event"]

    assert published.status == 0
    assert published.lines[0]["event_id"] == "e1"
    assert published.lines[0]["durability"] == "stored"
    assert (line["topic"], line["attempt"]) == (topic, 1)
    assert line["position"] == published.lines[0]["position"]
    assert line["headers"]["traceparent"] == TRACE
    assert event.pop("time")
    assert event == {
        "specversion": "1.0",
        "id": "e1",
        "source": f"/{topic}",
        "type": "made",
        "subject": "s1",
        "partitionkey": "k1",
        "tenant": "acme",
        "datacontenttype": "application/json",
        "data": {"order": 1},
    }


@pytest.mark.parametrize(
    ("data", "content_type"),
    [('{"a": 1}', "application/json"), ("plain words", "text/plain; charset=utf-8")],
)
def test_data_says_its_own_content_type(
    sidecar: Running, topic: str, data: str, content_type: str
) -> None:
    publish(sidecar, topic, data)
    [line] = consume(sidecar, topic, 1).lines

    assert line["event"]["datacontenttype"] == content_type


def test_no_data_is_not_empty_data(sidecar: Running, topic: str) -> None:
    publish(sidecar, topic, "--no-data")
    publish(sidecar, topic, "")
    nothing, empty = consume(sidecar, topic, 2).lines

    assert "data" not in nothing["event"]
    assert empty["event"]["data"] == ""


def test_the_same_event_again_is_a_duplicate(sidecar: Running, topic: str) -> None:
    options = ("--id", "same", "--source", f"/{topic}")
    [first] = publish(sidecar, topic, "data", *options).lines
    [second] = publish(sidecar, topic, "data", *options).lines

    assert (first["duplicate"], second["duplicate"]) == (False, True)
    assert first["position"] == second["position"]


def test_an_event_that_is_refused_is_told_and_exits_1(sidecar: Running, topic: str) -> None:
    ended = publish(sidecar, topic, "data", "--header", "ce-id=1")

    assert ended.status == 1
    assert ended.out == ""
    assert "EVENT_INVALID" in ended.err


def test_a_topic_that_is_none_is_told_and_exits_1(sidecar: Running) -> None:
    ended = publish(sidecar, "not a topic", "data")

    assert ended.status == 1
    assert "TOPIC_INVALID" in ended.err


def test_tcp_serves_as_well_as_the_socket(sidecar: Running, topic: str) -> None:
    ended = run("publish", topic, "data", "--address", sidecar.grpc_address)

    assert (ended.status, len(ended.lines)) == (0, 1)


# -- lines


def test_a_file_of_events_is_published_in_order(
    sidecar: Running, topic: str, tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(json_lines(*(envelope(topic, n, partitionkey="k") for n in range(1050))))

    published = publish(sidecar, topic, "--file", str(file))
    consumed = consume(sidecar, topic, 1050)

    assert published.status == 0
    assert published.err.startswith("published 1,050 in ")
    assert [line["event_id"] for line in published.lines] == [f"id-{n}" for n in range(1050)]
    assert [line["event"]["data"]["n"] for line in consumed.lines] == [*range(1050)]


def test_lines_may_leave_out_what_the_options_and_the_sidecar_know(
    sidecar: Running, topic: str
) -> None:
    lines = json_lines(
        {"data": 1}, {"data": 2, "type": "own", "partitionkey": "own", "tenant": "t"}
    )
    publish(sidecar, topic, "-", "--key", "given", "--extension", "tenant=given", stdin=lines)
    consumed = [line["event"] for line in consume(sidecar, topic, 2).lines]
    first, second = sorted(consumed, key=lambda event: int(event["data"]))

    assert (first["type"], first["partitionkey"], first["tenant"]) == (topic, "given", "given")
    assert (second["type"], second["partitionkey"], second["tenant"]) == ("own", "own", "t")
    assert first["source"] == second["source"] != ""


def test_raw_lines_are_the_data_of_an_event_each(sidecar: Running, topic: str) -> None:
    ended = publish(sidecar, topic, "--raw", "-", "--key", "k", stdin=b'one\r\n\n{"two": 2}')
    consumed = consume(sidecar, topic, 3).lines

    assert ended.status == 0
    assert [line["event"]["data"] for line in consumed] == ["one", "", {"two": 2}]


def test_a_bad_line_fails_alone(sidecar: Running, topic: str) -> None:
    """Its number and its reason are told; the neighbours go on, blank lines are none."""
    good, also_good = (
        json_lines(envelope(topic, 1, partitionkey="k")),
        json_lines(envelope(topic, 2, partitionkey="k")),
    )
    bad_type = json_lines(envelope(topic, 3, type=7))
    refused = json_lines(envelope(topic, 4, source="with spaces"))

    ended = publish(sidecar, topic, "-", stdin=good + b"{oops\n\n" + bad_type + refused + also_good)
    failures = [line.split(":")[0] for line in ended.err.splitlines()[:-1]]

    assert ended.status == 1
    assert [line["event_id"] for line in ended.lines] == ["id-1", "id-2"]
    assert failures == ["line 2", "line 4", "line 5"]
    assert "published 2, failed 3 (3 EVENT_INVALID)" in ended.err
    assert [line["event"]["id"] for line in consume(sidecar, topic, 2).lines] == ["id-1", "id-2"]


def test_quiet_prints_the_summary_only(sidecar: Running, topic: str) -> None:
    ended = publish(
        sidecar, topic, "-", "--quiet", stdin=json_lines(envelope(topic, 1)) + b"{oops\n"
    )

    assert ended.status == 1
    assert ended.out == ""
    assert ended.err.count("\n") == 1
    assert "published 1, failed 1 (1 EVENT_INVALID)" in ended.err


def test_a_line_that_pauses_is_published_at_once(sidecar: Running, topic: str) -> None:
    """Standard input is streamed: a receipt comes while the writer still writes."""
    with started("publish", topic, "--raw", "-", *at(sidecar)) as command:
        command.write(b"one\n")
        first = command.line()
        command.write(b"two\n")
        second = command.line()

        assert (first["topic"], second["topic"]) == (topic, topic)


def test_ctrl_c_ends_a_publish_with_its_summary(sidecar: Running, topic: str) -> None:
    with started("publish", topic, "--raw", "-", *at(sidecar)) as command:
        command.write(b"one\n")
        command.line()
        command.process.send_signal(signal.SIGINT)
        said = command.stderr.read().decode()

        assert command.wait() == 130
        assert said.startswith("published 1, interrupted in ")


def test_a_line_beyond_what_can_be_sent_fails_alone(
    sidecar: Running, topic: str, tmp_path: Path
) -> None:
    """It must not end the stream: its neighbours are published, and its number is told."""
    file = tmp_path / "lines"
    file.write_bytes(b"one\n" + b"x" * 30_000_000 + b"\n" + b"y" * 40_000_000 + b"\nfour\n")
    ended = publish(sidecar, topic, "--raw", "--key", "k", "--file", str(file))
    failures = [line.split(": ")[:2] for line in ended.err.splitlines()[:-1]]

    assert ended.status == 1
    assert failures == [["line 2", "EVENT_TOO_LARGE"], ["line 3", "EVENT_TOO_LARGE"]]
    assert "published 2, failed 2 (2 EVENT_TOO_LARGE)" in ended.err
    assert [line["event"]["data"] for line in consume(sidecar, topic, 2).lines] == ["one", "four"]


def test_large_lines_are_sent_in_requests_that_the_sidecar_takes(
    sidecar: Running, topic: str
) -> None:
    """Ten thousand events may be in a request, and these would be 40 MB of them."""
    lines = (b"x" * 1_000_000 + b"\n") * 40
    ended = publish(sidecar, topic, "--raw", "--quiet", "--batch", "10000", "-", stdin=lines)

    assert ended.err.startswith("published 40 in ")
    assert ended.status == 0


# -- where there is nothing to read, or to write


def test_a_directory_is_no_file_of_events(tmp_path: Path) -> None:
    ended = run("publish", "orders", "--file", str(tmp_path))

    assert ended.status == 64
    assert "it is a directory" in ended.err


def test_closed_standard_input_is_wrong_usage() -> None:
    ended = in_shell("publish", "orders", "-", redirection="<&-")

    assert ended.status == 64
    assert "cannot read standard input: it is closed" in ended.err


def test_nothing_is_published_whose_receipt_has_no_place_to_go(
    sidecar: Running, topic: str
) -> None:
    ended = in_shell("publish", topic, "lost", *at(sidecar), redirection=">&-")
    publish(sidecar, topic, "found")

    assert (ended.status, ended.err) == (1, "cannot write to standard output: it is closed\n")
    assert [line["event"]["data"] for line in consume(sidecar, topic, 1).lines] == ["found"]


def test_quiet_needs_no_standard_output(sidecar: Running, topic: str) -> None:
    ended = in_shell("publish", topic, "data", "--quiet", *at(sidecar), redirection=">&-")

    assert ended.status == 0


def test_receipts_that_cannot_be_written_are_told(sidecar: Running, topic: str) -> None:
    ended = in_shell("publish", topic, "data", *at(sidecar), redirection=">/dev/full")

    assert ended.status == 1
    assert ended.err == "cannot write to standard output: No space left on device\n"

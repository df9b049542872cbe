"""What the command says without a sidecar: help, version, wrong usage, the configuration."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sidecar import __version__
from tests.cli.command import ROOT, environment, run

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLE = ROOT / "config.example.toml"

WRONG = """
[grpc]
adress = "127.0.0.1:7400"

[limits]
max_event_bytes = "big"

[brokers.main]
type = "rabbit"
"""

RIGHT = """
[brokers.log]
type = "jetstream"
servers = ["nats://nats:4222"]
user = "somebody"
password = "hush"

[[routes]]
event_type = "audit.>"
broker = "log"

[[routes]]
topic = ">"
broker = "log"

[[subscriptions]]
name = "billing"
topic = "orders.*"
"""


@pytest.mark.parametrize(
    "arguments",
    [
        "bogus",
        "run --bogus",
        "publish orders.created",
        "publish orders.created data --no-data",
        "publish orders.created data --raw",
        "publish orders.created data --extension novalue",
        "publish orders.created - --id 1",
        "publish orders.created --file /does/not/exist",
        "publish orders.created data --batch 0",
        "subscribe",
        "subscribe orders --start latest",
        "subscribe orders --name mine --start yesterday",
        "subscribe orders --count 0",
        "status --address nowhere",
        "status --address 127.0.0.1:1 --socket /tmp/some.sock",
    ],
)
def test_wrong_usage_exits_64_and_says_how_to_get_help(arguments: str) -> None:
    """64 is EX_USAGE of sysexits.h."""
    ended = run(*arguments.split())

    assert ended.status == 64
    assert "-h' for help" in ended.err
    assert ended.out == ""


def test_a_command_is_needed() -> None:
    ended = run()

    assert ended.status == 64
    assert "subscribe" in ended.out + ended.err


@pytest.mark.parametrize("name", ["run", "check", "publish", "subscribe", "status"])
def test_the_help_of_a_command_has_an_example_and_its_exit_statuses(name: str) -> None:
    ended = run(name, "--help")

    assert ended.status == 0
    assert f"sidecar {name}" in ended.out.split("Example", 1)[1]
    assert "Exit status: 0" in ended.out


def test_version_says_the_version() -> None:
    ended = run("version")

    assert ended == (0, f"sidecar {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        ("version", {"grpc", "rich", "nats", "uvicorn"}),
        ("check --config /does/not/exist", {"grpc", "rich", "nats", "sidecar.client"}),
    ],
)
def test_a_command_loads_no_library_that_it_does_not_need(
    arguments: str, unwanted: set[str]
) -> None:
    """Start-up is imports: the daemon pays for no tables, and `version` for no gRPC."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sidecar", *arguments.split()],
        capture_output=True,
        env=environment(),
        timeout=20,
        check=False,
    )
    loaded = set(re.findall(r"\| +(\S+)$", done.stderr.decode(), re.MULTILINE))

    assert "sidecar.cli.commands" in loaded
    assert loaded & unwanted == set()


@pytest.mark.parametrize("name", ["run", "check"])
def test_a_wrong_configuration_prints_every_problem_and_exits_78(name: str, tmp_path: Path) -> None:
    """78 is EX_CONFIG. Each problem has a line of its own, below the name of the file."""
    file = tmp_path / "wrong.toml"
    file.write_text(WRONG)

    ended = run(name, "--config", str(file))
    heading, *problems = ended.err.splitlines()

    assert ended.status == 78
    assert ended.out == ""
    assert str(file) in heading
    assert sorted(problem.split(":")[0].strip() for problem in problems) == [
        "brokers.main.type",
        "grpc.adress",
        "limits.max_event_bytes",
    ]


def test_the_configuration_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(WRONG)

    ended = run("check", env={"SIDECAR_CONFIG": str(file)})

    assert ended.status == 78
    assert str(file) in ended.err


def test_a_configuration_that_is_not_there_is_a_configuration_problem() -> None:
    ended = run("check", "--config", "/does/not/exist.toml")

    assert ended.status == 78
    assert "cannot read /does/not/exist.toml" in ended.err


def test_check_says_what_the_configuration_means_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "right.toml"
    file.write_text(RIGHT)

    ended = run("check", "--config", str(file))
    said = [" ".join(line.split()) for line in ended.out.splitlines()]

    assert ended.status == 0
    assert "log jetstream at nats://nats:4222" in said
    assert said.index("event_type audit.> log") < said.index("topic > log")
    assert any(line.startswith("billing orders.*, ordering key, 5 attempts") for line in said)
    assert "hush" not in ended.out


def test_no_configuration_means_the_embedded_server() -> None:
    ended = run("check")

    assert ended.status == 0
    assert "jetstream, the embedded server" in ended.out


def test_the_example_configuration_is_valid() -> None:
    ended = run("check", "--config", str(EXAMPLE))

    assert (ended.status, ended.err) == (0, "")


def test_check_connect_tells_of_a_broker_that_does_not_answer(tmp_path: Path) -> None:
    file = tmp_path / "away.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    file.write_text(
        '[brokers.here]\ntype = "memory"\n'
        f'[brokers.away]\ntype = "nats"\nservers = ["nats://127.0.0.1:{port}"]\n'
        '[[routes]]\ntopic = ">"\nbroker = "here"\n'
    )

    ended = run("check", "--connect", "--config", str(file))
    said = dict(line.split(maxsplit=1) for line in ended.out.split("connections\n")[1].splitlines())

    assert ended.status == 1
    assert said["here"] == "connected"
    assert said["away"] != "connected"


def test_a_taken_address_is_told_with_its_setting(tmp_path: Path) -> None:
    """It cannot be used here, as little as a wrong one: 78, without a traceback."""
    file = tmp_path / "taken.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        file.write_text(
            f'[grpc]\naddress = "{address}"\nunix_socket = "{tmp_path}/grpc.sock"\n'
            f'[http]\nunix_socket = "{tmp_path}/http.sock"\n[admin]\naddress = ""\n'
            '[brokers.here]\ntype = "memory"\n'
        )
        ended = run("run", "--config", str(file))

    assert ended.status == 78
    assert address in ended.err
    assert "grpc.address" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "arguments", ["status", "publish orders.created data", "subscribe billing", "status --json"]
)
def test_without_a_sidecar_one_line_says_where_it_was_looked_for(
    arguments: str, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere.sock"

    ended = run(*arguments.split(), "--socket", str(nowhere))

    assert ended.status == 1
    assert ended.out == ""
    assert ended.err.count("\n") == 1
    assert str(nowhere) in ended.err
    assert "sidecar run" in ended.err


def test_the_socket_may_be_named_by_the_environment(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.sock"

    ended = run("status", env={"SIDECAR_SOCKET": str(nowhere)})

    assert str(nowhere) in ended.err


def test_the_default_socket_is_where_run_puts_it(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    place = str(tmp_path / "sidecar" / "grpc.sock")

    assert place in run("status", env=env).err
    assert place in run("check", env=env).out

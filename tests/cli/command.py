"""Run `sidecar …` as a process of its own, with or without a sidecar that it talks to."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sidecar", *arguments]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The test's own, less what would configure a sidecar; help is as wide as it likes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SIDECAR_")}
    return {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", **(more or {})}


def run(*arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Ended:
    """Run the command to its end."""
    return _ended(command(*arguments), stdin=stdin, env=env)


def _ended(words: list[str], *, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Ended:
    done = subprocess.run(
        words,
        input=stdin,
        capture_output=True,
        env=environment(env),
        timeout=20,
        check=False,
    )
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


def in_shell(*arguments: str, redirection: str) -> Ended:
    """Run the command to its end with standard streams as a shell's *redirection* has them."""
    return _ended(["sh", "-c", f'exec "$@" {redirection}', "sh", *command(*arguments)])


class Started:
    """A command that runs, and its pipes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.process = process
        self.stdin: IO[bytes] = process.stdin
        self.stdout: IO[bytes] = process.stdout
        self.stderr: IO[bytes] = process.stderr

    def write(self, data: bytes) -> None:
        self.stdin.write(data)
        self.stdin.flush()

    def line(self) -> Any:
        """The next line of standard output; it is JSON."""
        return json.loads(self.stdout.readline())

    def wait(self) -> int:
        return self.process.wait(10)


@contextmanager
def started(*arguments: str) -> Iterator[Started]:
    """The command, running; it is gone at the end."""
    process = subprocess.Popen(
        command(*arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    running = Started(process)
    try:
        yield running
    finally:
        process.kill()
        process.wait()
        for pipe in (running.stdin, running.stdout, running.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# -- the client commands


class Running(Protocol):
    """What the tests use of the fixture `sidecar`."""

    grpc_socket: Path
    grpc_address: str


def at(sidecar: Running) -> tuple[str, str]:
    return "--socket", str(sidecar.grpc_socket)


def publish(sidecar: Running, topic: str, *arguments: str, stdin: bytes = b"") -> Ended:
    return run("publish", topic, *arguments, *at(sidecar), stdin=stdin)


def consume(sidecar: Running, topic: str, count: int, *arguments: str) -> Ended:
    """The next *count* events of a subscription of the topic, always the same one."""
    how_many = ("--count", str(count))
    return run("subscribe", topic, "--name", name_of(topic), *how_many, *arguments, *at(sidecar))


def name_of(topic: str) -> str:
    return topic.replace(".", "-")


def status(sidecar: Running, *arguments: str) -> Ended:
    return run("status", *arguments, *at(sidecar))

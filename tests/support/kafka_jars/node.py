"""One node of a test's cluster: its ports, its files, its process."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from base64 import urlsafe_b64encode
from typing import TYPE_CHECKING

from sidecar.embedded import launch_command
from tests.support.kafka_jars.settings import node_settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

STOP_SECONDS = 20.0

_LINUX = sys.platform == "linux"


class Node:
    """
    A broker and controller with files under *directory*; a child ends with the thread that launches it.

    *listeners* are those for clients; each gets a port of its own, and so does the controller's. The
    ports stay ours until `close()`, also while no process listens.
    """

    def __init__(self, number: int, directory: Path, listeners: Sequence[str]) -> None:
        self.number = number
        self.paused = False
        self._home = directory / f"node-{number}"
        self._home.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        self._reserved = {name: _reserve() for name in ("CONTROLLER", *listeners)}
        self.ports: dict[str, int] = {
            name: held.getsockname()[1] for name, held in self._reserved.items()
        }
        if not _LINUX:
            self._release_ports()

    def __repr__(self) -> str:
        state = "paused" if self.paused else "running" if self.alive else "down"
        return f"<Node {self.number} {state}>"

    @property
    def config(self) -> Path:
        return self._home / "server.properties"

    @property
    def log_file(self) -> Path:
        return self._home / "server.log"

    @property
    def log(self) -> str:
        """What it has logged and printed so far, over all its starts."""
        files = (self.log_file, self._home / "output")
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def answering(self) -> bool:
        return self.alive and not self.paused

    @property
    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.ports["PLAINTEXT"])) == 0

    def configure(self, settings: Mapping[str, str]) -> None:
        """Write server.properties: the node's own settings, and *settings*, which win."""
        every = {**node_settings(self.number, self.ports, self._data), **settings}
        self.config.write_text("".join(f"{key}={value}\n" for key, value in every.items()))

    def copy_storage(self, formatted: Node) -> None:
        """Format as *formatted* is: the two differ by two lines, and a format takes a second."""
        shutil.copytree(formatted._data, self._data)
        told = self._data / "meta.properties"
        text = re.sub(r"(?m)^node\.id=.*$", f"node.id={self.number}", told.read_text())
        told.write_text(re.sub(r"(?m)^directory\.id=.*$", f"directory.id={kafka_uuid()}", text))

    def launch(self, java: Path, *arguments: str) -> None:
        """Start the process; it listens a second or two later."""
        assert not self.alive
        with (self._home / "output").open("ab") as output:
            self._process = subprocess.Popen(
                launch_command(java, *arguments),
                stdin=subprocess.PIPE,  # The launcher's guard watches it.
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ask_to_stop(self) -> None:
        """SIGTERM; `wait_until_gone()` afterwards."""
        self.resume()
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self.wait_until_gone()

    def wait_until_gone(self) -> None:
        """SIGKILL helps after STOP_SECONDS."""
        if self._process is None:
            return
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process, self.paused = None, False

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
        self.paused = False

    def close(self) -> None:
        self.kill()
        self._release_ports()

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def _release_ports(self) -> None:
        for held in self._reserved.values():
            held.close()


def kafka_uuid() -> str:
    """A new id as Kafka writes them: base64 for URLs, never with a dash in front."""
    return "k" + urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]


def _reserve() -> socket.socket:
    """
    A loopback port of the system's choice, held by the socket returned.

    Non-obvious: the socket is bound and does not listen, and both it and Java's have SO_REUSEADDR: so
    Linux lets the node listen on the port, and gives it to nobody else while the node is down, not
    even to an outgoing connection. Other systems want it closed first, and leave a small risk.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held

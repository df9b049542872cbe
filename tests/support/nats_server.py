"""A real nats-server that a test starts, kills, pauses and brings back on the same port."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sidecar.embedded import chosen_port, find_binary, launch_command

if TYPE_CHECKING:
    from types import TracebackType

DEADLINE_SECONDS = 10.0


class NatsServer:
    """
    One nats-server with JetStream, on a loopback port that the system chooses; a context manager.

    Methods are plain functions and return when it is so (started: it accepts connections; stopped:
    it is gone), which takes some 50 ms: call them from async tests as well. Data, port and access
    stay over stop/kill and start; the directory goes with `close()`. The server ends with the test
    process, whatever ends that.

    *token*, or *user* and *password*: what clients must show. *config*: more settings, in the form of
    nats-server's configuration as a dict; they win over ours.
    """

    def __init__(
        self,
        *,
        token: str = "",
        user: str = "",
        password: str = "",
        jetstream: bool = True,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="nats-server-"))
        self.port = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._config: dict[str, Any] = {"host": "127.0.0.1", "ports_file_dir": str(self.directory)}
        if jetstream:
            self._config["jetstream"] = {"store_dir": str(self.directory)}
        if token:
            self._config["authorization"] = {"token": token}
        elif user:
            self._config["authorization"] = {"user": user, "password": password}
        self._config |= config or {}

    @property
    def url(self) -> str:
        """`nats://127.0.0.1:<port>`, without a token or user; good after the first start."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """All that the server has printed so far, over all its starts."""
        return (self.directory / "server.log").read_text(errors="replace")

    def start(self) -> Self:
        assert not self.alive
        config = self.directory / "server.conf"
        config.write_text(json.dumps({"port": self.port, **self._config}))
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                launch_command(find_binary(""), "-c", str(config)),
                stdin=subprocess.PIPE,  # The launcher's guard watches it.
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_listening(self._process)
        return self

    def stop(self) -> None:
        """SIGTERM, as an operator would; SIGKILL if that does not do."""
        if self._process is None:
            return
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._let_go()

    def kill(self) -> None:
        """SIGKILL: what was not written to a file is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE_SECONDS)
            self._let_go()

    def restart(self) -> None:
        """Stop and start, on the same port with the same data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it if it runs, and take its files away."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _wait_until_listening(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (port := chosen_port(self.directory, process.pid)) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nats-server did not start:\n{self.log}")
            time.sleep(0.01)
        self.port = port

    def _let_go(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None
        for ports in self.directory.glob("*.ports"):
            with contextlib.suppress(FileNotFoundError):
                ports.unlink()

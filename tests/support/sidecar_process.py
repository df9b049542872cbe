"""A real `sidecar run` in a process of its own, as an operator would start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

ROOT = Path(__file__).parents[2]
START_SECONDS = 20.0
POLL_SECONDS = 0.02


class SidecarProcess:
    """
    Starts, stops and kills one sidecar; its places and data stay the same over a restart.

    *config* is TOML without the tables of places, which are ours: [grpc], [http], [admin],
    [embedded]. Empty: the embedded nats-server. Everything is below `directory`, and the sockets
    are in `directory/sidecar`, where the clients look when XDG_RUNTIME_DIR is `directory`.
    """

    def __init__(
        self,
        config: str = "",
        *,
        environment: dict[str, str] | None = None,
        ready: bool = True,
        command: list[str] | None = None,
    ) -> None:
        """*ready*: wait until the brokers are connected, not only until the doors are open."""
        self._temporary = tempfile.TemporaryDirectory(prefix="sidecar-test-")
        self.directory = Path(self._temporary.name)
        sockets = self.directory / "sidecar"
        self.grpc_socket = sockets / "grpc.sock"
        self.http_socket = sockets / "http.sock"
        grpc, admin = free_port(), free_port()
        self.grpc_address = f"127.0.0.1:{grpc}"
        self.admin_address = f"127.0.0.1:{admin}"
        self.config_path = self.directory / "sidecar.toml"
        self.config_path.write_text(
            f'grpc = {{ address = "{self.grpc_address}", unix_socket = "{self.grpc_socket}" }}\n'
            f'http = {{ unix_socket = "{self.http_socket}" }}\n'
            f'admin = {{ address = "{self.admin_address}" }}\n'
            f'embedded = {{ data_dir = "{self.directory / "data"}" }}\n'
            f"{config}\n",
            encoding="utf-8",
        )
        self._environment = os.environ | (environment or {})
        self._wait_ready = ready
        self._command = command or [sys.executable, "-m", "sidecar"]
        self._log_path = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    # -- life

    def start(self) -> None:
        """Start, and wait until it is ready. Raises AssertionError with its log if it is not."""
        assert self.process is None, "it runs already"
        with self._log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, "run", "--config", str(self.config_path)],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        path = "readyz" if self._wait_ready else "healthz"
        self._until(lambda: self.admin(path)[0] == 200, f"/{path} answers 200")

    def stop(self, *, seconds: float = 40) -> int:
        """SIGTERM, and wait for the drain; answers the exit status."""
        process, self.process = self.process, None
        assert process is not None, "it does not run"
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"it did not stop within {seconds:g} s\n{self.log}") from None

    def kill(self) -> None:
        """kill -9."""
        process, self.process = self.process, None
        assert process is not None, "it does not run"
        process.kill()
        process.wait()

    def restart(self) -> None:
        """Stop if it runs, and start again at the same place with the same data."""
        if self.process is not None:
            self.stop()
        self.start()

    def close(self) -> None:
        if self.process is not None:
            self.stop()
        self._temporary.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            if self.process is not None:
                self.kill()
            self._temporary.cleanup()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- looks

    @property
    def pid(self) -> int:
        assert self.process is not None, "it does not run"
        return self.process.pid

    @property
    def log(self) -> str:
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    def admin(self, path: str) -> tuple[int, str]:
        """GET on the admin port: status and body; (0, "") while nobody listens."""
        try:
            with urllib.request.urlopen(f"http://{self.admin_address}/{path}", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; 0 where there is none."""
        total = 0.0
        for line in self.admin("metrics")[1].splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(
                f'{label}="{wanted}"' in series for label, wanted in labels.items()
            ):
                total += float(value)
        return total

    def _until(self, condition: object, what: str) -> None:
        assert callable(condition)
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            assert self.process is not None
            ended = self.process.poll()
            assert ended is None, f"the sidecar ended with {ended}\n{self.log}"
            assert time.monotonic() < deadline, (
                f"not within {START_SECONDS:g} s: {what}\n{self.log}"
            )
            # A process that starts announces nothing to us: look again.
            time.sleep(POLL_SECONDS)


def free_port() -> int:
    """A TCP port that nobody has now; the system gives another one each time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

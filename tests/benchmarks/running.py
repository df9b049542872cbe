"""The sidecar that is measured: a process like any other, with or without a profiler around it."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    from types import TracebackType

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 20.0


class Sidecar:
    """`sidecar run` in a directory of its own; a context manager that waits until it is ready."""

    def __init__(self, config: str, *, profile: Path | None = None) -> None:
        """
        *config*: TOML behind the sections for sockets; without [brokers] the embedded server is
        started. *profile*: where cProfile writes what it saw, at the end.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="sidecar-"))
        self.directory.chmod(0o700)
        self.grpc_socket = str(self.directory / "grpc.sock")
        self.http_socket = str(self.directory / "http.sock")
        self.start_seconds = 0.0
        """From the start of the process to ready."""
        self._admin_port = _free_port()
        self._config = self._sections() + config
        self._profile = profile
        self._process: subprocess.Popen[bytes] | None = None

    def _sections(self) -> str:
        return (
            f'[app]\nname = "benchmarks"\n[grpc]\naddress = ""\nunix_socket = "{self.grpc_socket}"\n'
            f'[http]\nunix_socket = "{self.http_socket}"\n'
            f'[admin]\naddress = "127.0.0.1:{self._admin_port}"\n'
            f'[embedded]\ndata_dir = "{self.directory}/data"\n'
        )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def rss_bytes(self) -> int:
        return int(psutil.Process(self.pid).memory_info().rss)

    def __enter__(self) -> Self:
        config = self.directory / "sidecar.toml"
        config.write_text(self._config)
        profiler = ["-m", "cProfile", "-o", str(self._profile)] if self._profile else []
        command = [sys.executable, *profiler, "-m", "sidecar", "run", "--config", str(config)]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SIDECAR_")}
        with (self.directory / "log").open("wb") as log:
            begin = time.perf_counter()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=kept,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - begin
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                log = (self.directory / "log").read_text(errors="replace")
                raise RuntimeError(f"the sidecar did not get ready:\n{log}")
            time.sleep(0.005)

    def _is_ready(self) -> bool:
        admin = http.client.HTTPConnection("127.0.0.1", self._admin_port, timeout=5)
        with contextlib.closing(admin), contextlib.suppress(OSError):
            admin.request("GET", "/readyz")
            return admin.getresponse().status == http.HTTPStatus.OK
        return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])

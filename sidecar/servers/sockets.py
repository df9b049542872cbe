"""Listening sockets: Unix sockets that only the right people reach, and TCP, with clear refusals."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.errors import AddressUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

SOCKET_MODE = 0o660
DIRECTORY_MODE = 0o750
BACKLOG = 1024
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def unix_socket(path: Path, setting: str = "") -> socket.socket:
    """
    A listening Unix socket at *path*, mode 0660 from the moment it exists.

    Its directory is made, a dead socket is replaced. *setting* is the key path to name in errors.
    Raises AddressUnavailable: another sidecar listens there, the place is not safe or not ours.
    """
    with _explained(str(path), setting), _alone_in(path.parent):
        _remove_if_dead(path, setting)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.settimeout(0)
            # Linux gives the file the mode of the socket, less the umask; elsewhere this is
            # refused, and nobody can connect before listen() anyway.
            with contextlib.suppress(OSError):
                os.fchmod(listener.fileno(), SOCKET_MODE)
            listener.bind(os.fspath(path))
            set_mode(path)
            # Before the lock goes: bound and not listening would look dead to the next one.
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener


def tcp_socket(host: str, port: int, setting: str = "") -> socket.socket:
    """
    A listening TCP socket; port 0 lets the system choose. Raises AddressUnavailable.

    A name that has several addresses is bound at its first.
    """
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with _explained(shown, setting):
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.settimeout(0)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener


def unlink(listener: socket.socket) -> None:
    """
    Remove the file of a Unix socket. To be called before it is closed: who finds it dead in between
    would put its own there, and we would remove that.
    """
    if listener.family == socket.AF_UNIX and listener.fileno() >= 0:
        remove(Path(listener.getsockname()))


# -- for servers that open their socket by its address


def check_unix_path(path: Path, setting: str = "") -> None:
    """Make the directory, remove a dead socket. Raises AddressUnavailable as unix_socket does."""
    with _explained(str(path), setting), _alone_in(path.parent):
        _remove_if_dead(path, setting)


def set_mode(path: Path) -> None:
    path.chmod(SOCKET_MODE)


def remove(path: Path) -> None:
    """Remove a socket that we listen on, if it is still there."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()


# -- the place


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """
    The directory, made if need be, and only one sidecar at a time in it.

    Two that start at once would both find the old socket dead, and the slower one would remove the
    socket that the faster one has just bound. The lock goes with the process, and is never held
    across anything that waits.
    """
    _make(directory)
    _check_private(directory)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make(directory: Path) -> None:
    # mkdir(parents=True) gives its mode to the last one only.
    for place in (*reversed(directory.parents), directory):
        if not place.exists():
            place.mkdir(mode=DIRECTORY_MODE, exist_ok=True)


def _check_private(directory: Path) -> None:
    """
    Under the temporary directory, where anyone may have made ours before us: nobody else may be
    able to swap the socket.
    """
    root = Path(tempfile.gettempdir())
    place = directory.absolute()
    if not place.is_relative_to(root):
        return
    _check_owned(place)
    for above in place.parents:
        if not above.is_relative_to(root) or above == root:
            return
        _check_closed(above)


def _check_owned(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise AddressUnavailable(
            f"{directory} is not a directory of this user: in the temporary directory the socket "
            "needs a private one; choose another path",
            path=directory,
        )
    if found.st_mode & _OTHERS_WRITE:
        raise AddressUnavailable(
            f"{directory} can be written by others: chmod 0750 it, or choose another path",
            path=directory,
        )


def _check_closed(directory: Path) -> None:
    found = directory.lstat()
    ours = found.st_uid in {os.geteuid(), 0} and stat.S_ISDIR(found.st_mode)
    closed = not found.st_mode & _OTHERS_WRITE or found.st_mode & stat.S_ISVTX
    if not ours or not closed:
        raise AddressUnavailable(
            f"{directory} can be changed by others: choose another path for the socket",
            path=directory,
        )


def _remove_if_dead(path: Path, setting: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AddressUnavailable(
            f"{path} exists and is not a socket: remove it, or {_way_out(setting)}", path=path
        )
    if _is_live(path):
        raise AddressUnavailable(
            f"{path} is in use, most likely by another sidecar: stop it, or {_way_out(setting)}",
            path=path,
        )
    path.unlink(missing_ok=True)


def _is_live(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # its queue is full: busy, not dead
            return True
        return True


@contextlib.contextmanager
def _explained(shown: str, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise AddressUnavailable(
            f"cannot listen on {shown}: {reason}; {_way_out(setting)}", address=shown
        ) from error


def _way_out(setting: str) -> str:
    return f"set {setting} to another place" if setting else "choose another place"

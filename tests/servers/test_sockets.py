"""Listening sockets: only the right people reach them, and a refusal says what to do."""

from __future__ import annotations

import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from sidecar.errors import AddressUnavailable
from sidecar.servers import sockets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))


def test_the_socket_is_for_user_and_group_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    with sockets.unix_socket(tmp_path / "s.sock"):
        assert mode(tmp_path / "s.sock") == 0o660


def test_the_directories_of_a_socket_are_made_private(tmp_path: Path) -> None:
    with sockets.unix_socket(tmp_path / "a" / "b" / "s.sock"):
        assert mode(tmp_path / "a") == 0o750
        assert mode(tmp_path / "a" / "b") == 0o750


def test_the_socket_accepts_at_once(tmp_path: Path) -> None:
    """Bound without listening it would look dead to the next sidecar."""
    with sockets.unix_socket(tmp_path / "s.sock"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s.sock"))


def test_a_dead_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    dead_socket(path)

    with sockets.unix_socket(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with sockets.unix_socket(path) as first:
        with pytest.raises(AddressUnavailable) as caught:
            sockets.unix_socket(path, "http.unix_socket")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            first.accept()[0].close()

    assert caught.value.message == (
        f"{path} is in use, most likely by another sidecar: stop it, or set http.unix_socket to "
        "another place"
    )


def test_a_socket_with_a_full_queue_is_live(tmp_path: Path) -> None:
    """Too busy to accept is not dead."""
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))

        with pytest.raises(AddressUnavailable, match="is in use"):
            sockets.check_unix_path(path)


def test_what_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("precious")

    with pytest.raises(AddressUnavailable, match="not a socket: remove it, or set grpc"):
        sockets.unix_socket(path, "grpc.unix_socket")
    assert path.read_text() == "precious"


def test_of_many_that_start_at_once_exactly_one_gets_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    dead_socket(path)

    def take(_: int) -> socket.socket | None:
        try:
            return sockets.unix_socket(path)
        except AddressUnavailable:
            return None

    with ThreadPoolExecutor(16) as pool:
        taken = [found for found in pool.map(take, range(64)) if found is not None]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    for found in taken:
        found.close()

    assert len(taken) == 1


@pytest.mark.parametrize("open_mode", [0o770, 0o757, 0o777, 0o1777])
def test_a_directory_others_can_write_is_refused_in_the_temporary_one(
    open_mode: int, tmp_path: Path
) -> None:
    """Anyone may have made it before us, to swap the socket."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(open_mode)

    with pytest.raises(AddressUnavailable, match="written by others: chmod 0750 it"):
        sockets.unix_socket(shared / "s.sock")


def test_a_directory_below_one_that_others_can_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "ours").mkdir(parents=True, mode=0o700)
    shared.chmod(0o777)

    with pytest.raises(AddressUnavailable, match=f"{shared} can be changed by others"):
        sockets.unix_socket(shared / "ours" / "s.sock")


def test_a_link_to_a_directory_is_refused_in_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")

    with pytest.raises(AddressUnavailable, match="not a directory of this user"):
        sockets.unix_socket(tmp_path / "link" / "s.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of somebody else")
def test_the_directory_of_another_user_is_refused_in_the_temporary_one(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    os.chown(theirs, 12345, 12345)

    with pytest.raises(AddressUnavailable, match="not a directory of this user"):
        sockets.unix_socket(theirs / "s.sock")


def test_a_path_too_long_for_a_socket_is_explained(tmp_path: Path) -> None:
    with pytest.raises(AddressUnavailable, match=r"cannot listen on .*too long; set x.y to"):
        sockets.unix_socket(tmp_path / ("s" * 120), "x.y")


def test_a_file_in_place_of_the_directory_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(AddressUnavailable, match="not a directory"):
        sockets.unix_socket(tmp_path / "file" / "s.sock")


def test_unlink_removes_the_file_and_a_second_time_is_fine(tmp_path: Path) -> None:
    with sockets.unix_socket(tmp_path / "s.sock") as listener:
        sockets.unlink(listener)
        sockets.unlink(listener)
    sockets.unlink(listener)

    assert list(tmp_path.iterdir()) == []


def test_a_server_that_binds_by_itself_finds_the_place_prepared(tmp_path: Path) -> None:
    """As gRPC does: the path is checked, bound by somebody else, its mode set, then removed."""
    path = tmp_path / "new" / "s.sock"
    path.parent.mkdir(mode=0o750)
    dead_socket(path)
    sockets.check_unix_path(path)
    free = not path.exists()
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        sockets.set_mode(path)
        found = mode(path)
        sockets.remove(path)

    assert free
    assert found == 0o660
    assert not path.exists()


def test_remove_leaves_what_is_no_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sockets.remove(tmp_path / "file")
    sockets.remove(tmp_path / "nothing")

    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_tcp_listens_on_loopback_of_either_family(host: str) -> None:
    with sockets.tcp_socket(host, 0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((listener.getsockname()[0], port)):
            pass


def test_a_tcp_port_in_use_names_the_setting() -> None:
    with sockets.tcp_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(AddressUnavailable) as caught:
            sockets.tcp_socket("127.0.0.1", port, "admin.address")

    assert caught.value.message == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use; set admin.address to another "
        "place"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_an_address_that_is_not_of_this_machine_is_explained(host: str) -> None:
    with pytest.raises(AddressUnavailable, match=r"cannot listen on .*:7400"):
        sockets.tcp_socket(host, 7400)


def test_a_port_can_be_taken_again_at_once() -> None:
    """A restart must not wait for connections of the run before to time out."""
    with sockets.tcp_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            first.settimeout(5)
            first.accept()[0].close()

    sockets.tcp_socket("127.0.0.1", port).close()

"""The quick starts in Go and Node: built and run as tests/clients/README.md prints them, and counted."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Protocol

import anyio
import pytest

from tests.support.clients import BUILD_SECONDS, CLIENTS, Language, Program, build, environment

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

# The programs give up after 20 s by themselves.
RUN_SECONDS = 25

pytestmark = pytest.mark.timeout(BUILD_SECONDS + 30)

GO = Language("go", "Go", ("go", "buf"), ("gen", "bin/quickstart"))
NODE = Language("node", "Node", ("node", "npm", "buf"), ("gen", "node_modules/.package-lock.json"))


class Sidecar(Protocol):
    """What these tests use of a running sidecar."""

    @property
    def grpc_socket(self) -> Path: ...
    @property
    def grpc_address(self) -> str: ...


async def run(program: Program, **options: object) -> subprocess.CompletedProcess[bytes]:
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with anyio.fail_after(RUN_SECONDS):
        return await anyio.run_process(
            [*program.command, *arguments], cwd=program.folder, env=environment(), check=False
        )


@pytest.fixture(scope="session", params=[GO, NODE], ids=["go", "node"])
def program(request: pytest.FixtureRequest) -> Program:
    return build(request.param)


# `program` stands before `sidecar` in every signature: no sidecar waits for a compiler.


@pytest.mark.parametrize("door", ["unix", "tcp"])
async def test_every_event_is_published_consumed_and_acked_once_and_the_nacked_one_twice(
    program: Program, sidecar: Sidecar, door: str
) -> None:
    """The same stubs work on both doors: grpc.unix_socket and grpc.address."""
    target = f"unix:{sidecar.grpc_socket}" if door == "unix" else sidecar.grpc_address

    done = await run(program, target=target, count=200, **names())

    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == counts(200)


async def test_a_second_run_goes_on_where_the_first_ended(
    program: Program, sidecar: Sidecar
) -> None:
    """A subscription is durable: what a run acked never comes back to the next."""
    names_of_both = names()
    runs = [
        await run(program, target=sidecar.grpc_address, count=count, **names_of_both)
        for count in (20, 30)
    ]

    assert [done.stderr.decode() for done in runs] == ["", ""]
    assert [json.loads(done.stdout) for done in runs] == [counts(20), counts(30)]


async def test_a_run_without_a_sidecar_says_where_it_looked_and_fails(
    program: Program, tmp_path: Path
) -> None:
    done = await run(program, target=f"unix:{tmp_path}/none.sock", count=1)

    assert done.returncode == 1
    assert done.stdout == b""
    assert len(done.stderr.splitlines()) == 1
    assert f"{tmp_path}/none.sock".encode() in done.stderr


@pytest.mark.parametrize("folder", ["node", "receivers/node"])
def test_the_lock_file_of_node_names_no_host(folder: str) -> None:
    """So that it holds for every registry; the hashes say that the content is the same."""
    locked = json.loads((CLIENTS / folder / "package-lock.json").read_text(encoding="utf-8"))
    packages = [entry for name, entry in locked["packages"].items() if name]

    assert [entry for entry in packages if "resolved" in entry] == []
    assert [entry for entry in packages if "integrity" not in entry] == []


def names() -> dict[str, str]:
    """A topic and a subscription that no other run has used."""
    unique = uuid.uuid4().hex
    return {"topic": f"clients.{unique}", "subscription": f"clients-{unique}"}


def counts(published: int) -> dict[str, int]:
    return {
        "published": published,
        "delivered": published + 1,
        "acked": published,
        "nacked": 1,
        "attempts_of_nacked": 2,
    }

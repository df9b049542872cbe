"""The quick starts in Go and Node: built and run as tests/clients/README.md prints them, and counted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import anyio
import pytest

ROOT = Path(__file__).parents[1]
CLIENTS = ROOT / "tests" / "clients"
CACHE = ROOT / ".cache" / "clients"

# The first build downloads and compiles grpc-go: minutes on a small machine, a second later on.
BUILD_SECONDS = 600
# The programs give up after 20 s by themselves.
RUN_SECONDS = 25

pytestmark = pytest.mark.timeout(BUILD_SECONDS + 30)


@dataclass(frozen=True)
class Language:
    name: str
    heading: str
    tools: tuple[str, ...]
    products: tuple[str, ...]


GO = Language("go", "Go", ("go",), ("gen", "bin/quickstart"))
NODE = Language("node", "Node", ("node", "npm"), ("gen", "node_modules/.package-lock.json"))


class Sidecar(Protocol):
    """What these tests use of a running sidecar."""

    @property
    def grpc_socket(self) -> Path: ...
    @property
    def grpc_address(self) -> str: ...


@dataclass(frozen=True)
class Program:
    """A quick start that is ready to run."""

    command: tuple[str, ...]
    folder: Path

    async def run(self, **options: object) -> subprocess.CompletedProcess[bytes]:
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        with anyio.fail_after(RUN_SECONDS):
            return await anyio.run_process(
                [*self.command, *arguments], cwd=self.folder, env=environment(), check=False
            )


def need(tool: str) -> None:
    """Skip where *tool* is not installed; in continuous integration that is a failure."""
    if shutil.which(tool, path=environment()["PATH"]):
        return
    if os.environ.get("CI"):
        pytest.fail(f"{tool} is not installed, and CI must run every quick start")
    pytest.skip(f"{tool} is not installed")


def environment() -> dict[str, str]:
    """Ours, with the tools of this Python environment (buf) on the PATH, as the README has it."""
    tools = Path(sys.executable).parent
    return {**os.environ, "PATH": os.pathsep.join([str(tools), os.environ.get("PATH", "")])}


def printed_commands(language: Language) -> list[str]:
    """The commands of the README's block for *language*: enter its folder, build, run."""
    text = (CLIENTS / "README.md").read_text(encoding="utf-8")
    block = re.search(
        rf"^## {language.heading}$.*?^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE
    )
    assert block, f"tests/clients/README.md has no commands for {language.heading}"
    return block.group(1).splitlines()


def digest(language: Language, commands: list[str]) -> str:
    """Of everything the build reads; what it makes lies in sub-folders and does not count."""
    ours = [path for path in (CLIENTS / language.name).iterdir() if path.is_file()]
    hashed = hashlib.sha256("\n".join(commands).encode())
    for path in sorted([*(ROOT / "proto").rglob("*.proto"), *ours]):
        hashed.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return hashed.hexdigest()


def build(language: Language) -> Program:
    """Do what the README says unless it was done; one process at a time (pytest-xdist)."""
    for tool in (*language.tools, "buf"):
        need(tool)
    *steps, last = printed_commands(language)
    program, target, address = last.rsplit(maxsplit=2)
    assert (target, address) == ("--target", "127.0.0.1:7400")
    folder = CLIENTS / language.name
    CACHE.mkdir(parents=True, exist_ok=True)
    stamp = CACHE / f"{language.name}.stamp"
    with (CACHE / f"{language.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = digest(language, steps)
        made = all((folder / product).exists() for product in language.products)
        if not (made and stamp.exists() and stamp.read_text() == wanted):
            stamp.unlink(missing_ok=True)
            run_steps(steps)
            stamp.write_text(wanted)
    return Program(tuple(program.split()), folder)


def run_steps(steps: list[str]) -> None:
    done = subprocess.run(
        ["/bin/sh", "-euxc", "\n".join(steps)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout


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

    done = await program.run(target=target, count=200, **names())

    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == counts(200)


async def test_a_second_run_goes_on_where_the_first_ended(
    program: Program, sidecar: Sidecar
) -> None:
    """A subscription is durable: what a run acked never comes back to the next."""
    names_of_both = names()
    runs = [
        await program.run(target=sidecar.grpc_address, count=count, **names_of_both)
        for count in (20, 30)
    ]

    assert [done.stderr.decode() for done in runs] == ["", ""]
    assert [json.loads(done.stdout) for done in runs] == [counts(20), counts(30)]


async def test_a_run_without_a_sidecar_says_where_it_looked_and_fails(
    program: Program, tmp_path: Path
) -> None:
    done = await program.run(target=f"unix:{tmp_path}/none.sock", count=1)

    assert done.returncode == 1
    assert done.stdout == b""
    assert len(done.stderr.splitlines()) == 1
    assert f"{tmp_path}/none.sock".encode() in done.stderr


def test_the_lock_file_of_node_names_no_host() -> None:
    """So that it holds for every registry; the hashes say that the content is the same."""
    locked = json.loads((CLIENTS / "node" / "package-lock.json").read_text(encoding="utf-8"))
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

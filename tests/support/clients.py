"""Programs in other languages: built as tests/clients/README.md prints it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"
CACHE = ROOT / ".cache" / "clients"

# The first build downloads and compiles grpc-go: minutes on a small machine, a second later on.
BUILD_SECONDS = 600


@dataclass(frozen=True)
class Language:
    name: str
    """Its folder in tests/clients."""
    heading: str
    """Of its commands in the README; the last of them runs the program, and its options are left out."""
    tools: tuple[str, ...]
    products: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """One that is ready to run, in its folder."""

    command: tuple[str, ...]
    folder: Path


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
    for tool in language.tools:
        need(tool)
    *steps, last = printed_commands(language)
    program = last.partition(" --")[0]
    folder = CLIENTS / language.name
    CACHE.mkdir(parents=True, exist_ok=True)
    name = language.name.replace("/", "-")
    stamp = CACHE / f"{name}.stamp"
    with (CACHE / f"{name}.lock").open("w") as lock:
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

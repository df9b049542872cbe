"""The README's commands work as printed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sidecar import config

if TYPE_CHECKING:
    from tests.support.sidecar_process import SidecarProcess

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(script: str, sidecar: SidecarProcess) -> str:
    """Run a block as a newcomer's shell would, with the sidecar's sockets where it looks for them."""
    # The default place is <XDG_RUNTIME_DIR>/sidecar, and the fixture's directory is called so.
    environment = os.environ | {"XDG_RUNTIME_DIR": str(sidecar.grpc_socket.parent.parent)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(300)
def test_the_shell_blocks_work_in_the_order_printed(default_sidecar: SidecarProcess) -> None:
    """One shell runs them all, as the variables of the first are used by the others."""
    shell = blocks("sh")
    if not (shutil.which("go") and shutil.which("npm")):
        assert "CI" not in os.environ, "Go and Node are missing, and CI shows all"
        shell = [block for block in shell if "go generate" not in block]
    output = run("\n".join(shell), default_sidecar)

    assert output.count('"stored"') >= 2
    assert "event: opened" in output
    assert '"id":"order-2"' in output.partition("event: delivery")[2]
    assert '"attempts_of_nacked":2' in output or "go" not in "".join(shell)


def test_the_python_block_works_as_printed(default_sidecar: SidecarProcess) -> None:
    [program] = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"XDG_RUNTIME_DIR": str(default_sidecar.grpc_socket.parent.parent)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert '{"hello":"world"}' in done.stdout.replace(" ", "")


def test_the_configuration_printed_is_valid() -> None:
    brokers, delivery, push = blocks("toml")
    checked = config.check(tomllib.loads(brokers))
    rules = config.check(tomllib.loads(delivery)).subscriptions[0].retry.rules

    assert list(checked.brokers) == ["realtime", "log"]
    assert config.check(tomllib.loads(push)).subscriptions[0].push is not None
    assert [rule.action for rule in rules] == ["retry_uncounted", "reject"]

"""The admin port: alive, ready, metrics."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import CollectorRegistry, Counter

from sidecar.servers.admin import AdminApp
from tests.support.http import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.http import Served


@pytest.fixture(
    params=[("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})],
    ids=["asyncio", "uvloop"],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@asynccontextmanager
async def admin(tmp_path: Path, reasons: list[str] | None = None) -> AsyncIterator[Served]:
    registry = CollectorRegistry()
    Counter("sidecar_events", "events", registry=registry).inc(3)
    app = AdminApp(lambda: reasons or [], registry)
    async with serving(app, tmp_path / "s.sock") as served:
        yield served


async def test_healthz_is_ok_also_when_not_ready(tmp_path: Path) -> None:
    async with admin(tmp_path, ["work: connecting"]) as served:
        reply = await served.ask("GET", "/healthz")

    assert (reply.status, reply.body) == (200, b"ok\n")


async def test_readyz_says_ready(tmp_path: Path) -> None:
    async with admin(tmp_path) as served:
        reply = await served.ask("GET", "/readyz")

    assert (reply.status, reply.body) == (200, b"ready\n")


async def test_readyz_gives_each_reason_a_line(tmp_path: Path) -> None:
    async with admin(tmp_path, ["work: connecting", "billing: no stream"]) as served:
        reply = await served.ask("GET", "/readyz")

    assert (reply.status, reply.body) == (503, b"work: connecting\nbilling: no stream\n")


async def test_readyz_is_asked_anew_each_time(tmp_path: Path) -> None:
    reasons = ["work: connecting"]
    async with admin(tmp_path, reasons) as served, served.connect() as connection:
        before = await connection.ask("GET", "/readyz")
        reasons.clear()
        after = await connection.ask("GET", "/readyz")

    assert (before.status, after.status) == (503, 200)


async def test_metrics_are_those_of_the_registry(tmp_path: Path) -> None:
    async with admin(tmp_path) as served:
        reply = await served.ask("GET", "/metrics")

    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert b"sidecar_events_total 3.0\n" in reply.body


async def test_metrics_speak_openmetrics_when_asked(tmp_path: Path) -> None:
    accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    async with admin(tmp_path) as served:
        reply = await served.ask("GET", "/metrics", headers=accept)

    assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert reply.body.endswith(b"# EOF\n")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_head_has_the_length_and_no_body(path: str, tmp_path: Path) -> None:
    async with admin(tmp_path) as served, served.connect() as connection:
        got = await connection.ask("GET", path)
        head = await connection.ask("HEAD", path)
        again = await connection.ask("GET", path)

    assert head.status == 200
    assert abs(int(head.headers["content-length"]) - len(got.body)) < 8
    assert again.status == 200


async def test_other_methods_are_refused(tmp_path: Path) -> None:
    async with admin(tmp_path) as served:
        reply = await served.ask("POST", "/readyz", b"x")

    assert reply.status == 405
    assert reply.headers["allow"] == "GET, HEAD"


async def test_other_paths_name_those_that_exist(tmp_path: Path) -> None:
    async with admin(tmp_path) as served:
        reply = await served.ask("GET", "/status")

    assert reply.status == 404
    assert reply.body == b"here are: /healthz /readyz /metrics\n"

"""
An app that is pushed to, in a process of its own: `python -m tests.support.pushed_app SOCKET`.

Each event takes it some milliseconds. It prints "got ID ATTEMPT UNDER_WAY" when one comes, and
"done ID" when it has answered; an event whose data is "poison" ends it at once, without a word.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import uvicorn

HANDLING_SECONDS = 0.005


class App:
    """Plain ASGI."""

    def __init__(self) -> None:
        self._under_way = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        body = (await receive())["body"]
        if body == b"poison":
            os._exit(3)
        event, attempt = headers[b"ce-id"].decode(), headers[b"sidecar-attempt"].decode()
        self._under_way += 1
        print("got", event, attempt, self._under_way, flush=True)  # noqa: T201
        await asyncio.sleep(HANDLING_SECONDS)
        self._under_way -= 1
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        print("done", event, flush=True)  # noqa: T201


if __name__ == "__main__":
    uvicorn.run(
        App(),
        uds=sys.argv[1],
        interface="asgi3",
        lifespan="off",
        access_log=False,
        log_level="critical",
    )

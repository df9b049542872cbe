"""Threads for calls that block in librdkafka, and that nobody waits for at the end."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_Job = tuple["asyncio.Future[Any]", "Callable[..., Any]", tuple[object, ...]]


class Threads:
    """
    Up to *most* of them, made when there is work; they end with the process.

    Those of a ThreadPoolExecutor would hold up the process' end until the last call has its
    time-out: a cluster that is away must not.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._count = 0
        self._busy = 0

    def run(self, function: Callable[..., Any], *arguments: object) -> asyncio.Future[Any]:
        """Call from the loop; cancelled, the call goes on and its answer is dropped."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self._busy >= self._count < self._most:
            self._count += 1
            name = f"{self._name}-{self._count}"
            threading.Thread(target=self._work, args=(loop,), name=name, daemon=True).start()
        self._busy += 1
        self._jobs.put((future, function, arguments))
        return future

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            future, function, arguments = self._jobs.get()
            answer, error = None, None
            try:
                answer = function(*arguments)
            except BaseException as raised:  # noqa: BLE001 - the caller's, whatever it is
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._done, future, answer, error)
            del future, answer, error, arguments

    def _done(
        self, future: asyncio.Future[Any], answer: object, error: BaseException | None
    ) -> None:
        self._busy -= 1
        if future.done():
            return
        if error is None:
            future.set_result(answer)
        else:
            future.set_exception(error)

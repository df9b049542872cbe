"""The lines of a file, a pipe or a terminal as they come: never all of it in memory."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_CHUNK_BYTES = 256 * 1024
MAX_LINE_BYTES = 32 * 1024 * 1024


class Lines:
    """
    The lines of the file descriptor *fd*.

    Waits for a slow writer without a thread and without O_NONBLOCK, which a terminal would share
    with standard output.
    """

    def __init__(self, fd: int, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._fd = fd
        self._max_line_bytes = max_line_bytes
        self._waiting: asyncio.Future[None] | None = None
        self._stopped = False
        status = os.fstat(fd)
        self.is_file = stat.S_ISREG(status.st_mode)
        self.total_bytes = status.st_size if self.is_file else None
        self.read_bytes = 0

    def stop(self) -> None:
        """End as if the input ended here."""
        self._stopped = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def read(self) -> AsyncGenerator[list[bytes | None], None]:
        """What has come since the last time, in whole lines; None for a line that is too long."""
        line = _Line(self._max_line_bytes)
        while chunk := await self._read_chunk():
            first, *others = chunk.split(b"\n")
            line.add(first)
            if others:
                *middle, rest = others
                yield [line.take(), *map(self._fitting, middle)]
                line.add(rest)
        if line.begun and not self._stopped:
            yield [line.take()]

    def _fitting(self, line: bytes) -> bytes | None:
        return line if len(line) <= self._max_line_bytes else None

    async def _read_chunk(self) -> bytes:
        await self._wait_readable()
        if self._stopped:
            return b""
        chunk = os.read(self._fd, _CHUNK_BYTES)
        self.read_bytes += len(chunk)
        return chunk

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        waiting = self._waiting = loop.create_future()

        def readable() -> None:
            if not waiting.done():
                waiting.set_result(None)

        try:
            loop.add_reader(self._fd, readable)
        except PermissionError:
            # Files on disk are always readable, and epoll refuses them. One turn for the others.
            await asyncio.sleep(0)
            return
        try:
            if not self._stopped:
                await waiting
        finally:
            loop.remove_reader(self._fd)


class _Line:
    """A line that comes in pieces."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._bytes = 0

    @property
    def begun(self) -> bool:
        return self._bytes > 0

    def add(self, piece: bytes) -> None:
        self._bytes += len(piece)
        if self._bytes > self._max_bytes:
            self._pieces.clear()
        else:
            self._pieces.append(piece)

    def take(self) -> bytes | None:
        """The whole line, None when it is too long; begin the next."""
        line = b"".join(self._pieces) if self._bytes <= self._max_bytes else None
        self._pieces.clear()
        self._bytes = 0
        return line

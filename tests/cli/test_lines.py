"""Reading lines from a descriptor, as they come."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.cli.lines import Lines

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A reading and a writing end; the test closes the writing one."""
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)


async def all_of(lines: Lines) -> list[bytes | None]:
    return [line async for some in lines.read() for line in some]


@given(st.lists(st.binary(max_size=20), max_size=20))
def test_the_lines_of_a_file_are_those_that_split_gives(pieces: list[bytes]) -> None:
    """Only a newline ends a line; what follows the last one is a line unless it is empty."""
    content = b"\n".join(pieces)
    expected = content.split(b"\n")
    if not expected[-1]:
        expected.pop()
    fd = os.memfd_create("lines")
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)

    read = asyncio.run(all_of(Lines(fd)))
    os.close(fd)

    assert read == expected


async def test_a_line_is_there_before_the_writer_writes_on(pipe: tuple[int, int]) -> None:
    """`tail -f` must not wait for a full buffer."""
    reading, writing = pipe
    async with aclosing(Lines(reading).read()) as lines:
        os.write(writing, b"first\nsec")
        first = await anext(lines)
        os.write(writing, b"ond\n")
        second = await anext(lines)
        os.close(writing)

        assert (first, second) == ([b"first"], [b"second"])
        assert [rest async for rest in lines] == []


async def test_a_line_that_is_too_long_is_skipped_alone(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"good\n" + b"x" * 11 + b"\nfine\n" + b"y" * 10 + b"\n" + b"z" * 50)
    os.close(writing)

    assert await all_of(Lines(reading, max_line_bytes=10)) == [
        b"good",
        None,
        b"fine",
        b"y" * 10,
        None,
    ]


async def test_stop_ends_the_wait_for_a_silent_writer(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    lines = Lines(reading)
    asyncio.get_running_loop().call_later(0.05, lines.stop)

    assert await all_of(lines) == []

    os.close(writing)

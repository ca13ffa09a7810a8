"""Lines that a person types or a program writes, read without blocking the loop or the end of the program."""

from __future__ import annotations

import asyncio
import os

from treadle.errors import InvalidRequest

_CHUNK = 1 << 16


class Lines:
    """An async iterator of the lines of a file descriptor, without their ends; ends where it ends.

    No thread waits in a blocking read, because the end of the program would wait for it after Ctrl-C. prompt: is shown
    before each line is read. Raises InvalidRequest for what is not UTF-8.
    """

    def __init__(self, descriptor: int, prompt: str = "") -> None:
        self._descriptor = descriptor
        self._prompt = prompt
        self._read = b""
        self._ended = False

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> str:
        print(self._prompt, end="", flush=True)
        while b"\n" not in self._read and not self._ended:
            await _readable(self._descriptor)
            chunk = os.read(self._descriptor, _CHUNK)
            self._read += chunk
            self._ended = not chunk
        if not self._read:
            raise StopAsyncIteration
        line, _, self._read = self._read.partition(b"\n")
        try:
            return line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"a line of standard input is not UTF-8: {error.reason}") from error


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:
        return  # a regular file: reading it never waits
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)

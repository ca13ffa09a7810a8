"""Prototypes that are lists of tokens, and a builder that builds when it is told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from treadle.scheduler.guidance.replicas import Builder


class AtOnce(Builder):
    """On the thread that asks."""

    def ask(self, job: Callable[[], None]) -> bool:
        job()
        return True


class Later(Builder):
    """When `build` is called. threads: whether the system has any."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Callable[[], None]] = []
        self.threads = True

    def ask(self, job: Callable[[], None]) -> bool:
        if self.threads:
            self.asked.append(job)
        return self.threads

    def build(self) -> None:
        for job in self.asked:
            job()
        self.asked.clear()


class Tokens:
    """A matcher that knows what it was fed, and whose copy it is."""

    def __init__(self, prototype: Tokens | None = None) -> None:
        self.prototype = prototype
        self.seen: list[int] = []

    def deep_copy(self) -> Self:
        assert self.prototype is None and not self.seen, "nobody moves a prototype"
        return type(self)(self)

    def consume_tokens(self, sampled_tokens: list[int]) -> bool:
        self.seen += sampled_tokens
        return True

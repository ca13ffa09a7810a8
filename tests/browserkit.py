"""A real browser for tests of the live page: Debian's Chromium, driven by Playwright, one for a whole test file."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from playwright.async_api import Browser, Page, async_playwright

CHROMIUM = os.environ.get("TREADLE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
WITHOUT = "no Chromium on this machine: apt-get install chromium, or name one in TREADLE_CHROMIUM"
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


@dataclass
class Visit:
    """A page and what it did: lines on its console, errors, and what it asked for elsewhere."""

    page: Page
    origin: str
    troubles: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", lambda message: self.troubles.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if not url.startswith((f"{self.origin}/", "data:")):
            self.elsewhere.append(url)

    async def text(self, selector: str) -> str:
        return (await self.page.inner_text(selector)).strip()

    async def until(self, selector: str, text: str) -> None:
        """Waits for an element to say so."""
        await self.page.wait_for_function(
            "([selector, text]) => document.querySelector(selector)?.innerText.includes(text)", arg=[selector, text]
        )


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        made = await playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield made
        finally:
            await made.close()


@asynccontextmanager
async def visit(
    chromium: Browser, origin: str, *, width: int = 1400, height: int = 900, dark: bool = False
) -> AsyncIterator[Visit]:
    """The live page of the gateway at `origin`."""
    context = await chromium.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    context.set_default_timeout(20_000)
    try:
        made = Visit(await context.new_page(), origin)
        made.watch()
        await made.page.goto(f"{origin}/ui")
        yield made
    finally:
        await context.close()

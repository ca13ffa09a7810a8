"""The live page in a real browser, and its stream without one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from playwright.async_api import Browser

from treadle import LLM, SamplingParams
from treadle.errors import ServiceClosed
from treadle.http import HttpServer
from treadle.http.ui import content_policy
from treadle.http.viewers import MOST_VIEWERS
from treadle.transport.messages import Health, Live, LiveEvent, LiveLatency, LiveRank, LiveRow, Stats

from .browserkit import CHROMIUM, WITHOUT, browser, visit
from .httpkit import Scripted

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
one_loop = pytest.mark.asyncio(loop_scope="module")
HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script><b>bold</b> & done'
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with browser() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(llm: LLM) -> AsyncIterator[str]:
    """A gateway in front of the real model."""
    async with HttpServer(llm, "127.0.0.1:0") as server:
        yield server.url


# ── with a browser ──


@needs_chromium
@one_loop
async def test_the_page_shows_what_the_service_does_and_asks_nobody_else(chromium: Browser, url: str, llm: LLM) -> None:
    async with visit(chromium, url) as seen:
        await seen.until("#state", "ready")
        streams = [llm.generate("Once", SamplingParams(max_tokens=400, ignore_eos=True)) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        await seen.until("#running", "3")
        await seen.until("#rows-title", "3 running, 0 waiting")
        cells = "[...document.querySelectorAll('#rows tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"
        await seen.page.wait_for_function(f"() => {cells}.length === 3 && {cells}.every((row) => row[1] === 'decode')")
        for row in await seen.page.evaluate(cells):
            assert row[2] == str(len(llm.tokenize("Once"))) and 0 < int(row[4].removesuffix(" of 400")) < 400
        ranks = await seen.page.locator("#ranks tr").all_inner_texts()
        assert [rank.split()[0] for rank in ranks] == ["0", "1"]
        for stream in streams:
            stream.abort()
        await seen.until("#rows-title", "0 running, 0 waiting")
        live = await llm.live()  # nothing runs any more, so the page has to agree to the last digit
        stats = live.stats
        await seen.until("#step", f"{stats.step:,}")
        assert await seen.text("#blocks-used") == f"{stats.blocks_used:,}"
        assert await seen.text("#blocks-cached") == f"{stats.blocks_cached:,}"
        free = stats.blocks_total - stats.blocks_used - stats.blocks_cached
        label = f"{stats.blocks_used} of {stats.blocks_total} blocks used, {stats.blocks_cached} cached, {free} free"
        assert await seen.page.get_attribute("#pool", "aria-label") == label
        assert await seen.page.evaluate("pool.cells.length") == stats.blocks_total
        assert await seen.page.evaluate("samples.length") >= 2
        shown = await seen.page.evaluate("samples[samples.length - 1]")
        assert shown[3] == pytest.approx(live.ttft.p50) and shown[6] in (None, pytest.approx(live.tpot.p50))
        assert "p50" in (await seen.page.get_attribute("#ttft > svg", "aria-label") or "")
        assert not seen.troubles and not seen.elsewhere


@needs_chromium
@one_loop
async def test_the_chat_streams_what_the_model_says_and_can_be_stopped(chromium: Browser, url: str, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    expected = (await llm.chat([{"role": "user", "content": "What is rain?"}], params).final()).text
    async with visit(chromium, url) as seen:
        page = seen.page
        await page.fill("#temperature", "0")
        await page.fill("#max-tokens", "8")
        await page.evaluate(
            "new MutationObserver(() => (window.pieces = (window.pieces || 0) + 1))"
            ".observe(byId('log'), {subtree: true, childList: true})"
        )
        await page.fill("#message", "What is rain?")
        await page.press("#message", "Enter")
        await seen.until("#log", "8 tokens")
        assert await seen.text("#log article:nth-of-type(2) p") == expected.strip()
        assert await page.evaluate("window.pieces") > 4, "it came in pieces"
        await page.fill("#max-tokens", "400")
        await page.fill("#message", "Tell a long story.")
        await page.click("#send")
        await page.wait_for_function("() => document.querySelectorAll('#log article p')[6]?.textContent.length > 0")
        assert (await llm.stats()).running == 1
        await page.click("#stop")
        await seen.until("#log", "stopped")
        async with asyncio.timeout(10):
            while (await llm.stats()).running:
                await asyncio.sleep(0.02)
        assert await page.is_enabled("#send")
        await page.fill("#max-tokens", "-1")
        await page.evaluate("ask('And?')")
        await seen.until("#log .error", "max_tokens")
        assert await page.evaluate("conversation.length") == 4, "what was refused was not said"
        await page.click("#clear")
        assert await seen.text("#log") == "Nothing has been said yet."
        assert not seen.elsewhere


@needs_chromium
@one_loop
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_it_fits_narrow_and_wide_and_can_be_read(chromium: Browser, tiny: Path, dark: bool) -> None:
    async with Scripted(tiny, TEMPLATE) as model, HttpServer(model, "127.0.0.1:0") as server:
        model.shown = busy()
        async with visit(chromium, server.url, dark=dark) as seen:
            await seen.until("#state", "degraded")
            for width in (360, 768, 1400):
                await seen.page.set_viewport_size({"width": width, "height": 800})
                wide = await seen.page.evaluate("document.documentElement.scrollWidth")
                assert wide == width, f"{wide} of {width}"
                assert await seen.page.evaluate(_UNREADABLE) == []
            background = await seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert background == ("rgb(16, 19, 23)" if dark else "rgb(245, 246, 248)")
            controls = "[...document.querySelectorAll('input, textarea, button')]"
            unnamed = f"{controls}.filter((control) => !control.labels?.length && !control.innerText)"
            assert await seen.page.evaluate(f"{unnamed}.length") == 0, "every control has a name"
            assert await seen.page.locator("#rows tr").count() == 3 + 1, (
                "two that run, one that waits, and how many more"
            )
            assert await seen.text("#per-cell") == "a square is 12 blocks"
            assert not seen.troubles


@needs_chromium
@one_loop
async def test_what_others_write_is_text(chromium: Browser, tiny: Path) -> None:
    async with Scripted(tiny, TEMPLATE) as model, HttpServer(model, "127.0.0.1:0") as server:
        model.script = HOSTILE
        event = LiveEvent(1.0, HOSTILE, HOSTILE)
        model.shown = msgspec.structs.replace(busy(), model=HOSTILE, events=[event])
        async with visit(chromium, server.url) as seen:
            await seen.until("#model", HOSTILE)
            await seen.until("#events", HOSTILE)
            await seen.page.fill("#message", HOSTILE)
            await seen.page.press("#message", "Enter")
            await seen.page.wait_for_function("() => !answering && conversation.length === 2")
            assert await seen.text("#log article:nth-of-type(2) p") == HOSTILE
            assert await seen.page.locator("main img, main script, main b:not(#events b), header img").count() == 0
            assert await seen.page.evaluate("window.pwned") is None
            assert not seen.troubles and not seen.elsewhere
            # Even if it were markup: the policy of the page lets nothing run that is not in the file.
            await seen.page.evaluate(
                "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned=1\">')"
            )
            async with asyncio.timeout(10):
                while not any("Content Security Policy" in trouble for trouble in seen.troubles):
                    await asyncio.sleep(0.02)
            assert await seen.page.evaluate("window.pwned") is None


@needs_chromium
@one_loop
async def test_a_lost_service_and_a_lost_gateway_are_said(chromium: Browser, tiny: Path) -> None:
    async with Scripted(tiny, TEMPLATE) as model:
        model.shown = busy()
        server = HttpServer(model, "127.0.0.1:0")
        await server.start()
        async with visit(chromium, server.url) as seen:
            await seen.until("#running", "2")
            model.error = ServiceClosed("nobody is there")
            await seen.until("#notice", "reaches no service")
            await seen.until("#notice", "nobody is there")
            assert await seen.page.evaluate("byId('board').classList.contains('stale')")
            assert await seen.text("#state") == "no news" and (await seen.text("#running")).startswith("2")
            model.error = None
            await seen.page.wait_for_selector("#notice", state="hidden")
            await server.close()
            await seen.until("#notice", "what is shown is old")
            async with HttpServer(model, server.url.removeprefix("http://")):
                await seen.page.wait_for_selector("#notice", state="hidden")
                await seen.until("#state", "degraded")
                assert not await seen.page.evaluate("byId('board').classList.contains('stale')")


@needs_chromium
@one_loop
async def test_where_keys_are_set_nothing_is_shown_without_one(
    chromium: Browser, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREADLE_API_KEYS", "sk-right")
    async with Scripted(tiny, TEMPLATE) as model, HttpServer(model, "127.0.0.1:0") as server:
        model.shown, model.script = busy(), "hello"
        async with visit(chromium, server.url) as seen:
            await seen.until("#notice", "an API key is needed")
            assert await seen.text("#running") == "–" and model.looks == 0
            await seen.page.fill("#key", "sk-right")
            await seen.page.press("#key", "Tab")
            await seen.until("#running", "2")
            await seen.page.fill("#message", "Hi")
            await seen.page.press("#message", "Enter")
            await seen.until("#log", "hello")
            kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
            assert "sk-right" not in await seen.page.evaluate(kept)


# ── without ──


def busy() -> Live:
    """A service with a bit of everything."""
    rows = [LiveRow("secretid", 0, "secret-tenant", i, "decode", 123_456, 123_500, 45, 200_000, 3.2) for i in range(2)]
    return Live(
        incarnation="x",
        model="an/unusually-long-name-of-a-model-that-somebody-has-chosen-without-thinking-of-phones",
        now=5.0,
        max_rows=256,
        stats=Stats(running=2, waiting=1000, step=1_234_567, blocks_total=12_000, blocks_used=2400, blocks_cached=2400),
        health=Health(state="degraded", detail="a group is being replaced"),
        rows=rows,
        queue=[LiveRow("waiting-", 0, "secret-tenant", -1, "waiting", 9, 0, 0, 20, 0.5)],
        ttft=LiveLatency(12, 0.1, 0.2, 0.3),
        blocks=bytes([0xF0, 0x0F, 0x33, 0, 0]) * 200,
        blocks_per_cell=12,
        ranks=[LiveRank(i, 4242, "restarting" if i else "lost", 123_456, 1.5, 12.3) for i in range(8)],
        events=[LiveEvent(3.0, "lost", "engine group 1: rank 0, at step 7: exit", "/secret/path")],
    )


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None), timeout=30)


async def _first_events(client: httpx.AsyncClient, count: int) -> list[tuple[str, dict[str, Any]]]:
    async with client.stream("GET", "/ui/events") as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        found: list[tuple[str, dict[str, Any]]] = []
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
                if len(found) == count:
                    break
        return found


@pytest.mark.asyncio
async def test_the_stream_has_numbers_and_no_names_and_one_poller_for_all(tiny: Path) -> None:
    async with Scripted(tiny, TEMPLATE) as model, HttpServer(model, "127.0.0.1:0") as server:
        model.shown = busy()
        viewers = server._viewers
        assert viewers is not None and not viewers.polls and model.looks == 0, "nobody looks"
        async with _client(server.url) as client:
            [(name, data), *_] = await _first_events(client, 1)
            assert name == "live" and data["stats"]["running"] == 2 and data["ttft"]["count"] == 12
            assert data["rows"][0]["output"] == 45 and len(data["ranks"]) == 8 and data["rates"] is None
            text = json.dumps(data)
            assert not any(word in text for word in ("secret", "4242", "waiting-"))
            watching = [asyncio.create_task(_first_events(client, 2)) for _ in range(4)]
            await asyncio.gather(*watching)
            before = model.looks
            assert before <= 4, "four who look are one who asks"
            async with asyncio.timeout(10):
                while viewers.polls:
                    await asyncio.sleep(0.01)
            assert len(viewers) == 0


@pytest.mark.asyncio
async def test_viewers_are_bounded_and_the_end_of_the_gateway_ends_them(tiny: Path) -> None:
    async with Scripted(tiny, TEMPLATE) as model:
        server = HttpServer(model, "127.0.0.1:0")
        await server.start()
        async with _client(server.url) as client:
            endless = [asyncio.create_task(_first_events(client, 1000)) for _ in range(MOST_VIEWERS)]
            async with asyncio.timeout(20):
                while server._viewers is None or len(server._viewers) < MOST_VIEWERS:
                    await asyncio.sleep(0.01)
            refused = await client.get("/ui/events")
            assert refused.status_code == 429 and refused.headers["retry-after"] == "5"
            await server.close()
            assert all(await asyncio.gather(*endless)), "each got something, and its stream ended in order"


@pytest.mark.asyncio
async def test_the_page_is_one_file_with_a_strict_policy(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_API_KEYS", "sk-right")
    async with Scripted(tiny) as model, HttpServer(model, "127.0.0.1:0") as server, _client(server.url) as client:
        page = await client.get("/ui")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        policy = page.headers["content-security-policy"]
        assert policy == content_policy(page.text) and "unsafe" not in policy
        assert policy.startswith("default-src 'none'; script-src 'sha256-") and "connect-src 'self'" in policy
        text = page.text.replace("http://www.w3.org/2000/svg", "")
        assert not [word for word in ("http://", "https://", 'style="', "innerHTML", "eval(") if word in text]
        denied = await client.get("/ui/events")
        assert denied.status_code == 401 and denied.headers["www-authenticate"] == "Bearer"
        wrong = await client.get("/ui/events", headers={"authorization": "Bearer sk-wrong"})
        assert wrong.status_code == 401 and model.looks == 0
        assert (await client.post("/ui")).status_code == 405


# Texts whose contrast with what lies behind them is below 4.5 (WCAG AA), large ones aside.
_UNREADABLE = """() => {
  const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const node of document.querySelectorAll("body *:not(script):not(svg):not(svg *)")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.offsetWidth || node.disabled) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) bad.push([node.id || node.tagName, node.textContent.slice(0, 20), contrast]);
  }
  return bad;
}"""

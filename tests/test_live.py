"""What a service says of itself while it works, checked against what it is doing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.client import Client
from treadle.errors import InvalidRequest, Overloaded
from treadle.kvcache import BlockPool, picture
from treadle.live_rates import rates
from treadle.scheduler.latencies import Recent
from treadle.scheduler.live import LiveDesk
from treadle.transport.codec import pack
from treadle.transport.endpoints import write_keys
from treadle.transport.messages import Abort, Live, Submit

from .faultkit import PROMPTS, Faulty, faulty, params
from .test_security import served


async def until(f: Faulty, condition: Callable[[Live], bool], what: str) -> Live:
    """Looks until it is so."""
    async with asyncio.timeout(20):
        while not condition(live := f.service.live()):
            await asyncio.sleep(0.02)
    assert condition(live), what
    return live


@pytest.mark.asyncio
async def test_rows_queue_ranks_and_latencies_are_what_happens(tmp_path: Path) -> None:
    async with faulty(tmp_path, pace=0.01, max_num_seqs=2) as f:
        message = Submit(id="a-long-identifier", tokens=pack([1, 2, 3]), params=params(1, 400), tenant="ann")
        f.service.submit(message, f.sink)
        f.service.submit(Submit(id="second", tokens=pack([4] * 20), params=params(2, 400)), f.sink)
        f.service.submit(Submit(id="third", tokens=pack([5] * 9), params=params(3, 8)), f.sink)
        await f.sink.begun("a-long-identifier", 5)
        await f.sink.begun("second", 5)
        live = await until(f, lambda live: all(row.output >= 5 for row in live.rows) and len(live.rows) == 2, "rows")
        first, second = sorted(live.rows, key=lambda row: row.age, reverse=True)
        assert (first.id, first.tenant, first.state, first.prompt, first.limit) == ("a-long-i", "ann", "decode", 3, 403)
        assert (second.id, second.tenant, second.prompt) == ("second", "", 20)
        for row in live.rows:
            assert row.prompt + row.output - 1 <= row.computed <= row.prompt + row.output and 0 < row.age < 60
        assert [(row.id, row.row, row.state, row.prompt) for row in live.queue] == [("third", -1, "waiting", 9)]
        assert (live.stats.running, live.stats.waiting, live.max_rows) == (2, 1, 2)
        assert (live.ttft.count, live.wait.count, live.tpot.count) == (2, 2, 0)
        assert 0 < live.wait.p50 <= live.ttft.p50 <= live.ttft.p99 < 20
        assert [(rank.rank, rank.pid) for rank in live.ranks] == list(enumerate(f.service.engine_pids))
        assert all(rank.state in ("busy", "ready") for rank in live.ranks)
        assert all(live.stats.step - 1 <= rank.step <= live.stats.step + 1 for rank in live.ranks)
        assert _blocks(live) == (live.stats.blocks_used, live.stats.blocks_cached) and live.stats.blocks_used
        f.service.abort(Abort("a-long-identifier"), f.sink)
        await f.sink.ended("third")
        ended = await until(f, lambda live: live.tpot.count == 1, "an end in order counts, the abort does not")
        assert 0.005 < ended.tpot.p50 < 10 and ended.ttft.count == 3
        found = rates(live, ended)
        assert found is not None and rates(live, live) is None and rates(None, live) is None
        assert found.generated * found.seconds == pytest.approx(
            ended.stats.generated_tokens - live.stats.generated_tokens
        )
        f.service.abort(Abort("second"), f.sink)
        await f.sink.ended("second")
        empty = await until(f, lambda live: not live.rows, "nothing runs")
        assert not empty.queue and len(f.service.observers.live._latencies) == 0, "nobody is followed for ever"
        assert [rank.state for rank in empty.ranks] == ["ready", "ready"]


def _blocks(live: Live) -> tuple[int, int]:
    """Of a small pool, where a cell is one block."""
    assert live.blocks_per_cell == 1 and len(live.blocks) == live.stats.blocks_total
    return sum(cell >> 4 == 15 for cell in live.blocks), sum(cell & 15 == 15 for cell in live.blocks)


@pytest.mark.asyncio
async def test_what_happens_becomes_events(tmp_path: Path) -> None:
    async with faulty(tmp_path, pace=0.003) as f:
        f.submit_all()
        await f.sink.begun("0")
        [before, _] = f.service.engine_pids
        os.kill(before, signal.SIGKILL)
        lost = await until(f, lambda live: live.health.state == "degraded", "it shows while it lasts")
        assert (lost.ranks[0].state, lost.ranks[1].state) == ("lost", "restarting")
        await f.all_ended()
        for _ in range(5):
            with pytest.raises(InvalidRequest):
                f.submit("bad", [], params(0))
        await f.service.drain(5.0)
        live = await until(f, lambda live: live.events[-1].kind == "drain", "the last")
        kinds = [event.kind for event in live.events]
        assert kinds == ["lost", "ready", "refused", "drain"]
        loss, ready, refused, _ = live.events
        assert "rank 0" in loss.text and "exit" in loss.text and loss.detail and loss.ago >= ready.ago
        assert refused.text == InvalidRequest.code and refused.count == 5
        assert live.ttft.count == len(PROMPTS), "one that was computed again is not a second first token"
        told = live.for_strangers()
        assert [event.detail for event in told.events] == [""] * 4 and [rank.pid for rank in told.ranks] == [0, 0]


@pytest.mark.asyncio
@pytest.mark.parametrize("near", [True, False])
async def test_who_comes_over_tcp_sees_no_names(tmp_path: Path, near: bool) -> None:
    keys = write_keys(tmp_path / "keys")
    async with served(tmp_path, tcp=None if near else keys, pace=0.01) as (f, endpoint):
        f.service.submit(Submit(id="name", tokens=pack([1]), params=params(1, 400), tenant="ann"), f.sink)
        await f.sink.begun("name")
        with pytest.raises(InvalidRequest):
            f.submit("bad", [], params(0))
        async with Client(endpoint, server_key=None if near else keys.public) as client:
            seen = await client.live()
        [row] = seen.rows
        assert (row.id, row.tenant) == (("name", "ann") if near else ("", "")) and row.output > 0
        assert [bool(rank.pid) for rank in seen.ranks] == [near, near]
        assert [event.kind for event in seen.events] == ["refused"]


def test_a_flood_of_one_kind_leaves_the_others_in_sight() -> None:
    desk, error = LiveDesk(), Overloaded("full", 1.0)
    desk.note("drain", "first", "", 0.0)
    for i in range(1000):
        desk.refused(error, 1.0 + i / 1000)
    desk.refused(error, 60.0)
    assert [(event.kind, event.count) for event in desk._events] == [("drain", 1), ("refused", 1000), ("refused", 1)]
    for i in range(1000):
        desk.note("dump", f"{i} " + "x" * 1000, "y" * 1000, 100.0)
    assert len(desk._events) == 64 and len(desk._events[-1].text) == len(desk._events[-1].detail) == 240


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200))
def test_percentiles_are_nearest_ranks(values: list[float]) -> None:
    recent = Recent()
    for value in values:
        recent.add(value, 10.0)
    found = recent.percentiles(20.0)
    assert found.count == len(values)
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        assert value in values and sum(other <= value for other in values) >= share * len(values)
        assert sum(other < value for other in values) < share * len(values)
    assert recent.percentiles(70.1).count == 0, "only the last minute"


@given(
    st.integers(1, 5000),
    st.lists(st.tuples(st.integers(1, 5000), st.sampled_from(["own", "cache"])), max_size=40),
    st.integers(1, 64),
)
def test_the_picture_shows_every_block_where_it_lies(total: int, marks: list[tuple[int, str]], cells: int) -> None:
    pool = BlockPool(total + 1, lambda blocks: None)
    for block, kind in marks:
        if block <= total:
            pool.refs[block] = int(kind == "own")
            pool.published[block] = kind == "cache"
    shown, per_cell = picture(pool, cells)
    assert len(shown) <= cells and len(shown) == -(-total // per_cell)
    stride = -(-per_cell // 8)
    for place, cell in enumerate(shown):
        blocks = range(1 + place * per_cell, min(1 + (place + 1) * per_cell, total + 1), stride)
        owned = sum(pool.refs[block] > 0 for block in blocks)
        cached = sum(pool.refs[block] == 0 and pool.published[block] for block in blocks)
        assert (cell >> 4, cell & 15) == (-(-15 * owned // len(blocks)), -(-15 * cached // len(blocks)))

"""An engine's death is a pause: no token lost, repeated or changed, and what kills engines fails alone."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from treadle import LLM, Client, RequestOutput, SamplingParams
from treadle.errors import EngineFailed, ServiceClosed, TreadleError

from .conftest import alive, eventually
from .servekit import serving

PROMPTS = ["The first", "A second, longer one", "Third", "And the last of the four"]


def params(i: int) -> SamplingParams:
    """Greedy and seeded in turn."""
    return SamplingParams(temperature=float(i % 2), seed=i, max_tokens=120, ignore_eos=True)


async def undisturbed(llm: LLM) -> list[list[int]]:
    streams = [llm.generate(prompt, params(i)) for i, prompt in enumerate(PROMPTS)]
    return [(await stream.final()).token_ids for stream in streams]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("number", "victim"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGTERM, 0)]
)
async def test_streams_go_on_after_a_rank_is_lost(tiny: Path, number: signal.Signals, victim: int) -> None:
    async with LLM(
        str(tiny), tensor_parallel_size=2, dtype="float32", step_timeout=2.0, debug=True, max_num_seqs=8
    ) as llm:
        expected = await undisturbed(llm)
        streams = [llm.generate(prompt, params(i)) for i, prompt in enumerate(PROMPTS)]
        before = llm.engine_pids
        await anext(streams[0])
        os.kill(before[victim], number)
        seen: list[list[int]] = [[] for _ in streams]

        async def read(i: int) -> RequestOutput:
            last = None
            async for last in streams[i]:
                seen[i] += last.outputs[0].delta_token_ids
            assert last is not None
            return last

        outputs = await asyncio.gather(*(read(i) for i in range(len(streams))))
        assert [output.token_ids for output in outputs] == expected
        assert all(len(tokens) <= 120 for tokens in seen)
        assert (await llm.health()).state == "ready"
        stats = await llm.stats()
        assert (stats.recoveries, stats.blocks_used) == (1, 0)
        after = llm.engine_pids
        assert not set(after) & set(before)
        eventually(lambda: not alive(before), "the lost group is gone")
    eventually(lambda: not alive(after), "the new group is gone")


@pytest.mark.asyncio
async def test_a_group_that_cannot_come_back_fails_everybody_with_a_typed_error(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(tiny)
    async with LLM(str(model), dtype="float32", max_restarts=2) as llm:
        stream = llm.generate("a", params(0))
        await anext(stream)
        model.unlink()  # the next group will not find its weights
        os.kill(llm.engine_pids[0], signal.SIGKILL)
        with pytest.raises(EngineFailed, match="gave up after 2 restarts"):
            await stream.final()
        health = await llm.health()
        assert health.state == "failed" and "gave up" in health.detail
        with pytest.raises(ServiceClosed, match="failed"):
            await llm.generate("a", params(0)).final()


@pytest.mark.asyncio
async def test_health_says_that_it_recovers(tiny: Path) -> None:
    async with LLM(str(tiny), dtype="float32") as llm:
        assert (await llm.health()).state == "ready"
        stream = llm.generate("a", params(0))
        await anext(stream)
        os.kill(llm.engine_pids[0], signal.SIGKILL)
        async with asyncio.timeout(30):
            while (health := await llm.health()).state == "ready" and not (await llm.stats()).recoveries:
                await asyncio.sleep(0)
        assert health.state == "degraded" and "SIGKILL" in health.detail
        assert len((await stream.final()).token_ids) == 120
        assert (await llm.health()).state == "ready"


@pytest.mark.asyncio
async def test_a_request_that_comes_while_recovering_is_served(tiny: Path) -> None:
    async with LLM(str(tiny), dtype="float32") as llm:
        expected = (await llm.generate("a", params(0)).final()).token_ids
        os.kill(llm.engine_pids[0], signal.SIGKILL)
        try:
            assert (await llm.generate("a", params(0)).final()).token_ids == expected
        except TreadleError as error:  # pragma: no cover
            pytest.fail(f"refused while recovering: {error}")


@pytest.mark.asyncio
async def test_a_server_that_gives_up_says_so_to_everybody_and_exits_with_1(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.symlink_to(tiny)
    with serving(tmp_path / "server", model, "--dtype", "float32", "--max-restarts", "1") as server:
        async with Client(server.endpoint) as client:
            stream = client.generate("a", params(0))
            await anext(stream)
            model.unlink()
            os.kill(server.ranks[0], signal.SIGKILL)
            with pytest.raises(EngineFailed, match="gave up after 1 restarts"):
                await stream.final()
        assert await asyncio.to_thread(server.process.wait, 30) == 1
        eventually(lambda: not server.files, "no file is left")


@pytest.mark.asyncio
async def test_a_spare_group_of_real_ranks_goes_on_with_the_same_tokens(tiny: Path) -> None:
    async with LLM(str(tiny), tensor_parallel_size=2, dtype="float32", standby=True, debug=True) as llm:
        expected = await undisturbed(llm)
        async with asyncio.timeout(60):
            while (await llm.health()).spare != "ready":
                await asyncio.sleep(0.02)
        streams = [llm.generate(prompt, params(i)) for i, prompt in enumerate(PROMPTS)]
        await anext(streams[0])
        os.kill(llm.engine_pids[1], signal.SIGKILL)
        assert [(await stream.final()).token_ids for stream in streams] == expected
        assert (await llm.stats()).recoveries == 1

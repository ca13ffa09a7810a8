"""Policies, tenants and service levels through the public API, with real engines."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.httpkit import async_client
from tests.servekit import serving
from treadle import LLM, Client, SamplingParams
from treadle.errors import DeadlineExceeded, DeadlineUnreachable, InvalidParameter, Overloaded, from_wire
from treadle.scheduler.policies import Policy, Ticket, View

SMALL = {"num_blocks": 64, "max_num_seqs": 1, "max_model_len": 128}


class ShortestFirst(Policy):
    """The least work first; nobody waits longer than `patience` seconds for those who came later."""

    name = "shortest"

    def __init__(self, patience: float = 60.0) -> None:
        self.patience = patience
        self.fail = False
        self.tenants: list[str] = []

    def key(self, ticket: Ticket, now: float) -> float:
        self.tenants.append(ticket.tenant)
        if self.fail:
            raise LookupError("a bug of mine")
        work = ticket.prompt_tokens + ticket.most_tokens
        return ticket.arrival + self.patience * min(1.0, work / 1000)


@pytest.mark.asyncio
async def test_a_policy_of_ones_own_runs_live_and_may_fail(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = ShortestFirst()
    async with LLM(str(tiny), policy=policy, **SMALL) as llm:  # type: ignore[arg-type]

        async def ask(size: int, tenant: str = "") -> int:
            params = SamplingParams(temperature=0.0, max_tokens=size, ignore_eos=True)
            output = await llm.generate([1, 2, 3], params, tenant=tenant).final()
            assert len(output.token_ids) == size
            ended.append(size)
            return size

        ended: list[int] = []
        await asyncio.gather(*(ask(size, f"tenant {size}") for size in (60, 40, 20, 5)))
        assert ended == [60, 5, 20, 40] or ended == [5, 20, 40, 60]  # the first may have had its row before
        assert policy.tenants == ["tenant 60", "tenant 40", "tenant 20", "tenant 5"]
        assert (await llm.stats()).policy_errors == 0 and (await llm.health()).detail == ""

        policy.fail = True
        with caplog.at_level(logging.ERROR, logger="treadle"):
            await asyncio.gather(*(ask(size) for size in (9, 8)))
        assert ended[-2:] == [9, 8], "first come, first served"
        stats, health = await llm.stats(), await llm.health()
        assert stats.policy_errors == 2 and health.state == "ready"
        assert "policy 'shortest': key raised LookupError: a bug of mine" in health.detail
        assert "policy 'shortest'" in caplog.text
        assert not stats.blocks_used


@pytest.mark.asyncio
async def test_tenants_and_policies_by_name_from_a_client(tiny: Path, tmp_path: Path) -> None:
    arguments = ["--policy", "fair", "--max-tenant-requests", "1", "--max-num-seqs", "1", "--target-tpot", "0.5"]
    keys = tmp_path / "keys"
    keys.write_text("sk-a a\nsk-b b\n")
    keys.chmod(0o600)
    arguments += ["--http", "127.0.0.1:0", "--api-keys", str(keys), "--model-name", "tiny"]
    with serving(tmp_path, tiny, "--num-blocks", "64", *arguments) as server:
        async with Client(server.endpoint) as client:
            long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
            runs = client.generate([1, 2], long, tenant="a")
            await anext(runs)
            waits = client.generate([1, 2], long, tenant="a")
            with pytest.raises(Overloaded, match="tenant 'a'") as caught:
                await client.generate([1, 2], long, tenant="a").final()
            assert caught.value.retry_after > 0
            other = client.generate([1, 2], long, tenant="b")
            assert len((await other.final()).token_ids) == 100
            assert len((await waits.final()).token_ids) == len((await runs.final()).token_ids) == 100
            with pytest.raises(InvalidParameter, match="tenant must be text of at most 256"):
                client.generate([1], long, tenant="x" * 257)
            await keys_have_tenants(server.url, client)


async def keys_have_tenants(url: str, client: Client) -> None:
    """Over HTTP the key says whose request it is: where one tenant is refused, others are not, and it is one by any
    way in."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": [1, 2], "max_tokens": 100, "extra_body": {"ignore_eos": True}}
    async with async_client(url, "sk-a") as a, async_client(url, "sk-b") as b:
        runs = await a.completions.create(stream=True, **ask)
        await anext(aiter(runs))
        waits = client.generate([1, 2], SamplingParams(max_tokens=100, ignore_eos=True), tenant="a")
        while not (await client.stats()).waiting:
            await asyncio.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="tenant 'a'") as refused:
            await a.completions.create(**ask)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        answer = await b.completions.create(**ask)
        assert answer.usage is not None and answer.usage.completion_tokens == 100
        await waits.final()
        async for _ in runs:
            pass


def test_an_unreachable_deadline_is_a_deadline_that_was_exceeded() -> None:
    error = from_wire(DeadlineUnreachable.code, "too late")
    assert type(error) is DeadlineUnreachable and isinstance(error, DeadlineExceeded)


@pytest.mark.asyncio
async def test_an_unreachable_deadline_is_refused_through_the_api(tiny: Path) -> None:
    class Late(Policy):
        name = "late"

        def latest_start(self, ticket: Ticket, view: View) -> float:
            return view.now - 1.0

    async with LLM(str(tiny), policy=Late(), **SMALL) as llm:  # type: ignore[arg-type]
        with pytest.raises(DeadlineUnreachable, match="s are left until the deadline"):
            await llm.generate([1, 2, 3], timeout=50.0).final()
        assert (
            len((await llm.generate([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True)).final()).token_ids) == 3
        )

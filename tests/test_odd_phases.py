"""Ranks and servers that die while something else goes on: a start, a drain, other weights, a spare that loads."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from treadle.errors import EngineStartFailed

from .faultkit import Faulty


@pytest.mark.asyncio
async def test_health_and_log_name_the_rank_and_what_it_was_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    f = Faulty(tmp_path, ["0 0 stop 1", "1 -1 stop 1"], 0.0, {})
    starting = asyncio.create_task(f.service.start())
    async with asyncio.timeout(30):
        while "rank 0: importing" not in (health := f.service.health()).progress:
            await asyncio.sleep(0.01)
    assert (health.state, health.progress.partition(", ")[2]) == ("starting", "rank 1: starting its program")
    os.kill(f.service.spare_pids[1], signal.SIGKILL)
    with pytest.raises(EngineStartFailed, match="rank 1 ended with signal SIGKILL; it was starting its program"):
        await starting
    assert not f.service.spare_pids

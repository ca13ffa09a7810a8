"""What is said while weights are read: by the rank, by the scheduler, on a terminal."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from treadle import LLM
from treadle.engine.config import load_config
from treadle.engine.cuda.memory import weight_bytes
from treadle.engine.phases import Phases, process_age
from treadle.engine.sharding import shard_for
from treadle.engine.weights import expected_shapes, open_weights
from treadle.engine.weights.counted import Counted
from treadle.engine.weights.upload import Upload
from treadle.progress import TerminalProgress, show_on
from treadle.scheduler.loading_progress import LOGGER, LoadingProgress, phases_line, progress_line
from treadle.transport.messages import Loading

GB = 10**9


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_counts_what_it_holds(tiny: Path, world_size: int) -> None:
    config = load_config(tiny)
    shard = shard_for(config, world_size - 1, world_size)
    total = weight_bytes(config, shard, torch.bfloat16)
    reports: list[tuple[int, int]] = []
    clock = iter(range(10_000))
    source = Counted(
        open_weights(tiny, config), total, torch.bfloat16, lambda *sizes: reports.append(sizes), clock.__next__
    )
    spans = {"q_proj": shard.q_heads.scaled(config.head_dim), "k_proj": shard.kv_heads.scaled(config.head_dim)}
    spans |= {"v_proj": spans["k_proj"], "o_proj": spans["q_proj"], "embed_tokens": shard.vocab, "lm_head": shard.vocab}
    for name, shape in expected_shapes(config).items():
        span = spans.get(name.split(".")[-2], shard.intermediate)
        dim = 1 if "o_proj" in name or "down_proj" in name else 0
        if len(shape) == 1:
            source.read(name, torch.bfloat16)
            continue
        source.blocks(name, dim, span.start, span.stop)  # who asks for blocks first counts once
        source.read(name, torch.bfloat16, dim, span.start, span.stop)
    assert reports[0] == (0, total)
    assert reports == sorted(reports)
    source.read(next(iter(expected_shapes(config))), torch.bfloat16)
    assert reports[-1] == (total, total)


def test_reports_are_not_too_many(tiny: Path) -> None:
    config = load_config(tiny)
    times = iter([0.0, 0.1, 0.19, 0.21, 0.3, 0.42])
    reports: list[tuple[int, int]] = []
    source = Counted(
        open_weights(tiny, config), 10**9, torch.float32, lambda *sizes: reports.append(sizes), times.__next__
    )
    for name in list(expected_shapes(config))[:6]:
        source.read(name, torch.float32)
    assert len(reports) == 3
    source.finish()
    assert reports[-1] == (10**9, 10**9)


def test_lines_have_rate_and_time_left() -> None:
    assert progress_line(0, 16 * GB, 0.0) == "weights: 0.00 of 16.00 GB (0%)"
    assert progress_line(4 * GB, 16 * GB, 2.0) == "weights: 4.00 of 16.00 GB (25%), 2.00 GB/s, 6 s left"
    assert progress_line(16 * GB, 16 * GB, 8.0) == "weights: 16.00 GB in 8.0 s, 2.00 GB/s"
    assert progress_line(0, 0, 0.0) == "weights: 0.00 GB in 0.0 s"
    assert phases_line({"imports": 2.0, "+ imports": 3.0, "weights": 1.5}) == (
        "3.50 s: imports 2.00, + imports 3.00, weights 1.50"
    )


def test_a_log_gets_a_line_now_and_then_and_the_last(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    progress = LoadingProgress(2)
    for tick in range(1, 121):
        done = tick * GB // 10
        progress.update(Loading(0, done, 12 * GB), tick / 10)
        progress.update(Loading(1, done, 12 * GB), tick / 10)
    progress.update(Loading(1, 12 * GB, 12 * GB), 13.0)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(told) == 3
    assert "of 24.00 GB" in told[0]
    assert told[-1] == "weights: 24.00 GB in 11.9 s, 2.02 GB/s"
    assert len(caplog.records) > 200


def test_a_group_speaks_when_all_ranks_have_spoken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    progress = LoadingProgress(2)
    progress.update(Loading(0, GB, GB), 1.0)
    assert not caplog.records
    progress.update(Loading(1, 0, GB), 1.0)
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def loading_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger(LOGGER)
    before = logger.level, list(logger.handlers), logger.propagate
    yield logger
    logger.level, logger.handlers, logger.propagate = before


def test_a_terminal_gets_one_line_that_is_drawn_over(
    loading_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    show_on(terminal)
    progress = LoadingProgress(1)
    for done in (0, 1, 2):
        progress.update(Loading(0, done * GB, 2 * GB), float(done))
    lines = terminal.getvalue().split("\r")
    assert [line[:26] for line in lines[1:]] == [f"[{'.' * 24}]", f"[{'#' * 12}{'.' * 12}]", f"[{'#' * 24}]"]
    assert all(len(line.rstrip("\n")) == 59 for line in lines[1:])
    assert terminal.getvalue().count("\n") == 1


def test_what_is_no_terminal_is_left_alone(loading_logger: logging.Logger) -> None:
    show_on(io.StringIO())
    assert not any(isinstance(handler, TerminalProgress) for handler in loading_logger.handlers)


@pytest.mark.asyncio
async def test_it_comes_from_the_ranks_of_a_real_model(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "treadle")
    async with LLM(tiny, tensor_parallel_size=2, num_blocks=64):
        pass
    told = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("weights: 0.00 GB in ") for line in told), told
    ready = [line for line in told if "is ready after" in line]
    assert len(ready) == 2
    assert all(" interpreter " in line and " imports " in line and " weights " in line for line in ready)


def test_phases_add_up() -> None:
    phases = Phases(age=2.0)
    for name in ("a", "b", "a"):
        phases.end(name)
    assert list(phases.seconds) == ["a", "b"]
    assert 2.0 <= sum(phases.seconds.values()) < 10.0
    assert process_age() > 0


@pytest.mark.parametrize("part", [(slice(None), slice(None)), (slice(3, 9), slice(None)), (slice(None), slice(5, 18))])
def test_an_upload_is_a_copy(part: tuple[slice, slice]) -> None:
    """In pieces that fit nothing; on a CPU the buffers and threads are the same."""
    stored = torch.randn(40, 23).to(torch.bfloat16)
    upload = Upload(torch.device("cpu"), threads=3, buffer=64)
    for dtype in (torch.bfloat16, torch.float32):
        copy = upload(stored[part], dtype)
        assert copy.dtype is dtype
        assert copy.is_contiguous()
        assert torch.equal(copy, stored[part].to(dtype))
    assert torch.equal(upload(stored[0], torch.bfloat16), stored[0])
    assert upload(stored[:0], torch.bfloat16).shape == (0, 23)

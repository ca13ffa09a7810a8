"""The cost model of tensor parallelism, against numbers worked out by hand."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

import pytest

from treadle.engine.config import load_config

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_scaling  # type: ignore[import-not-found]  # noqa: E402
from compare_gpu import Limits, shape_of  # type: ignore[import-not-found]  # noqa: E402
from scaling_model import Model, Sums, predict, shares  # type: ignore[import-not-found]  # noqa: E402

DIRECTORY = SCRIPTS / "models" / "llama-3.1-8b"
CONFIG = load_config(DIRECTORY)
SHAPE = shape_of(json.loads((DIRECTORY / "config.json").read_text()))
MODEL = Model(CONFIG, SHAPE, Limits(bandwidth=4e12, rate=8e14))
LAYERS, HIDDEN, WIDTH, VOCAB = 32, 4096, 14336, 128256
ATTENTION = LAYERS * (HIDDEN * (4096 + 2 * 1024) + 4096 * HIDDEN)
MLP = LAYERS * 3 * HIDDEN * WIDTH


def test_shares_are_those_of_the_busiest_rank() -> None:
    three = shares(CONFIG, 3)
    assert three.attention == 3 / 8  # 8 KV heads over 3 ranks are 3, 3 and 2
    assert three.mlp == pytest.approx(4800 / WIDTH) and three.vocabulary == pytest.approx(42752 / VOCAB)
    assert (shares(CONFIG, 4).attention, shares(CONFIG, 4).mlp) == (1 / 4, 1 / 4)


def test_decoding_is_bound_by_bytes_and_a_prompt_by_products() -> None:
    weights, cache = 2 * (ATTENTION + MLP + HIDDEN * VOCAB), 10 * 1000 * 2 * 2 * LAYERS * 1024
    assert MODEL.decode(1, 10, 1000) == pytest.approx((weights + cache) / 4e12)
    assert MODEL.decode(2, 10, 1000) == pytest.approx((weights + cache) / 2 / 4e12)
    products = 2 * 2048 * (ATTENTION + MLP) + 2 * HIDDEN * VOCAB
    looks = 4 * LAYERS * 4096 * 2048 * 2048 / 2
    assert MODEL.prefill(1, 2048) == pytest.approx((products + looks) / 8e14)
    assert MODEL.decode(1, 100_000, 1.0) == pytest.approx(2 * 100_000 * (ATTENTION + MLP + HIDDEN * VOCAB) / 8e14)


def test_sums_lie_on_straight_lines_between_what_was_measured() -> None:
    sums = Sums([1024, 2048, 8192], [6.0, 7.0, 13.0])
    assert [sums.seconds(size) for size in (10, 1024, 1536, 5120)] == pytest.approx([6e-6, 6e-6, 6.5e-6, 10e-6])
    assert sums.seconds(16384) == pytest.approx(26e-6)
    assert MODEL.summed(Sums([8192], [7.0]), 1) == pytest.approx(65 * 7e-6)


def test_a_prediction_divides_the_rest_or_does_not() -> None:
    assert predict(shared_one=4.0, measured_one=5.0, shared=1.0, summed=0.5) == pytest.approx((1.75, 2.5))


def test_the_engine_sums_small_parts_in_one_shot_and_large_ones_in_two() -> None:
    def record(size: int, kind: str, us: float) -> dict[str, object]:
        return {"collective": "all_reduce", "gpus": 2, "bytes": size, "kind": kind, "us": us}

    records = [record(1024, kind, us) for kind, us in (("nccl", 9.0), ("staged", 7.0), ("in place", 8.0))]
    records += [record(1 << 24, kind, us) for kind, us in (("nccl", 90.0), ("in place", 80.0))]
    records += [record(1 << 27, "nccl", 900.0)]
    sums = bench_scaling.sums_of(records, 2)
    assert (list(sums.sizes), list(sums.micros)) == ([1024, 1 << 24, 1 << 27], [7.0, 80.0, 900.0])


def test_a_table_says_what_is_gained_and_whether_it_was_predicted() -> None:
    def step(tp: int, ms: float) -> dict[str, object]:
        return {
            "model": "llama-3.1-8b", "tp": tp, "mode": "latency", "batch": 1, "context": 1024, "output_len": 128,
            "step_ms_median": ms,
        }  # fmt: skip

    comm = [{"collective": "all_reduce", "gpus": 2, "bytes": 8192, "kind": "staged", "us": 6.0}]
    one, two = bench_scaling.lines("llama-3.1-8b", [step(1, 4.2), step(2, 2.6)], comm, MODEL.limits)
    assert one.speed_up == 1.0 and one.predicted is None
    assert two.speed_up == pytest.approx(4.2 / 2.6) and two.sums == pytest.approx(65 * 6e-3)
    least, most = two.predicted
    assert least < 2.6 < most
    rows = list(bench_scaling.table([one, two]))
    assert rows[3].endswith("| yes |") and "1.62 | 81%" in rows[3]


def test_jobs_are_taken_in_the_order_in_which_gpus_become_free() -> None:
    """Whoever fits first: three GPUs are not kept waiting for the fourth."""

    async def run() -> list[str]:
        gpus, began = bench_scaling.Gpus(["0", "1", "2", "3"]), []
        ends = {size: asyncio.Event() for size in (1, 2, 3, 4)}

        async def job(size: int) -> None:
            taken = await gpus.take(size)
            began.append(f"{size} on {','.join(taken)}")
            await ends[size].wait()
            await gpus.give(taken)

        async with asyncio.TaskGroup() as group:
            for size in (1, 3, 4, 2):
                group.create_task(job(size))
            for size in (3, 1, 2, 4):
                for _ in range(10):
                    await asyncio.sleep(0)
                ends[size].set()
        return began

    assert asyncio.run(run()) == ["1 on 0", "3 on 1,2,3", "2 on 1,2", "4 on 0,1,2,3"]


def test_jobs_may_be_vllms_and_are_set_beside_ours() -> None:
    ours, theirs = bench_scaling.jobs_of("llama-3.1-8b:4,vllm:llama-3.1-8b:2")
    assert (ours.model, ours.size, ours.peer) == ("llama-3.1-8b", 4, False)
    assert (theirs.size, theirs.peer) == (2, True)
    with pytest.raises(argparse.ArgumentTypeError, match="other:x:2"):
        bench_scaling.jobs_of("other:x:2")
    assert bench_scaling.counts("a=1,b=20") == {"a": 1, "b": 20}
    record = {"model": "m", "tp": 2, "mode": "latency", "batch": 8}
    faster, slower = record | {"step_ms_median": 2.0}, record | {"step_ms_median": 3.0}
    other = record | {"model": "n", "step_ms_median": 1.0}
    assert list(bench_scaling.beside("m", [faster, other], [slower]))[2:] == ["| latency 8 | 2 | 2.00 | 3.00 | 1.50 |"]
    assert not list(bench_scaling.beside("m", [faster], [other]))

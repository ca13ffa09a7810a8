"""The GPU's runner on GPUs: graphs and overlap change nothing, ranks agree, and transformers says the same.

`pytest -m gpu tests/test_gpu_runner.py`; one process for all but the tests with two ranks.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from treadle import LLM, SamplingParams
from treadle.engine.config import load_config
from treadle.engine.cuda.memory import weight_bytes
from treadle.engine.sharding import shard_for
from treadle.errors import DoesNotFit
from treadle.transport.codec import pack
from treadle.transport.messages import RowStart, StepPlan

from .groupkit import Overlapped, Requests, configure_for
from .modelkit import FAMILIES, load_reference, make_checkpoint

pytestmark = pytest.mark.gpu

NEW_TOKENS = 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


def prompts() -> list[list[int]]:
    random = np.random.default_rng(11)
    made = [random.integers(0, 256, int(length)).tolist() for length in random.integers(1, 120, 22)]
    return [[7], *made, made[3] + [9, 9]]


def requests(kind: str) -> Requests:
    """ "greedy"; "mixed": drawn and filtered too; "edited": what the fused sampler leaves to the other one."""
    kinds: dict[str, list[dict[str, object]]] = {
        "greedy": [{"temperature": 0.0}],
        "mixed": [{"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.1}],
        "edited": [{"temperature": 0.0, "repetition_penalty": 1.2}, {"logprobs": 2}, {"logit_bias": {7: 2.0}}, {}],
    }
    made: Requests = []
    for index, prompt in enumerate(prompts()):
        values = kinds[kind][index % len(kinds[kind])]
        values = {"max_tokens": NEW_TOKENS, "seed": index, "ignore_eos": True, **values}
        made.append((f"{kind}-{index}", prompt, SamplingParams(**values)))  # type: ignore[arg-type]
    return made


def on_gpu(model: Path, shared_dir: Path, **changes: object) -> Overlapped:
    values = {"device": "cuda", "dtype": "float32", "block_size": 16, "max_num_seqs": 12, "debug": False, **changes}
    return Overlapped(configure_for(model, shared_dir, **values))


def is_greedy(model: torch.nn.Module, prompt: list[int], output: list[int]) -> int:
    """At how many positions transformers, given the tokens before, would have chosen the same."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]], device="cuda")).logits[0]
    expected = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    return sum(a == b for a, b in zip(expected, output, strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama3"), "llama3")


def test_graphs_overlap_and_preemption_change_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """In float32, where sums in another order do not change a choice."""
    outputs: dict[str, dict[str, list[int]]] = {}
    for graphs in (False, True):
        runner = on_gpu(checkpoint, tmp_path, cuda_graphs=graphs)
        for kind, depth, tight in itertools.product(("greedy", "mixed", "edited"), (1, 2), (False, True)):
            limits = {"num_blocks": 25, "max_prefill_chunk": 16} if tight else {}
            found = runner.run(requests(kind), depth, **limits)
            assert found == outputs.setdefault(kind, found), f"{graphs=} {kind=} {depth=} {tight=}"
    reference = load_reference(checkpoint).cuda()
    for name, prompt, _ in requests("greedy"):
        assert is_greedy(reference, prompt, outputs["greedy"][name]) == NEW_TOKENS, name


def test_the_gpu_draws_what_the_cpu_draws(checkpoint: Path, tmp_path: Path) -> None:
    """The same seeds: logits differ by rounding alone, so nearly every stream is the same to its end."""
    here = Overlapped(configure_for(checkpoint, tmp_path, block_size=16, max_num_seqs=12), "rows")
    expected = here.run(requests("mixed"), 1)
    found = on_gpu(checkpoint, tmp_path).run(requests("mixed"), 2)
    same = sum(found[name] == tokens for name, tokens in expected.items())
    print(f"{same} of {len(expected)} streams are equal")
    assert same >= 0.9 * len(expected)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family: str, dtype: torch.dtype, fused: bool, tmp_path: Path) -> None:
    """Relative error ‖ours − reference‖ ∕ ‖reference‖; the reference is float32 on the same weights."""
    model = make_checkpoint(tmp_path / family, family, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    runner = on_gpu(model, tmp_path, dtype=name, cuda_graphs=False, fused_linears=fused).runner
    chosen = prompts()[:8]
    for row, prompt in enumerate(chosen):
        blocks = pack(np.arange(1 + 10 * row, 11 + 10 * row))
        start = RowStart(row, len(prompt), 0, pack(prompt), blocks, GREEDY, 0, b"")
        runner.collect(runner.submit(StepPlan(row, b"", [start], b"", b"", pack([row]), pack([len(prompt)]))))
    rows = range(len(chosen))
    ones = pack(np.ones(len(chosen)))
    tokens = runner.program.rows.history[list(rows), [len(prompt) for prompt in chosen]].tolist()
    runner.collect(runner.submit(StepPlan(99, b"", [], b"", b"", pack(list(rows)), ones)))
    ours = runner.program.logits[: len(chosen)].float()
    errors = {}
    for label, kind in (("ours", torch.float32), ("transformers", dtype)):
        reference = load_reference(model, torch.float32).cuda()
        other = load_reference(model, kind).cuda()
        with torch.inference_mode():
            ids = [
                torch.tensor([[*prompt, token]], device="cuda") for prompt, token in zip(chosen, tokens, strict=True)
            ]
            exact = torch.stack([reference(one).logits[0, -1] for one in ids])
            found = ours if label == "ours" else torch.stack([other(one).logits[0, -1].float() for one in ids])
        errors[label] = float((found - exact).norm() / exact.norm())
    print(
        f"{family} {name} {fused=}: relative error {errors['ours']:.2e}, transformers' own {errors['transformers']:.2e}"
    )
    assert errors["ours"] < (1e-4 if dtype is torch.float32 else 2 * errors["transformers"] + 1e-3)


def test_the_cache_is_sized_by_what_is_free(checkpoint: Path, tmp_path: Path) -> None:
    began = time.perf_counter()
    free, total = torch.cuda.mem_get_info()
    half = 1 - (free - total * 0.05) / total
    runner = on_gpu(checkpoint, tmp_path, num_blocks=0, gpu_memory_utilization=half, max_num_seqs=64)
    print(f"{runner.ready.num_blocks} blocks in {time.perf_counter() - began:.1f} s")
    assert runner.ready.num_blocks > 100
    with pytest.raises(DoesNotFit, match="GiB are missing"):
        on_gpu(checkpoint, tmp_path, num_blocks=0, gpu_memory_utilization=0.01)


def test_the_estimate_of_weights_is_close(checkpoint: Path, tmp_path: Path) -> None:
    config = load_config(checkpoint)
    estimate = weight_bytes(config, shard_for(config, 0, 1), torch.float32)
    assert on_gpu(checkpoint, tmp_path).ready.weight_bytes == pytest.approx(estimate, rel=0.02)


@pytest.mark.parametrize("num_blocks", [512, 0])
def test_no_memory_is_asked_for_in_steady_state(checkpoint: Path, tmp_path: Path, num_blocks: int) -> None:
    """Whether the largest step ran for its own sake or to size the cache."""
    free, total = torch.cuda.mem_get_info()
    share = 1 - (free - total * 0.05) / total
    runner = on_gpu(checkpoint, tmp_path, num_blocks=num_blocks, gpu_memory_utilization=share)
    limits = {"num_blocks": min(runner.ready.num_blocks, 512)}
    runner.run(requests("mixed"), 2, **limits)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    runner.run(requests("mixed"), 2, **limits)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _served(model: Path, **options: object) -> list[list[int]]:
    settings = {"device": "cuda", "dtype": "float32", "num_blocks": 512, "max_num_seqs": 12, **options}
    async with LLM(str(model), **settings) as llm:  # type: ignore[arg-type]
        return [(await stream.final()).token_ids for stream in [llm.generate(prompt, GREEDY) for prompt in prompts()]]


def test_the_loop_of_a_rank_overlaps_and_gives_the_same(checkpoint: Path) -> None:
    """With overlap, without it, and without graphs: processes, ZeroMQ and all."""
    plain = asyncio.run(_served(checkpoint, overlap=False, cuda_graphs=False))
    assert asyncio.run(_served(checkpoint)) == plain
    assert asyncio.run(_served(checkpoint, pipeline_depth=3, max_prefill_chunk=16)) == plain


def test_a_cold_start_finds_every_kernel_that_was_compiled_ahead(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO, "treadle.loading"):
        asyncio.run(_served(checkpoint, dtype="bfloat16"))
    assert " compiled" in caplog.text
    assert "compiled late" not in caplog.text


@pytest.mark.parametrize("overlap", [True, False])
def test_forward_and_sample_are_told_apart(checkpoint: Path, overlap: bool) -> None:
    """By events of the device: of every step, and within the time that the scheduler waited."""

    async def phases() -> dict[str, tuple[int, float]]:
        async with LLM(str(checkpoint), device="cuda", num_blocks=512, overlap=overlap) as llm:
            await asyncio.gather(*(llm.generate(prompt, GREEDY).final() for prompt in prompts()))
            found = (await llm.metrics()).histograms
        return {h.phase: (sum(h.counts), h.total) for h in found if h.phase in ("wait", "forward", "sample")}

    seen = asyncio.run(phases())
    assert len({count for count, _ in seen.values()}) == 1
    assert seen["sample"][1] > 0 and seen["forward"][1] > 0
    assert seen["sample"][1] + seen["forward"][1] <= seen["wait"][1] * 1.05


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("graphs", "fused"), [(True, True), (True, False), (False, True)])
def test_two_ranks_give_the_tokens_of_one(checkpoint: Path, graphs: bool, fused: bool) -> None:
    one = asyncio.run(_served(checkpoint))
    two = asyncio.run(_served(checkpoint, tensor_parallel_size=2, cuda_graphs=graphs, fused_sums=fused))
    assert two == one


async def _long(model: Path, **options: object) -> list[list[int]]:
    """Prompts of which several are prefilled in one step of more tokens than a step of one piece has."""
    random = np.random.default_rng(5)
    asked = [random.integers(0, 256, 430).tolist() for _ in range(24)]
    settings = {"device": "cuda", "dtype": "float32", "num_blocks": 1024, "max_num_seqs": 24, **options}
    async with LLM(str(model), max_num_batched_tokens=16384, **settings) as llm:  # type: ignore[arg-type]
        return [(await stream.final()).token_ids for stream in [llm.generate(prompt, GREEDY) for prompt in asked]]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_give_the_tokens_of_one_when_halves_are_summed_beside_each_other(checkpoint: Path) -> None:
    one = asyncio.run(_long(checkpoint))
    for overlap_sums in (True, False):
        assert asyncio.run(_long(checkpoint, tensor_parallel_size=2, overlap_sums=overlap_sums)) == one

"""All kernels and the GPU's runner together, in a model: the same tokens as the CPU's runner with its own kernels.

Small, since Triton's interpreter takes milliseconds where a GPU takes microseconds, and one rank, since ranks are
threads here and the interpreter knows only one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treadle.engine.cuda.memory import largest_step
from treadle.engine.cuda.runner import CudaRunner
from treadle.engine.cuda.warm import warm
from treadle.transport.messages import SamplingParams

from .groupkit import Driver, LocalGroup
from .modelkit import make_checkpoint
from .tritonkit import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="test_gpu_runner.py does this on GPUs")

REQUESTS = [
    ([5] * 9, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)),
    ([7, 8, 9], SamplingParams(temperature=1.0, seed=3, max_tokens=5, ignore_eos=True)),
    (list(range(40, 53)), SamplingParams(temperature=0.9, top_k=12, top_p=0.8, seed=4, max_tokens=4, ignore_eos=True)),
    ([1], SamplingParams(temperature=0.0, repetition_penalty=1.2, logprobs=1, max_tokens=3, ignore_eos=True)),
]


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3"])
def test_the_same_tokens_as_on_a_cpu(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / family, family, num_hidden_layers=1)
    found = []
    for emulate in ("", "kernels"):
        shared = tmp_path / f"shared-{emulate}"
        shared.mkdir()
        with LocalGroup(
            model, shared, 1, emulate, max_num_seqs=3, max_model_len=32, max_num_batched_tokens=16
        ) as group:
            driver = Driver(group)
            for index, (prompt, params) in enumerate(REQUESTS):
                driver.submit(str(index), prompt, params)
            driver.run()
            found.append(driver.tokens)
    assert found[0] == found[1]


def test_every_kernel_can_be_warmed_up(tmp_path: Path) -> None:
    """With no effect on what comes after, and no kernel left out that a step needs."""
    model = make_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=1)
    with LocalGroup(
        model, tmp_path, 1, "kernels", max_num_seqs=3, max_model_len=32, max_num_batched_tokens=20
    ) as group:
        runner = group.runners[0]
        assert isinstance(runner, CudaRunner)
        program = runner.program
        assert program.kv is not None
        before = [program.rows.history.clone(), program.rows.table.clone()]
        with torch.inference_mode():
            warm(program, program.kv, max_tokens=20, max_len=32, threads=1)
            largest_step(program, lambda blocks: pytest.fail("there is a cache"), 20, 32)
        spare = program.rows.spare
        assert torch.equal(program.rows.history[:spare], before[0][:spare])
        assert torch.equal(program.rows.table, before[1])
        driver = Driver(group)
        driver.submit("after", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
        driver.run()
        assert len(driver.tokens["after", 0]) == 2

"""Real weights on a GPU: SmolLM2's logits and greedy tokens beside those of transformers on the same machine.

`pytest -m gpu -s tests/test_gpu_real_model.py`. The model is 98 MB in TREADLE_CACHE (or the usual cache).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from treadle import SamplingParams
from treadle.errors import ModelError
from treadle.facts import load_tokenizer, locate
from treadle.transport.codec import pack
from treadle.transport.messages import RowStart, StepPlan

from .groupkit import Overlapped, configure_for
from .realkit import MODEL, PROMPTS, load_reference

pytestmark = pytest.mark.gpu

NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
BLOCK, PAGES = 16, 16


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return locate(MODEL).path
    except ModelError as error:
        pytest.skip(f"the model is not here: {error}")


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(model)
    assert tokenizer is not None
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


def on_gpu(model: Path, shared_dir: Path, dtype: str, **changes: object) -> Overlapped:
    shape = {"block_size": BLOCK, "num_blocks": 1 + PAGES * len(PROMPTS), "max_num_seqs": len(PROMPTS)}
    return Overlapped(configure_for(model, shared_dir, device="cuda", dtype=dtype, debug=False, **shape, **changes))


def reference(dtype: torch.dtype) -> torch.nn.Module:
    model = load_reference().to("cuda")
    for parameter in model.parameters():  # the rotation's frequencies are none, and stay as they are
        parameter.data = parameter.data.to(dtype)
    return model


def logits_at_end(model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """float32 [sequences, vocabulary]: after the last token of each."""
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([tokens], device="cuda")).logits[0, -1].float() for tokens in sequences])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits(model: Path, prompts: list[list[int]], dtype: str, tmp_path: Path) -> None:
    """Of a decode step after prompts of every length: relative error ‖ours − reference‖ ∕ ‖reference‖.

    The reference is float32; what transformers itself loses in `dtype` is the measure of ours.
    """
    runner = on_gpu(model, tmp_path, dtype, cuda_graphs=False).runner
    for row, prompt in enumerate(prompts):
        blocks = pack(np.arange(1 + PAGES * row, 1 + PAGES * (row + 1)))
        start = RowStart(row, len(prompt), 0, pack(prompt), blocks, GREEDY, 0, b"")
        runner.collect(runner.submit(StepPlan(row, b"", [start], b"", b"", pack([row]), pack([len(prompt)]))))
    rows = list(range(len(prompts)))
    drawn = runner.program.rows.history[rows, [len(prompt) for prompt in prompts]].tolist()
    runner.collect(runner.submit(StepPlan(99, b"", [], b"", b"", pack(rows), pack(np.ones(len(rows))))))
    ours = runner.program.logits[: len(rows)].float()
    sequences = [[*prompt, token] for prompt, token in zip(prompts, drawn, strict=True)]
    exact = logits_at_end(reference(torch.float32), sequences)
    theirs = logits_at_end(reference(getattr(torch, dtype)), sequences)
    error, loss = (float((found - exact).norm() / exact.norm()) for found in (ours, theirs))
    print(f"{dtype}: relative error {error:.2e}, transformers' own {loss:.2e}")
    assert error < (1e-4 if dtype == "float32" else 2 * loss + 1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_greedy_tokens(model: Path, prompts: list[list[int]], dtype: str, tmp_path: Path) -> None:
    """Under teacher forcing, with graphs and overlap: at least 95% are transformers', the rest ties within rounding."""
    runner = on_gpu(model, tmp_path, dtype, max_model_len=PAGES * BLOCK)
    outputs = runner.run([(str(index), prompt, GREEDY) for index, prompt in enumerate(prompts)], 2)
    judge = reference(getattr(torch, dtype))
    equal, worst = 0, 0.0
    for index, prompt in enumerate(prompts):
        output = torch.tensor(outputs[str(index)], device="cuda")
        with torch.inference_mode():
            logits = judge(torch.tensor([[*prompt, *output.tolist()]], device="cuda")).logits[0].float()
        logits = logits[len(prompt) - 1 : -1]
        equal += int((logits.argmax(-1) == output).sum())
        gaps = logits.max(-1).values - logits.gather(1, output[:, None])[:, 0]
        worst = max(worst, float((gaps / logits.abs().amax(-1)).max()))
    total = NEW_TOKENS * len(prompts)
    print(f"{dtype}: {equal} of {total} tokens are those of transformers; the widest tie {worst:.1e} of the largest")
    assert equal >= (0.95 if dtype == "bfloat16" else 0.998) * total
    assert worst < (0.05 if dtype == "bfloat16" else 1e-4)

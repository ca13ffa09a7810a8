"""Few rows in a whole model, with norms, activations and sums taken along by the products, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import tritonkit
from .enginekit import Rig, make_rig, tokens_of
from .modelkit import make_checkpoint
from .tritonkit import DEVICE

from treadle.engine.comm import SingleComm  # isort: skip
from treadle.engine.kernels.elementwise import TritonOps  # isort: skip
from treadle.engine.kernels.linear_table import MOST_ROWS, LinearConfig, choose, row_kinds  # isort: skip
from treadle.engine.kernels.products import TritonProducts  # isort: skip
from treadle.engine.norm import Norm, Unnormed  # isort: skip

assert tritonkit  # the kernels above were declared after it
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="test_gpu_kernels.py does this on GPUs")


def logits(rig: Rig) -> torch.Tensor:
    """A prompt, of which nothing is sampled, its next token, and one more with another row's prompt beside it."""
    rig.step([(0, 0, tokens_of(0, 6))], sample=[])
    one = rig.step([(0, 6, [9])])
    return torch.cat([one, rig.step([(0, 7, [11]), (1, 0, tokens_of(1, 3))])]).double()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_switch_changes_roundings_alone(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path, family, dtype=torch.bfloat16, num_hidden_layers=1)
    exact = logits(make_rig(model, SingleComm(), torch.float32, native=False))
    switches: dict[str, Any] = {"native": False, "triton": True, "attention": "torch"}
    errors = {}
    for fused in (False, True):
        rig = make_rig(model, SingleComm(), torch.bfloat16, fused_linears=fused, **switches)
        assert ("few-row" in rig.model.backend_name) is fused
        if fused:  # every sum with a residual is a product's
            monkeypatch.setattr(TritonOps, "add_rms_norm", None)
            monkeypatch.setattr(TritonOps, "silu_mul", None)
        errors[fused] = float((logits(rig) - exact).norm() / exact.norm())
    assert 0 < errors[True] < 1.3 * errors[False] + 1e-3, errors


def test_a_choice_for_every_number_of_rows() -> None:
    for outputs in (1024, 4096, 28672):
        chosen = [choose((9, 0), rows, outputs, 4096, False) for rows in range(1, MOST_ROWS + 2)]
        assert chosen[-1] is None
        one = chosen[0]
        assert isinstance(one, LinearConfig) and one.rows == 1
        assert all(config is None or config.rows > 1 for config in chosen[1:])
        assert choose((7, 5), 1, outputs, 4096, False) is None


def test_layers_of_measured_models_end_at_one_number_of_rows() -> None:
    """What leaves its norm to the next product is followed by one that takes it."""
    for layer in (
        [(6144, 4096, False), (4096, 4096, False), (14336, 4096, True), (4096, 14336, False)],
        [(4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False)],
        [(3072, 4096, False), (4096, 2048, False), (7168, 4096, True), (4096, 7168, False)],
    ):
        for rows in range(1, MOST_ROWS + 1):
            assert len({choose((9, 0), rows, *shape) is None for shape in layer}) == 1, (layer, rows)


def test_every_tile_is_met_by_one_of_the_kinds_of_rows() -> None:
    for shape in ((6144, 4096, False), (1024, 3072, False), (20000, 512, True), (64, 64, False)):
        for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
            every = {choose(capability, rows, *shape) for rows in range(1, MOST_ROWS + 1)} - {None}
            assert every <= {choose(capability, rows, *shape) for rows in row_kinds()}


def test_float16_takes_the_norm_apart() -> None:
    """x * norm may be beyond its range where the norm of x is not."""
    kernels = TritonProducts(DEVICE)
    x = torch.full((1, 64), 3e4, dtype=torch.float16, device=DEVICE)
    weight = torch.eye(64, dtype=torch.float16, device=DEVICE)
    norm = Norm(torch.full((64,), 4.0, dtype=torch.float16, device=DEVICE), 1e-5, TritonOps())
    found = kernels(Unnormed(x, norm), weight, None)
    assert found is not None
    torch.testing.assert_close(found, torch.full_like(x, 4.0))

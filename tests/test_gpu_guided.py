"""Guided requests on GPUs: the tokens of the CPU, and texts that parse, whatever runs beside them.

`pytest -m gpu tests/test_gpu_guided.py`
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from treadle import LLM, RequestOutput
from treadle.engine.sampling.masks import LocalMasks, _mask_on_device
from treadle.engine.sampling.upload import pin
from treadle.transport.mask_pages import make_pages
from treadle.transport.masks import encode_masks, shared_masks, words_for

from .groupkit import Overlapped, Requests, configure_for
from .guidedkit import check, requests
from .vocabulary import EOS

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 128_256


def wanted() -> Requests:
    """With room for the longest text that a grammar allows: escapes take six tokens a character."""
    return [(name, prompt, msgspec.structs.replace(params, max_tokens=128)) for name, prompt, params in requests()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "distinct"), [(1, 1), (32, 32), (256, 200)])
def test_the_kernel_masks_a_large_vocabulary(rows: int, distinct: int, dtype: torch.dtype) -> None:
    from treadle.engine.cuda.masks import DeviceMasks  # Triton: others set its interpreter up before it

    random, device = np.random.default_rng(rows), torch.device("cuda")
    share = random.choice([0.0, 1e-5, 0.5, 0.999], distinct)[:, None]
    allowed = random.random((distinct, VOCAB_SIZE), np.float32) < share
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.uint32)[random.integers(0, distinct, rows)]
    masks = encode_masks(0, words, np.zeros(rows, np.bool_))
    local = LocalMasks.of(masks, random.permutation(256)[:rows], 0, VOCAB_SIZE, VOCAB_SIZE)
    logits = torch.randn((256, VOCAB_SIZE), device=device).to(dtype)
    expected = logits.clone()
    _mask_on_device(expected, local)
    DeviceMasks.of(local, device).apply(logits)
    assert torch.equal(logits, expected)


def test_a_gpu_reads_masks_out_of_shared_memory() -> None:
    """And what the driver refuses, here to pin it again, is no other operation's error."""
    from treadle.engine.cuda.masks import DeviceMasks  # Triton: see above

    random, device = np.random.default_rng(7), torch.device("cuda")
    descriptor, pages = make_pages(2, 256, words_for(VOCAB_SIZE))
    os.close(descriptor)
    pages.words(5, 200)[:] = random.integers(0, 1 << 32, (200, words_for(VOCAB_SIZE)), np.uint32)
    logits = torch.randn((256, VOCAB_SIZE), device=device)
    for pinned in (False, True):
        assert not pinned or pin(pages.whole)
        masks = shared_masks(5, random.random(200) < 0.1)
        local = LocalMasks.of(masks, random.permutation(256)[:200], 1000, 5000, VOCAB_SIZE, pages)
        assert torch.from_numpy(local.given.bits).is_pinned() == pinned
        found, expected = logits[:, 1000:6000].clone(), logits[:, 1000:6000].clone()
        _mask_on_device(expected, local)
        DeviceMasks.of(local, device).apply(found)
        assert torch.equal(found, expected)
    assert not pin(pages.whole)
    assert torch.zeros(3, device=device).add_(1).sum().item() == 3


def test_guided_streams_are_those_of_the_cpu(tiny: Path, tmp_path: Path) -> None:
    """In float32. Logits differ by rounding, so a stream that is drawn may differ, a greedy one not."""
    asked = wanted()
    here = Overlapped(configure_for(tiny, tmp_path), "rows")
    expected = here.run(asked, 2, num_blocks=512, eos_token_ids=(EOS,))
    for graphs in (True, False):
        there = Overlapped(configure_for(tiny, tmp_path, device="cuda", cuda_graphs=graphs, debug=False))
        for depth, blocks in ((1, 512), (2, 512), (2, 41)):
            found = there.run(asked, depth, num_blocks=blocks, eos_token_ids=(EOS,))
            same = {name for name, tokens in expected.items() if found[name] == tokens}
            assert {name for name, _, params in asked if params.temperature == 0} <= same
            assert len(same) >= 0.9 * len(asked)


async def _outputs(model: Path, asked: Requests, **options: object) -> list[RequestOutput]:
    settings = {"device": "cuda", "dtype": "bfloat16", "num_blocks": 512, **options}
    async with LLM(str(model), **settings) as llm:  # type: ignore[arg-type]
        streams = [llm.generate(prompt, params) for _, prompt, params in asked]
        return list(await asyncio.gather(*(stream.final() for stream in streams)))


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in-turn"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_text_parses_in_bfloat16(tiny: Path, ranks: int, overlap: bool) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    asked = wanted() * 4
    for (_, _, params), output in zip(
        asked, asyncio.run(_outputs(tiny, asked, tensor_parallel_size=ranks, overlap=overlap)), strict=True
    ):
        assert output.finish_reason == ("stop" if params.guided is not None else "length")
        check(params.guided, output.text)

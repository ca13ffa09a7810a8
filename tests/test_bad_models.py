"""Models and options that cannot work: a typed error, clear, quick, and nothing left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treadle import LLM
from treadle.errors import (
    ConfigError,
    CorruptWeights,
    DoesNotFit,
    EngineStartFailed,
    ModelNotFound,
    RequestFailed,
    TreadleError,
    UnsupportedModel,
)

from .conftest import leftovers


def copy(tiny: Path, to: Path) -> Path:
    shutil.copytree(tiny, to)
    return to


def without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def truncated(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])


def garbage(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"not weights at all")


def other_architecture(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


def no_numbers(path: Path) -> None:
    """Weights that are all NaN: the files are whole, so only an answer can show it."""
    weights = load_file(path / "model.safetensors")
    save_file(
        {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}, path / "model.safetensors"
    )


def no_json(path: Path) -> None:
    (path / "config.json").write_text("{")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (without_weights, TreadleError, "safetensors"),
        (truncated, CorruptWeights, "model.safetensors"),
        (garbage, CorruptWeights, "model.safetensors"),
        (other_architecture, UnsupportedModel, "mamba"),
        (no_json, CorruptWeights, "config.json"),
        (shutil.rmtree, ModelNotFound, "model"),
    ],
)
async def test_damaged_models(tiny: Path, tmp_path: Path, damage, error: type[Exception], says: str) -> None:
    model = copy(tiny, tmp_path / "model")
    damage(model)
    before = leftovers()
    with pytest.raises(error, match=says):
        async with LLM(str(model)):
            pass
    assert leftovers() <= before


@pytest.mark.asyncio
async def test_weights_that_are_not_numbers_fail_the_request(tiny: Path, tmp_path: Path) -> None:
    model = copy(tiny, tmp_path / "model")
    no_numbers(model)
    async with LLM(str(model)) as llm:
        with pytest.raises(RequestFailed, match=r"NaN.*: the model file is damaged, or its numbers overflow .*float16"):
            await llm.generate([1, 2]).final()
        assert (await llm.health()).state == "ready"


@pytest.mark.asyncio
async def test_an_unknown_name_says_what_is_allowed() -> None:
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        async with LLM("no-such-model"):
            pass


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tensor_parallel_size": 7}, ConfigError, "at most 6"),
        ({"max_model_len": 999_999}, ConfigError, "max_model_len=999999"),
        ({"kv_cache_bytes": 100}, DoesNotFit, "needs"),
    ],
    ids=["ranks", "context", "cache"],
)
async def test_more_than_the_model_or_the_memory_has_is_refused_with_the_limit(
    tiny: Path, options: dict[str, int], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        async with LLM(str(tiny), **options):  # type: ignore[arg-type]
            pass


@pytest.mark.asyncio
async def test_a_cache_beyond_any_memory_is_said_in_our_words(tiny: Path) -> None:
    for options in ({"num_blocks": 1 << 30}, {"num_blocks": 1 << 30, "block_size": 1024, "dtype": "float32"}):
        with pytest.raises(DoesNotFit, match=r"GB on this rank, .* lower num_blocks or kv_cache_bytes") as caught:
            async with LLM(str(tiny), **options):
                pass
        assert "DoesNotFit" not in str(caught.value), "the type is said by the type"
        assert "array" not in str(caught.value)
        assert not hasattr(caught.value, "__notes__"), "an error that says it all needs no traceback of the engine"


@pytest.mark.asyncio
@pytest.mark.parametrize("in_process", [True, False])
async def test_a_start_that_takes_too_long_names_its_option(tiny: Path, in_process: bool) -> None:
    with pytest.raises(EngineStartFailed, match=r"within 0\.1 s \(rank 0: .*\); .* start_timeout \(--start-timeout\)"):
        async with LLM(str(tiny), start_timeout=0.1, in_process=in_process):
            pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"device": "tpu"}, "cpu, cuda"),
        ({"pipeline_depth": 99}, "pipeline_depth=99"),
        ({"block_size": -1}, "block_size=-1"),
        ({"num_blocks": 1}, "at least 2"),
        ({"num_blocks": 10**12}, "num_blocks=1000000000000: allowed is 0 to"),
        ({"kv_cache_bytes": 10**24}, "kv_cache_bytes=1000000000000000000000000: allowed is 0 to"),
        ({"max_prefill_chunk": 0}, "max_prefill_chunk=0"),
        ({"step_timeout": float("nan")}, "step_timeout"),
        ({"tensor_paralel_size": 2}, "known options"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LLM("smollm2-135m", **options)

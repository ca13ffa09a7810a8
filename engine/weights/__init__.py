"""Weights by canonical Hugging Face name, from safetensors, a GGUF file, or a random number generator."""

from __future__ import annotations

from pathlib import Path

import torch

from treadle.engine.config import ModelConfig

from .source import StoredBlocks, WeightSource, expected_shapes

__all__ = ["StoredBlocks", "WeightSource", "expected_shapes", "open_weights"]


def open_weights(
    path: Path, config: ModelConfig, *, random: bool = False, seed: int = 0, device: torch.device | None = None
) -> WeightSource:
    """The weights of the model at `path` (a Hugging Face directory or a .gguf file), not yet read.

    random: make them up from `seed` instead, the same on every rank; `path` is then not looked at. device: where they
    are to end up; a source may put them there at once, or leave them on the CPU. Raises ModelNotFound when no weights
    are there and CorruptWeights when they are not those that `config` describes.
    """
    if random:
        from .random import RandomSource

        return RandomSource(config, seed, device)
    if path.suffix == ".gguf":
        from .gguf import GGUFSource

        return GGUFSource(path, config)
    from .safetensors import SafetensorsSource

    return SafetensorsSource(path, config, device)

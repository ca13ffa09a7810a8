"""Typed, bounded reading of a description that somebody else wrote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

from treadle.errors import CorruptWeights

from .config import ModelConfig

MAX_SIZE = 1 << 24
MAX_LAYERS = 4096
_LIMITS = {
    "vocab_size": MAX_SIZE,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_layers": MAX_LAYERS,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position": 1 << 30,
}


class Fields:
    """A mapping read by type. Getters raise CorruptWeights that names the file, the field and what it should be."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self.where = where

    def present(self, name: str) -> bool:
        """Null counts as absent."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> object:
        return self._values.get(name)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "an integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(name, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def strings(self, name: str) -> list[str]:
        """A list of strings; absent is empty."""
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, "a list of strings")
        return list(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """One integer or a list of them; absent is empty."""
        value = self._values.get(name)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise self._wrong(name, "an integer or a list of integers")
        return tuple(items)

    def section(self, name: str) -> Fields:
        """A nested mapping; absent is empty."""
        value = self._values.get(name)
        if value is None:
            return Fields({}, f"{self.where}: {name}")
        if not isinstance(value, dict):
            raise self._wrong(name, "a mapping")
        return Fields(value, f"{self.where}: {name}")

    def _get(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is None:
            raise CorruptWeights(f"{self.where}: {name} is missing")
        return default

    def _wrong(self, name: str, expected: str) -> CorruptWeights:
        return CorruptWeights(f"{self.where}: {name} is {self._values.get(name)!r:.80}, expected {expected}")


def checked(config: ModelConfig, where: str) -> ModelConfig:
    """The same config, or CorruptWeights that says which size makes no sense, before anything is allocated by it."""
    sizes = asdict(config)
    for name, limit in _LIMITS.items():
        if not 1 <= sizes[name] <= limit:
            raise CorruptWeights(f"{where}: {name} is {sizes[name]}, expected 1 to {limit}")
    if config.num_heads % config.num_kv_heads:
        raise CorruptWeights(f"{where}: {config.num_heads} heads do not divide by {config.num_kv_heads} KV heads")
    if config.head_dim % 2:
        raise CorruptWeights(f"{where}: head_dim is {config.head_dim}, expected an even number")
    if config.rms_norm_eps <= 0 or config.rope_theta <= 0:
        raise CorruptWeights(
            f"{where}: rms_norm_eps {config.rms_norm_eps} and rope_theta {config.rope_theta} must be positive"
        )
    scaling = config.rope_scaling
    if scaling is not None and (scaling.factor <= 0 or scaling.original_max_position <= 0):
        raise CorruptWeights(f"{where}: rope scaling {scaling} must have a positive factor and original length")
    if scaling is not None and scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CorruptWeights(f"{where}: rope scaling {scaling} must have high_freq_factor above low_freq_factor")
    return config


def valid_ids(ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Without repeats and without ids that no model could ever produce (some files write -1 for none)."""
    return tuple(dict.fromkeys(id for id in ids if 0 <= id < vocab_size))

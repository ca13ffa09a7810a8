"""A model's name to what scheduler, tokenizer and engines need, without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from treadle.engine.config import load_config
from treadle.errors import ModelNotFound
from treadle.scheduler.options import ModelFacts

from .models import model_name, resolve_model
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Located:
    """A model that was found: where it lies, and what its configuration says."""

    path: Path
    facts: ModelFacts


def locate(model: str | os.PathLike[str], cache_dir: Path | None = None) -> Located:
    """Finds (or fetches) a model and reads its configuration. Raises ModelError."""
    name = model_name(model)
    path = resolve_model(name, cache_dir=cache_dir)
    config = load_config(path)
    facts = ModelFacts(
        name=name,
        path=str(path),
        vocab_size=config.vocab_size,
        context=config.max_position,
        max_ranks=config.num_heads,
        eos_token_ids=config.eos_token_ids,
    )
    return Located(path, facts)


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The model's tokenizer; None for a directory (or config.json) that brings none, as benchmarks' shapes do."""
    if path.is_file() and path.suffix != ".gguf":
        return None
    try:
        return Tokenizer.load(path)
    except ModelNotFound:
        return None

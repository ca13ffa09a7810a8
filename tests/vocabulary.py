"""The token ids of the small checkpoints: bytes, then these. Not in `modelkit`: transformers is long to import."""

from __future__ import annotations

VOCAB_SIZE = 320
BOS, EOS, IM_START, IM_END = 256, 257, 258, 259

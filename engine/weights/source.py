"""What a source of weights is, and which tensors a model has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from treadle.engine.config import ModelConfig
from treadle.engine.gguf import TensorType
from treadle.errors import CorruptWeights

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """A matrix as a file stores it. data: [rows, bytes per row], whole blocks; perhaps a read-only view of the file."""

    data: npt.NDArray[np.uint8]
    form: TensorType

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in], in elements."""
        rows, size = self.data.shape
        return rows, size // self.form.size * self.form.block


class WeightSource(Protocol):
    """Tensors by canonical Hugging Face name ("model.layers.3.self_attn.q_proj.weight"), read in slices."""

    def has(self, name: str) -> bool: ...

    def shape(self, name: str) -> Shape:
        """Raises CorruptWeights when there is no such tensor."""
        ...

    def read(
        self, name: str, dtype: torch.dtype, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """The slice [start, stop) along `dim`, in `dtype`, contiguous, the caller's own, on the CPU or the device.

        Slices of q_proj and k_proj along dim 0 must start and stop at whole heads. Raises CorruptWeights.
        """
        ...

    def blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> StoredBlocks | None:
        """What `read` would make numbers of; None when it is not stored in blocks, or the slice cuts through some."""
        ...

    def fingerprint(self) -> str:
        """Equal on all ranks that read the same weights, and cheap: it samples the data, it does not read it all."""
        ...


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the model and its shape; weights of linear layers are [out, in]."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if config.output_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    if config.mlp_bias:
        layer |= {"mlp.gate_proj.bias": (inner,), "mlp.up_proj.bias": (inner,), "mlp.down_proj.bias": (hidden,)}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def check_shape(where: object, name: str, found: Shape, expected: Shape) -> None:
    """Raises CorruptWeights that names the tensor, what it is and what it should be."""
    if found != expected:
        raise CorruptWeights(f"{where}: {name} has shape {list(found)}, expected {list(expected)}")


def check_slice(name: str, shape: Shape, dim: int, start: int, stop: int | None) -> int:
    """The end of the slice, checked against the tensor's shape; raises ValueError, for it is the caller's mistake."""
    if not 0 <= dim < len(shape):
        raise ValueError(f"{name} has {len(shape)} dimensions, dim {dim} is not one of them")
    end = shape[dim] if stop is None else stop
    if not 0 <= start <= end <= shape[dim]:
        raise ValueError(f"{name}: slice [{start}, {end}) of dim {dim}, which has {shape[dim]} elements")
    return end

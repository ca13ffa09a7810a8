"""Llama-family decoders: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3.

A decoder is a stack of two residual steps: tokens look at earlier tokens (attention), then each thinks for itself (a
gated MLP). The models differ in sizes, biases, a norm on queries and keys, a window and the rotation's frequencies: all
of that is in `ModelConfig`. Which part of it this rank computes is the layers' business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.errors import ConfigError

from .attention import AttentionBackend, AttentionPlan
from .backends import Request, choose_backends
from .batch import ForwardBatch
from .comm import Communicator
from .comm_side import HALVES, SideSums
from .comm_symm import SymmetricComm
from .config import ModelConfig
from .halves import LEAST_TOKENS, split, split_point
from .kv import KVCache
from .layers import (
    FIRST_ROPE_LENGTH,
    GatedLinear,
    RotaryTable,
    VocabParallelEmbedding,
    column_parallel,
    row_parallel,
    vocabulary_head,
)
from .linear import Placement
from .native import load_native
from .norm import Hidden, Norm, Unnormed, normed
from .ops import HeadLayout, KVSlots, Ops
from .sharding import Shard, shard_for
from .weights import WeightSource


@dataclass(frozen=True, slots=True)
class Environment:
    """What all layers share: the communicator, where weights live, and the kernels.

    graphs: whether these may stand in a CUDA graph. positions: to be ready for from the start. split_from: tokens of a
    step that goes in halves.
    """

    comm: Communicator
    placement: Placement
    kv_dtype: torch.dtype
    ops: Ops
    attention: AttentionBackend
    graphs: bool
    positions: int
    split_from: int

    def vector(self, source: WeightSource, name: str) -> Tensor:
        return source.read(name, self.placement.dtype).to(self.placement.device)

    def norm(self, source: WeightSource, name: str, config: ModelConfig) -> Norm:
        return Norm(self.vector(source, f"{name}.weight"), config.rms_norm_eps, self.ops)


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers need of one forward pass."""

    batch: ForwardBatch
    kv: KVCache
    rope: tuple[Tensor, Tensor]
    plan: AttentionPlan


class Attention:
    def __init__(self, config: ModelConfig, shard: Shard, source: WeightSource, prefix: str, env: Environment) -> None:
        dim = config.head_dim
        q, kv = shard.q_heads.scaled(dim), shard.kv_heads.scaled(dim)
        projections = ((f"{prefix}.q_proj", q), (f"{prefix}.k_proj", kv), (f"{prefix}.v_proj", kv))
        self.qkv = column_parallel(source, projections, config.attention_bias, env.placement)
        self.out = row_parallel(source, f"{prefix}.o_proj", q, config.output_bias, env.comm, env.placement, 0)
        self.layout = HeadLayout(
            q_heads=shard.q_heads.size,
            kv_heads=shard.kv_heads.size,
            head_dim=dim,
            eps=config.rms_norm_eps,
            q_norm=env.vector(source, f"{prefix}.q_norm.weight") if config.qk_norm else None,
            k_norm=env.vector(source, f"{prefix}.k_norm.weight") if config.qk_norm else None,
        )
        self.ops = env.ops
        self.backend = env.attention
        self.weight_bytes = self.qkv.weight_bytes + self.out.weight_bytes

    def remember(self, x: Hidden, step: Step, layer: int) -> Tensor:
        """Writes the keys and values of x [T, hidden] to the cache; returns its queries [T, q_heads, head_dim]."""
        target = KVSlots(step.kv.k[layer], step.kv.v[layer], step.batch.slots)
        return self.ops.rope_store(self.qkv(x), self.layout, step.rope, step.batch.positions, target)

    def look(self, q: Tensor, step: Step, layer: int) -> Tensor:
        """What the queries find, [T, q_heads * head_dim], still to be projected by `out` and added to the residual."""
        return self.backend.attend(q, step.kv.k[layer], step.kv.v[layer], step.plan)


class MLP:
    def __init__(self, config: ModelConfig, shard: Shard, source: WeightSource, prefix: str, env: Environment) -> None:
        columns, bias = shard.intermediate, config.mlp_bias
        self.gate_up = GatedLinear(source, prefix, columns, bias, env.placement, env.ops)
        self.down = row_parallel(source, f"{prefix}.down_proj", columns, bias, env.comm, env.placement, 1)
        self.weight_bytes = self.gate_up.weight_bytes + self.down.weight_bytes

    def add_norm(self, x: Hidden, residual: Tensor, norm: Norm) -> Hidden:
        """Adds what it thinks of x to the residual in place; returns the norm of that, perhaps still to be taken."""
        return self.down.add_norm(self.gate_up(x), residual, norm)

    def start(self, x: Tensor, sums: SideSums, half: int) -> Tensor:
        """What it thinks of x, to be read once `sums` was waited for."""
        return self.down.start(self.gate_up(x), sums, half)


class DecoderLayer:
    def __init__(self, config: ModelConfig, shard: Shard, source: WeightSource, index: int, env: Environment) -> None:
        prefix = f"model.layers.{index}"
        self.input_norm = env.norm(source, f"{prefix}.input_layernorm", config)
        self.attention = Attention(config, shard, source, f"{prefix}.self_attn", env)
        self.post_norm = env.norm(source, f"{prefix}.post_attention_layernorm", config)
        self.mlp = MLP(config, shard, source, f"{prefix}.mlp", env)


class Decoder:
    """One rank's share of the model. `vocab_start`, `vocab_local`: the token ids its logits are for.

    graphs: whether a decode step may be captured in a CUDA graph. What it is made of is to be looked at only.
    """

    def __init__(self, config: ModelConfig, shard: Shard, source: WeightSource, env: Environment) -> None:
        self.config = config
        self.vocab_start = shard.vocab.start
        self.vocab_local = shard.vocab.size
        self.graphs = env.graphs
        linears = env.placement.linears
        self.backend_name = f"{env.ops.name} kernels, {env.attention.name} attention, {linears} linears"
        self.env = env
        self.shard = shard
        self.rope = RotaryTable(config, env.placement.device, env.positions)
        table = self._vocab_rows(source, "model.embed_tokens.weight", shard, env.placement)
        self._embed = VocabParallelEmbedding(table.to(env.placement.device), shard.vocab, env.comm)
        self.layers = [DecoderLayer(config, shard, source, index, env) for index in range(config.num_layers)]
        self._final_norm = env.norm(source, "model.norm", config)
        head, known = ("model.embed_tokens.weight", table) if config.tie_embeddings else ("lm_head.weight", None)
        self.head = vocabulary_head(source, head, shard.vocab, known, env.placement)
        layers = sum(layer.attention.weight_bytes + layer.mlp.weight_bytes for layer in self.layers)
        self.weight_bytes: int = self._embed.weight_bytes + self.head.weight_bytes + layers

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Writes the K/V of the batch's tokens; returns the normalised hidden state [S, hidden] at `sample_index`.

        Without a `sample_index` of every token.
        """
        env = self.env
        if kv.dtype is not env.kv_dtype:
            raise ConfigError(f"a KV cache of {kv.dtype}: the model was loaded for {env.kv_dtype}")
        plan = env.attention.plan(batch, kv.block_size, env.placement.dtype)
        step = Step(batch, kv, self.rope.upto(batch.max_context), plan)
        residual = self._embed(batch.token_ids)
        x = self.first_norm(residual)
        last, chosen = len(self.layers) - 1, batch.sample_index
        sums, at = self._sums_of_halves(batch)
        first = 0
        if sums is not None and last:  # the last layer goes on with a few tokens only
            x, first = self._in_halves(normed(x), residual, step, at, sums), last
        for index, layer in enumerate(self.layers[first:], first):
            q = layer.attention.remember(x, step, index)
            if index == last and chosen is not None and chosen.numel() == 0:
                return residual[:0]
            found = layer.attention.look(q, step, index)
            if index == last and chosen is not None:  # no later layer looks at the others, so only these go on
                found, residual = found[chosen], residual[chosen]
            x = layer.attention.out.add_norm(found, residual, layer.post_norm)
            following = self.layers[index + 1].input_norm if index < last else self._final_norm
            x = layer.mlp.add_norm(x, residual, following)
        return self._owned(normed(x))

    def _sums_of_halves(self, batch: ForwardBatch) -> tuple[SideSums | None, int]:
        """What sums the halves of such a step, and the token between them; None where it stays whole."""
        comm = self.env.comm
        sums = comm.halves if isinstance(comm, SymmetricComm) else None
        at = split_point(batch, self.env.split_from) if sums is not None else None
        if sums is None or at is None:
            return None, 0
        fits = sums.fits(max(at, batch.num_tokens - at), self.config.hidden_size, self.env.placement.dtype)
        return (sums, at) if fits else (None, 0)

    def _in_halves(self, x: Tensor, residual: Tensor, step: Step, at: int, sums: SideSums) -> Tensor:
        """All layers but the last: what goes into that, and `residual` in place. x: the first layer's norm.

        Each half in turn is at its products and its attention while the other one is summed.
        """
        env, kv, last = self.env, step.kv, len(self.layers) - 1
        steps = [
            Step(batch, kv, step.rope, env.attention.plan(batch, kv.block_size, env.placement.dtype))
            for batch in split(step.batch, at)
        ]
        states, residuals = [x[:at], x[at:]], [residual[:at], residual[at:]]
        for index, layer in enumerate(self.layers[:last]):
            parts = []
            for half in range(HALVES):
                if index:
                    sums.wait(half)
                    states[half] = layer.input_norm.of_sum(states[half], residuals[half])
                q = layer.attention.remember(states[half], steps[half], index)
                found = layer.attention.look(q, steps[half], index)
                parts.append(layer.attention.out.start(found, sums, half))
            for half in range(HALVES):
                sums.wait(half)
                thought_of = layer.post_norm.of_sum(parts[half], residuals[half])
                states[half] = layer.mlp.start(thought_of, sums, half)
        for half in range(HALVES):
            sums.wait(half)
            states[half] = self.layers[last].input_norm.of_sum(states[half], residuals[half])
        return torch.cat(states)

    def _owned(self, x: Tensor) -> Tensor:
        """In memory that no later collective overwrites: what follows a forward pass may sum, too."""
        comm = self.env.comm
        return comm.owned(x) if isinstance(comm, SymmetricComm) else x

    def first_norm(self, residual: Tensor) -> Hidden:
        """As the sums of later layers leave it: one rank's with the norm still to be taken, the group's with it."""
        norm = self.layers[0].input_norm
        return Unnormed(residual, norm) if self.env.comm.world_size == 1 else norm(residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, hidden], S > 0, to float32 [S, vocab_local], for token ids from `vocab_start` on."""
        return self.head.wide(hidden)

    def logits_into(self, hidden: Tensor, out: Tensor) -> None:
        """The same into out [S, vocab_local], of the model's dtype."""
        self.head.into(hidden, out)

    @staticmethod
    def _vocab_rows(source: WeightSource, name: str, shard: Shard, placement: Placement) -> Tensor:
        return source.read(name, placement.dtype, 0, shard.vocab.start, shard.vocab.stop)


def load_model(
    config: ModelConfig,
    source: WeightSource,
    comm: Communicator,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    native: bool = True,
    pack: bool = True,
    triton: bool = False,
    attention: str = "auto",
    max_rows: int = 1024,
    max_positions: int | None = None,
    fused_linears: bool = True,
    split_from: int = LEAST_TOKENS,
    capability: tuple[int, int] | None = None,
) -> Decoder:
    """Reads this rank's share of the weights and puts the fastest kernels behind it.

    kv_dtype: of the caches it will be given, `dtype` if None. native, pack: switches for the C kernels and for oneDNN's
    weight layout; both are used only where they work. triton: take the kernels of GPUs. attention: which of their
    backends, see `backends`. max_rows, max_positions: of any step, for what is made ready once. fused_linears: few rows
    go through Triton's kernels for them. split_from: tokens of a step that goes in halves where the communicator sums
    such. capability: of the GPU that kernels are only compiled for. Raises
    ConfigError (too many ranks, a backend that is not there), CorruptWeights.
    """
    kv_dtype = kv_dtype or dtype
    shard = shard_for(config, comm.rank, comm.world_size)
    chosen = choose_backends(
        Request(config, shard, device, dtype, kv_dtype, native, triton, attention, max_rows, capability)
    )
    env = Environment(
        comm=comm,
        placement=Placement(
            device,
            dtype,
            pack,
            load_native() if native and device.type == "cpu" else None,
            chosen.few if fused_linears else None,
        ),
        kv_dtype=kv_dtype,
        ops=chosen.ops,
        attention=chosen.attention,
        graphs=chosen.graphs,
        positions=max_positions or FIRST_ROPE_LENGTH,
        split_from=split_from,
    )
    with torch.inference_mode():
        return Decoder(config, shard, source, env)

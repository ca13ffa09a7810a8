"""The parts of a model, each on anything: to have its kernels compiled and loaded before the first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from treadle.engine.batch import ForwardBatch
from treadle.engine.kv import KVCache
from treadle.engine.linear_few import FewRowLinear
from treadle.engine.model import Decoder
from treadle.engine.norm import Unnormed
from treadle.engine.ops import KVSlots


def attend_once(model: Decoder, batch: ForwardBatch, kv: KVCache) -> None:
    """One layer's attention of anything: to have its kernels compiled for such a batch."""
    env, layout = model.env, model.layers[0].attention.layout
    plan = env.attention.plan(batch, kv.block_size, env.placement.dtype)
    heads = layout.q_heads + 2 * layout.kv_heads
    qkv = _scratch(model, batch.num_tokens, heads * layout.head_dim).view(-1, heads, layout.head_dim)
    env.attention.attend(qkv[:, : layout.q_heads], kv.k[0], kv.v[0], plan)


def operations(model: Decoder, batch: ForwardBatch, kv: KVCache) -> list[Callable[[], object]]:
    """The small operations of a layer, each on anything, for the same reason."""
    ops, layer, tokens = model.env.ops, model.layers[0], batch.num_tokens
    layout = layer.attention.layout
    hidden, other = (_scratch(model, tokens, model.config.hidden_size) for _ in range(2))
    gate_up = _scratch(model, tokens, 2 * model.shard.intermediate.size)
    qkv = _scratch(model, tokens, (layout.q_heads + 2 * layout.kv_heads) * layout.head_dim)
    target = KVSlots(kv.k[0], kv.v[0], batch.slots)
    rope = model.rope.upto(batch.max_context)
    return [
        partial(layer.input_norm, hidden),
        partial(layer.post_norm.of_sum, hidden, other),
        partial(ops.silu_mul, gate_up),
        partial(ops.rope_store, qkv, layout, rope, batch.positions, target),
    ]


def few_rows(model: Decoder, rows: int) -> list[Callable[[], object]]:
    """The products of a layer and the head with `rows` rows of anything, as far as kernels of ours take them.

    Those that a step launches: a norm is taken along where what stands before leaves it to them.
    """
    layer, head = model.layers[0], model.head
    hidden = _scratch(model, rows, model.config.hidden_size)
    found = _scratch(model, rows, layer.attention.layout.q_heads * layer.attention.layout.head_dim)
    inner = _scratch(model, rows, model.shard.intermediate.size)
    attention, mlp, unnormed = layer.attention, layer.mlp, Unnormed(hidden, layer.input_norm)
    calls: list[Callable[[], object]] = [
        partial(attention.out.warm, found),
        partial(mlp.down.warm, inner),
        partial(mlp.gate_up.warm, unnormed if attention.out.leaves_norm(found) else hidden),
    ]
    # The first layer's state comes from the embedding, the others' from the product before.
    later = unnormed if mlp.down.leaves_norm(inner) else hidden
    states = [model.first_norm(hidden), later] if model.env.comm.world_size == 1 and later is hidden else [later]
    calls += [partial(attention.qkv.warm, x) for x in states]
    return [*calls, partial(head.few, hidden)] if isinstance(head, FewRowLinear) else calls


def few_row_kinds(model: Decoder) -> tuple[int, ...]:
    """Numbers of rows for `few_rows` that together meet every kernel."""
    few = model.env.placement.few
    return () if few is None else few.row_kinds


def _scratch(model: Decoder, rows: int, width: int) -> Tensor:
    placement = model.env.placement
    return torch.empty((rows, width), dtype=placement.dtype, device=placement.device)

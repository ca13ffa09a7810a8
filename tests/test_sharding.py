"""Every head, column and token id is somebody's, once, in order, and nobody has much more than another."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.engine.config import ModelConfig
from treadle.engine.sharding import Span, max_world_size, shard_for, split
from treadle.errors import ConfigError


def config_with(kv_heads: int, group: int, intermediate: int = 1536, vocab: int = 49152) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=intermediate,
        num_layers=1,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=16,
        max_position=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_embeddings=True,
        sliding_window=None,
        bos_token_id=None,
        eos_token_ids=(),
    )


def check_cover(spans: list[Span], total: int) -> None:
    assert spans[0].start == 0
    assert spans[-1].stop == total
    assert all(a.stop == b.start for a, b in itertools.pairwise(spans))
    assert all(span.size >= 1 for span in spans)


@given(total=st.integers(1, 5000), parts=st.integers(1, 64), unit=st.sampled_from([1, 16, 32]))
def test_split_covers_in_order_and_evenly(total: int, parts: int, unit: int) -> None:
    if total < parts:
        return
    spans = [split(total, index, parts, unit) for index in range(parts)]
    check_cover(spans, total)
    sizes = [span.size for span in spans]
    assert max(sizes) - min(sizes) < 2 * unit
    if total // unit >= parts:
        assert all(span.start % unit == 0 for span in spans)


@given(kv_heads=st.integers(1, 16), group=st.integers(1, 9), data=st.data())
def test_heads_are_dealt_out(kv_heads: int, group: int, data: st.DataObject) -> None:
    config = config_with(kv_heads, group)
    world = data.draw(st.integers(1, max_world_size(config)))
    shards = [shard_for(config, rank, world) for rank in range(world)]
    check_cover([shard.q_heads for shard in shards], config.num_heads)
    check_cover([shard.intermediate for shard in shards], config.intermediate_size)
    check_cover([shard.vocab for shard in shards], config.vocab_size)
    for shard in shards:
        # The kernels take query heads in equal groups, one group for each KV head that is here.
        assert shard.q_heads.size % shard.kv_heads.size == 0
        local_group = shard.q_heads.size // shard.kv_heads.size
        for head in range(shard.q_heads.size):
            assert shard.kv_heads.start + head // local_group == (shard.q_heads.start + head) // group
    kv_sizes = [shard.kv_heads.size for shard in shards]
    if world <= kv_heads:
        check_cover([shard.kv_heads for shard in shards], kv_heads)
        assert max(kv_sizes) - min(kv_sizes) <= 1
    else:
        assert kv_sizes == [1] * world


def test_nine_heads_on_two_ranks() -> None:
    first, second = (shard_for(config_with(3, 3), rank, 2) for rank in range(2))
    assert (first.q_heads, first.kv_heads) == (Span(0, 6), Span(0, 2))
    assert (second.q_heads, second.kv_heads) == (Span(6, 9), Span(2, 3))
    assert (first.intermediate, second.intermediate) == (Span(0, 768), Span(768, 1536))


def test_more_ranks_than_kv_heads_share_them() -> None:
    shards = [shard_for(config_with(2, 4), rank, 5) for rank in range(5)]
    assert [shard.kv_heads.start for shard in shards] == [0, 0, 0, 1, 1]
    assert [shard.q_heads.size for shard in shards] == [2, 1, 1, 2, 2]


def test_too_many_ranks_says_how_many_are_allowed() -> None:
    with pytest.raises(ConfigError, match="1 to 9"):
        shard_for(config_with(3, 3), 0, 10)
    with pytest.raises(ConfigError, match="1 to 9"):
        shard_for(config_with(3, 3), 0, 0)
    with pytest.raises(ConfigError, match="0 to 1"):
        shard_for(config_with(3, 3), 2, 2)

"""The prefix cache: what it finds, what it must never find, and what it forgets."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.kvcache import BlockId, Parent, PrefixCache
from treadle.transport.codec import pack

SIZE = 4


def publish(cache: PrefixCache, tokens: list[int], salt: str = "") -> list[BlockId]:
    """A sequence that computed all of its full blocks itself; the caller owns them."""
    count = len(tokens) // SIZE
    blocks = cache.pool.allocate(count)
    assert blocks is not None
    cache.publish(salt, cache.split(pack(tokens), count), blocks)
    cache.check()
    return blocks


def found(cache: PrefixCache, tokens: list[int], salt: str = "") -> list[BlockId]:
    return cache.match(salt, pack(tokens), len(tokens) // SIZE)[0]


def test_finds_the_longest_common_prefix_in_full_blocks() -> None:
    cache = PrefixCache(20, SIZE)
    text = list(range(14))
    blocks = publish(cache, text)
    assert len(blocks) == 3
    assert found(cache, text) == blocks
    assert found(cache, text[:11]) == blocks[:2]
    assert found(cache, [*text[:8], 99, 99, 99, 99]) == blocks[:2]
    assert found(cache, [1, *text]) == []
    assert cache.match("", pack(text), 1)[0] == blocks[:1]
    assert cache.match("", pack(text), 0)[0] == []


def test_a_block_counts_only_behind_its_own_prefix() -> None:
    cache = PrefixCache(20, SIZE)
    publish(cache, [1, 1, 1, 1, 2, 2, 2, 2])
    publish(cache, [3, 3, 3, 3])
    assert len(found(cache, [3, 3, 3, 3, 2, 2, 2, 2])) == 1
    assert found(cache, [2, 2, 2, 2]) == []


def test_salts_do_not_meet() -> None:
    cache = PrefixCache(20, SIZE)
    text = [1, 2, 3, 4]
    plain, salted = publish(cache, text), publish(cache, text, "tenant")
    assert found(cache, text) == plain and found(cache, text, "tenant") == salted and plain != salted
    assert found(cache, text, "other") == []


def test_tokens_with_zero_bytes_at_the_end_are_told_apart() -> None:
    cache = PrefixCache(20, SIZE)
    publish(cache, [7, 0, 0, 0])
    assert found(cache, [7, 0, 0, 256]) == [] and len(found(cache, [7, 0, 0, 0])) == 1


class Colliding(bytes):
    """Bytes whose hash is always the same."""

    def __hash__(self) -> int:
        return 1


def test_equal_hashes_of_different_tokens_are_no_hit() -> None:
    cache = PrefixCache(20, SIZE)
    publish(cache, list(range(SIZE)))
    node = cache.match("", pack(list(range(SIZE))), 1)[1]
    assert isinstance(node, dict)
    one, two = Colliding(pack([1, 2, 3, 4])), Colliding(pack([4, 3, 2, 1]))
    node[one] = BlockId(5)
    assert Colliding(pack([1, 2, 3, 4])) in node
    assert two not in node


def test_equal_content_computed_twice_is_one_path() -> None:
    cache = PrefixCache(20, SIZE)
    text = list(range(12))
    first = publish(cache, text[:8])
    second = publish(cache, text)  # computed at the same time, one block further
    assert found(cache, text) == [*first, second[2]]
    cache.pool.release(second)
    cache.check()
    assert cache.pool.cached == 1  # its private copies are blank again


def test_blocks_are_found_after_release_and_gone_after_eviction() -> None:
    cache = PrefixCache(6, SIZE)
    text = list(range(12))
    blocks = publish(cache, text)
    cache.pool.release(blocks)
    assert found(cache, text) == blocks
    cache.pool.allocate(3)  # two blank ones, and the tail of what is cached
    assert found(cache, text) == blocks[:2]
    cache.pool.allocate(2)
    assert found(cache, text) == [] and len(cache) == 0
    cache.check()


def test_orphans_are_never_found_again() -> None:
    """A block behind an evicted one stays unreachable even when equal content takes the evicted one's place."""
    cache = PrefixCache(20, SIZE)
    text = list(range(8))
    blocks = publish(cache, text)
    cache.pool.withdraw(blocks[0])
    publish(cache, text[:4])
    assert len(found(cache, text)) == 1
    cache.check()


def test_clear_forgets_everything() -> None:
    cache = PrefixCache(6, SIZE)
    text = list(range(8))
    publish(cache, text)
    cache.clear()
    cache.check()
    assert found(cache, text) == [] and cache.pool.available == 5


def test_many_sequences_at_once_are_published_like_one_after_another() -> None:
    one, many = PrefixCache(20, SIZE), PrefixCache(20, SIZE)
    texts = [[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]]
    blocks = [BlockId(block) for block in (1, 2, 3)]
    for cache in (one, many):
        cache.pool.allocate(3)
    parents: list[Parent] = ["", "", "salt"]
    singly = [one.publish(p, [pack(t)], [b]) for p, t, b in zip(parents, texts, blocks, strict=True)]
    assert many.publish_each(parents, [pack(t) for t in texts], blocks) == singly
    assert singly[0] == singly[1]
    many.check()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=14), st.booleans()), max_size=25))
def test_whatever_is_found_has_the_same_tokens(events: list[tuple[list[int], bool]]) -> None:
    """Texts of two symbols in a small pool: each hit must hold exactly the tokens asked for, prefix included."""
    cache = PrefixCache(9, 2)
    content: dict[BlockId, list[int]] = {}
    for text, keep_first in events:
        hit, parent = cache.match("", pack(text), len(text) // 2)
        assert all(content[block] == text[: 2 * i + 2] for i, block in enumerate(hit))
        cache.pool.share(hit)
        count = len(text) // 2 - len(hit)
        fresh = cache.pool.allocate(count)
        if fresh is not None:
            content |= {block: text[: 2 * (len(hit) + i) + 2] for i, block in enumerate(fresh)}
            cache.publish(parent, cache.split(pack(text), len(hit) + count)[len(hit) :], fresh)
        table = hit + (fresh or [])
        if keep_first:
            cache.pool.release(table)
        elif table:
            cache.pool.release(table[1:])
            cache.pool.release(table[:1])
        cache.check()

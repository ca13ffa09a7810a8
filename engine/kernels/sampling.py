# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The draw: for each row the best of logit / temperature + noise, or the largest logit, in two launches.

The first reads the logits once and bounds the best score of each tile of the vocabulary from above, in float32. The
second takes the tiles of a row by falling bound, computes their scores in float64, and stops when no bound left can
reach the best score: after one or two tiles, nearly always. So the exact logarithms of `noise.gumbel` cost next to
nothing, and the choice is still theirs.

The bound: noise is -log(-log(1 - u)), and -log(1 - u) is at least u + u^2/2 + u^3/3. A float's exponent and fraction t
give its log2 from below: exponent + t + c t (1 - t), where c = 1 / (2 ln 2) - 1 from below; it is at most 0.02 too low.
"""

from __future__ import annotations

import triton
import triton.language as tl

RANDOM = tl.constexpr(1)
FILTERED = tl.constexpr(2)
WORD_NOISE = tl.constexpr(1)
WORD_TEMPERATURE = tl.constexpr(2)
ID_TOP = tl.constexpr(0x7FFFFFFF)
INF = tl.constexpr(float("inf"))

NUMBERS = ("samples", "count", "tiles", "per_program", "vocab_size", "vocab_start", "rank", "first", "restart")
"""Arguments whose value is no reason to compile a kernel anew."""

_WEYL = tl.constexpr(0x9E3779B97F4A7C15)
_STAFFORD_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_STAFFORD_2 = tl.constexpr(0x94D049BB133111EB)
_MUL_1 = tl.constexpr(0x7FEB352D)
_MUL_2 = tl.constexpr(0x846CA68B)
_2_32 = tl.constexpr(2.0**-32)
_2_23 = tl.constexpr(2.0**-23)
_MINUS_LN_2 = tl.constexpr(-0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_SLACK = tl.constexpr(1e-4)
"""More than rounding can make the bound on the noise fall short."""
_SLACK_OF_SIZE = tl.constexpr(1e-6)
"""The same of logit / temperature, relative."""
_WIDEST_NOISE = tl.constexpr(32.0)


@triton.jit
def ordered(logits):
    """float32 to integers in [0, 2^32) that sort as the floats do, int64; -0.0 equals 0.0. See `filters.encode`."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000


@triton.jit
def noise_key(base, position):
    """The second half of `noise.noise_keys`: two uint32 words."""
    x = base.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64, bitcast=True) * _WEYL
    x = (x ^ (x >> 30)) * _STAFFORD_1
    x = (x ^ (x >> 27)) * _STAFFORD_2
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def hash_words(ids, key_0, key_1):
    """`noise.hash_ids` of int32 ids, uint32."""
    x = ids.to(tl.uint32, bitcast=True)
    x = ((x ^ (x >> 16)) ^ key_0) * _MUL_1
    x = (x ^ (x >> 15) ^ key_1) * _MUL_2
    return x ^ (x >> 16)


@triton.jit
def exact_noise(words):
    """`noise.gumbel`. u is a multiple of 2^-33, so 1 - u is exact and log(1 - u) is as good as log1p(-u)."""
    uniform = (words.to(tl.float64) + 0.5) * _2_32
    return -tl.log(-tl.log(1.0 - uniform))


@triton.jit
def noise_bound(words):
    """float32 that is at most a `_SLACK` below the noise, and at most 0.02 above it where u is small."""
    uniform = (words.to(tl.float32) + 0.5) * _2_32
    bits = (uniform * (1.0 + uniform * (0.5 + uniform * 0.33333))).to(tl.int32, bitcast=True)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    log2 = bits.to(tl.float32) * _2_23 - 127.0 + fraction * (1.0 - fraction) * 0.2786
    return log2 * _MINUS_LN_2


@triton.jit(do_not_specialize=NUMBERS)
def bound_tiles(
    logits, stride, rows, row_params, positions, cuts, groups, groups_stride, bounds, vocab_local, vocab_start, tiles,
    per_program,
    TILE: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, USE_CUTS: tl.constexpr,
):  # fmt: skip
    """bounds, float32 [S, tiles]: no score of the tile is above it; inf where there is a NaN. Grid (S, programs).

    cuts: int64 [S, 2], the last ordered logit that is kept and, of those equal to it, the last id.
    """
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * per_program
    words = row_params + tl.load(rows + sample).to(tl.int64) * WORDS
    random = (tl.load(words) & RANDOM) != 0
    rate = (1.0 / tl.load(words + WORD_TEMPERATURE).to(tl.float64, bitcast=True)).to(tl.float32)
    key_0, key_1 = noise_key(tl.load(words + WORD_NOISE), tl.load(positions + sample))
    logits += sample * stride
    cut_value = tl.full((), 0, tl.int64)
    cut_id = tl.full((), 0x7FFFFFFF, tl.int64)
    cut = False
    if USE_CUTS:
        cut_value = tl.load(cuts + sample * 2)
        cut_id = tl.load(cuts + sample * 2 + 1)
        cut = cut_value > 0
    for tile in range(first, min(first + per_program, tiles)):
        wanted = True
        if cut:
            highest = tl.max(tl.load(groups + sample * groups_stride + tile * GROUPS + tl.arange(0, GROUPS)))
            wanted = ordered(highest) >= cut_value
        best = tl.full((), float("-inf"), tl.float32)
        if wanted:
            place = tile * TILE + tl.arange(0, TILE)
            inside = place < vocab_local
            values = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
            bound = values
            if random:
                bound = tl.maximum(values * rate, _LOWEST)
                bound += noise_bound(hash_words(place + vocab_start, key_0, key_1))
            if cut:
                order = ordered(values)
                inside &= (order > cut_value) | ((order == cut_value) & (place + vocab_start <= cut_id))
            bound = tl.where(values != values, INF, bound)
            best = tl.max(tl.where(inside, bound, float("-inf")))
        tl.store(bounds + sample * tiles + tile, best)


@triton.jit(do_not_specialize=NUMBERS)
def pick_best(
    logits, stride, rows, row_params, positions, cuts, bounds, pairs, tokens, peaks, vocab_local, vocab_start, tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, WORDS: tl.constexpr, USE_CUTS: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """pairs, float64 [S, 2]: the best score of this slice and its id; FINAL: tokens and peaks instead. Grid (S,)."""
    sample = tl.program_id(0).to(tl.int64)
    words = row_params + tl.load(rows + sample).to(tl.int64) * WORDS
    random = (tl.load(words) & RANDOM) != 0
    temperature = tl.load(words + WORD_TEMPERATURE).to(tl.float64, bitcast=True)
    key_0, key_1 = noise_key(tl.load(words + WORD_NOISE), tl.load(positions + sample))
    logits += sample * stride
    cut_value = tl.full((), 0, tl.int64)
    cut_id = tl.full((), 0x7FFFFFFF, tl.int64)
    if USE_CUTS:
        cut_value = tl.load(cuts + sample * 2)
        cut_id = tl.load(cuts + sample * 2 + 1)
    index = tl.arange(0, TILES)
    left = tl.load(bounds + sample * tiles + index, mask=index < tiles, other=float("-inf"))
    best = tl.full((), float("-inf"), tl.float64)
    best_id = tl.full((), 0, tl.int64)
    highest = tl.max(left)
    more = highest > float("-inf")
    while more:
        tile = tl.min(tl.where(left == highest, index, TILES))
        left = tl.where(index == tile, float("-inf"), left)
        place = tile * TILE + tl.arange(0, TILE)
        inside = place < vocab_local
        ids = place + vocab_start
        values = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
        broken = tl.max((inside & (values != values)).to(tl.int32)) != 0
        scores = values.to(tl.float64)
        if random:
            scores = scores / temperature + exact_noise(hash_words(ids, key_0, key_1))
        if USE_CUTS:
            order = ordered(values)
            inside &= (order > cut_value) | ((order == cut_value) & (ids <= cut_id))
        scores = tl.where(inside & (values == values), scores, float("-inf"))
        score = tl.max(scores)
        token = tl.min(tl.where(inside & (scores == score), ids, ID_TOP)).to(tl.int64)
        score = tl.where(broken, float("nan"), score)
        # Comparisons with a NaN are false: once it is the best it stays.
        better = (score > best) | ((score == best) & (token < best_id)) | broken
        best = tl.where(better, score, best)
        best_id = tl.where(better, token, best_id)
        highest = tl.max(left)
        # A greedy bound is the very score, and tiles come in order of ids: of equals the first is the one.
        reach = best - _SLACK - _SLACK_OF_SIZE * (tl.abs(best) + _WIDEST_NOISE)
        more = (highest > best) | (random & (highest >= reach)) | (highest == INF)
        more = more & (highest > float("-inf"))
    if FINAL:
        fine = (best == best) & (tl.abs(best) < INF)
        tl.store(tokens + sample, tl.where(fine, best_id, 0))
        tl.store(peaks + sample, best)
    else:
        tl.store(pairs + sample * 2, best)
        tl.store(pairs + sample * 2 + 1, best_id.to(tl.float64))


@triton.jit(do_not_specialize=NUMBERS)
def agree(pairs, tokens, peaks, samples, WORLD: tl.constexpr):
    """The best of all pairs, [WORLD, S, 2]: the highest score, of equals the lowest id; NaN wins. Grid (S,)."""
    sample = tl.program_id(0).to(tl.int64)
    best = tl.load(pairs + sample * 2)
    best_id = tl.load(pairs + sample * 2 + 1)
    for rank in range(1, WORLD):
        score = tl.load(pairs + (rank * samples + sample) * 2)
        token = tl.load(pairs + (rank * samples + sample) * 2 + 1)
        better = (score > best) | ((score == best) & (token < best_id)) | (score != score)
        best = tl.where(better, score, best)
        best_id = tl.where(better, token, best_id)
    fine = (best == best) & (tl.abs(best) < INF)
    tl.store(tokens + sample, tl.where(fine, best_id, 0.0).to(tl.int64))
    tl.store(peaks + sample, best)

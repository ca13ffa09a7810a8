# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Where top-k, top-p and min-p cut a row, without sorting it: the last logit that is kept, and the last id of its ties.

All three filters keep a prefix of the order (logit, best first; then id, lowest first), so the cut is all there is to
know. Logits are mapped to integers that sort as they do; x is the distance of a logit's integer from that of the row's
largest, in [0, 2^32). The cut is searched for by radix: in each round the window that holds it is divided into 256
bins, tokens and mass (whole units, see `sampling.filters`) are counted in each, and the bin in which the cut falls is
the next window. Counts are integers, so neither the order of atomic additions nor the cut of the vocabulary matters.

A row's search goes through `ROUNDS` rounds for top-k, or for top-p where there is no top-k, and as many more for top-p
after top-k, whose mass must be known first. A row is done as soon as the cut falls between two bins; rows that are
done, and rows without filters, leave each launch at once. min-p needs no search: it is a bound on the logit.

The first window need not hold all logits. Of top-k, the k-th largest of the maxima of disjoint groups bounds the cut;
of top-p, a logit so low that the whole vocabulary at it would not fill what top-p leaves out. Tiles whose largest logit
lies below the window are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sampling import FILTERED, NUMBERS, ordered

BITS = 8
BINS = 1 << BITS
ROUNDS = 4
"""Of BITS each: they resolve 32."""
STATE_WORDS = 16
INFO_WORDS = 4

_BITS = tl.constexpr(BITS)
_BINS = tl.constexpr(BINS)
_ROW = tl.constexpr(2 * (BINS + 1))
"""Words of a histogram: count and mass of each bin, then of the vocabulary after min-p its mass."""
_STATE = tl.constexpr(STATE_WORDS)
_INFO = tl.constexpr(INFO_WORDS)

# A row's search before each round, int64.
_MODE = tl.constexpr(0)
"""0: done. 1: the first x at which `K` tokens are reached. 2: at which top_p of TOTAL is."""
_START = tl.constexpr(1)
"""The window begins at this x,"""
_SIZE = tl.constexpr(2)
"""holds 2^SIZE of them,"""
_END = tl.constexpr(3)
"""and no x past this one counts."""
_COUNT = tl.constexpr(4)
_MASS = tl.constexpr(5)
"""Before the window."""
_TOTAL = tl.constexpr(6)
"""Mass, of which top_p is taken; after the search by count, of what is kept."""
_TIES = tl.constexpr(7)
"""Done: how many of the tokens at END are kept; -1 is all."""

# What the rounds do not change, int64: the integer of the largest logit, that logit as float64, the end by min-p.
_TOP = tl.constexpr(0)
_PEAK = tl.constexpr(1)
_LAST = tl.constexpr(2)

_K = tl.constexpr(3)
_TOP_P = tl.constexpr(4)
_MIN_P = tl.constexpr(5)
_TEMPERATURE = tl.constexpr(2)
_UNITS = tl.constexpr(2.0**34)
_ROUNDER = tl.constexpr(1.5 * 2.0**52)
_FARTHEST = tl.constexpr(0xFFFFFFFF)
_NO_UNITS = tl.constexpr(25.0)
"""exp(-25) is less than half a unit."""


@triton.jit
def _units(logits, peak, temperature):
    """`filters.mass` as int64: adding and subtracting 1.5 * 2^52 rounds to whole numbers, halves to even."""
    units = tl.exp((logits.to(tl.float64) - peak) / temperature) * _UNITS
    return ((units + _ROUNDER) - _ROUNDER).to(tl.int64)


@triton.jit
def _unordered(order):
    """The inverse of `ordered`, of a scalar or a tensor, float32."""
    bits = (order - 0x80000000).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=NUMBERS)
def group_maxima(
    logits, stride, rows, row_params, groups, groups_stride, vocab_local, tiles, per_program,
    TILE: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """groups, float32 [S, tiles * GROUPS]: the largest logit of each; inf where there is a NaN. Grid (S, programs)."""
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * per_program
    if (tl.load(row_params + tl.load(rows + sample).to(tl.int64) * WORDS) & FILTERED) != 0:
        group = tl.arange(0, GROUPS)
        within = group[:, None] * (TILE // GROUPS) + tl.arange(0, TILE // GROUPS)[None, :]
        for tile in range(first, min(first + per_program, tiles)):
            place = tile * TILE + within
            inside = place < vocab_local
            values = tl.load(logits + sample * stride + place, mask=inside, other=float("-inf")).to(tl.float32)
            values = tl.where(values != values, float("inf"), values)
            tl.store(groups + sample * groups_stride + tile * GROUPS + group, tl.max(values, axis=1))


@triton.jit(do_not_specialize=NUMBERS)
def row_peaks(
    rows, row_params, groups, groups_stride, count, peaks, vocab_size, ALL_GROUPS: tl.constexpr, WORDS: tl.constexpr
):
    """peaks, float64 [S, 2]: of the slice, the largest logit and one that top-k cannot cut above. Grid (S,)."""
    sample = tl.program_id(0).to(tl.int64)
    words = row_params + tl.load(rows + sample).to(tl.int64) * WORDS
    if (tl.load(words) & FILTERED) != 0:
        index = tl.arange(0, ALL_GROUPS)
        values = tl.load(groups + sample * groups_stride + index, mask=index < count, other=float("-inf"))
        peak = tl.max(values)
        k = tl.load(words + _K)
        floor = tl.full((), float("-inf"), tl.float32)
        if (k < vocab_size) & (k <= count):
            order = ordered(values)
            low = tl.full((), 0, tl.int64)
            high = ordered(peak) + 1
            while high - low > 1:
                middle = (low + high) >> 1
                enough = tl.sum((order >= middle).to(tl.int64)) >= k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            floor = tl.where(low > 0, _unordered(low), floor)
        tl.store(peaks + sample * 2, peak.to(tl.float64))
        tl.store(peaks + sample * 2 + 1, floor.to(tl.float64))


@triton.jit
def _log2_size(last):
    """The bits of the largest x of a window."""
    return tl.sum(((last >> tl.arange(0, 32)) > 0).to(tl.int64))


@triton.jit(do_not_specialize=NUMBERS)
def first_windows(
    rows, row_params, every_peak, info, state, samples, vocab_size, WORDS: tl.constexpr, WORLD: tl.constexpr
):
    """From every rank's peaks, [WORLD, S, 2], to info and the first state. Grid (S,)."""
    sample = tl.program_id(0).to(tl.int64)
    words = row_params + tl.load(rows + sample).to(tl.int64) * WORDS
    info += sample * _INFO
    state += sample * _STATE
    mode = tl.full((), 0, tl.int64)
    last = tl.full((), 0xFFFFFFFF, tl.int64)
    window = last
    top = last
    peak = tl.full((), 0.0, tl.float64)
    if (tl.load(words) & FILTERED) != 0:
        peak = tl.load(every_peak + sample * 2)
        floor = tl.load(every_peak + sample * 2 + 1)
        for rank in range(1, WORLD):
            peak = tl.maximum(peak, tl.load(every_peak + (rank * samples + sample) * 2))
            floor = tl.maximum(floor, tl.load(every_peak + (rank * samples + sample) * 2 + 1))
        # A row that is at fault keeps all: the draw will find the fault.
        if tl.abs(peak) < float("inf"):
            top = ordered(peak.to(tl.float32))
            temperature = tl.load(words + _TEMPERATURE).to(tl.float64, bitcast=True)
            top_p = tl.load(words + _TOP_P).to(tl.float64, bitcast=True)
            min_p = tl.load(words + _MIN_P).to(tl.float64, bitcast=True)
            last = top - ordered(tl.full((), float("-inf"), tl.float32))
            if min_p > 0:
                low = tl.full((), 0, tl.int64)
                high = last + 1
                while high - low > 1:
                    middle = (low + high) >> 1
                    fits = _units(_unordered(top - middle), peak, temperature).to(tl.float64) >= min_p * _UNITS
                    low = tl.where(fits, middle, low)
                    high = tl.where(fits, high, middle)
                last = low
            if tl.load(words + _K) < vocab_size:
                mode = tl.full((), 1, tl.int64)
                window = tl.minimum(last, top - ordered(floor.to(tl.float32)))
            elif top_p < 1:
                mode = tl.full((), 2, tl.int64)
                depth = tl.minimum(tl.log(vocab_size.to(tl.float64) / (1 - top_p)) + 1, _NO_UNITS)
                window = tl.minimum(last, top - ordered((peak - depth * temperature).to(tl.float32)))
    tl.store(info + _TOP, top)
    tl.store(info + _PEAK, peak.to(tl.int64, bitcast=True))
    tl.store(info + _LAST, last)
    tl.store(state + _MODE, mode)
    tl.store(state + _START, tl.full((), 0, tl.int64))
    tl.store(state + _SIZE, _log2_size(window))
    tl.store(state + _END, last)
    tl.store(state + _COUNT, tl.full((), 0, tl.int64))
    tl.store(state + _MASS, tl.full((), 0, tl.int64))
    tl.store(state + _TOTAL, tl.full((), 0, tl.int64))
    tl.store(state + _TIES, tl.full((), -1, tl.int64))


@triton.jit
def _ties_within(limit, mass, each, count):
    """How many of `count` tokens of `each` units, after `mass`, have less than limit before them."""
    kept = tl.ceil((limit - mass.to(tl.float64)) / each.to(tl.float64)).to(tl.int64)
    kept = tl.where((mass + (kept - 1) * each).to(tl.float64) >= limit, kept - 1, kept)
    kept = tl.where((mass + kept * each).to(tl.float64) < limit, kept + 1, kept)
    return tl.maximum(tl.minimum(kept, count), 0)


@triton.jit
def advanced(
    words, state, histogram, sample, samples, vocab_size, first, restart,
    WORLD: tl.constexpr,
):  # fmt: skip
    """The state after a round, from that before and every rank's histogram of it, [WORLD, S, BINS + 1, 2].

    first: of the first round, which brings the total. restart: of the last round for top-k; top-p begins.
    """
    mode = tl.load(state + _MODE)
    start = tl.load(state + _START)
    size = tl.load(state + _SIZE)
    end = tl.load(state + _END)
    count = tl.load(state + _COUNT)
    mass = tl.load(state + _MASS)
    total = tl.load(state + _TOTAL)
    ties = tl.load(state + _TIES)
    top_p = tl.load(words + _TOP_P).to(tl.float64, bitcast=True)
    k = tl.load(words + _K)
    if mode != 0:
        bins = tl.arange(0, _BINS)
        counts = tl.zeros((_BINS,), tl.int64)
        masses = tl.zeros((_BINS,), tl.int64)
        for rank in range(WORLD):
            part = histogram + (rank * samples + sample) * _ROW
            counts += tl.load(part + 2 * bins)
            masses += tl.load(part + 2 * bins + 1)
            if (first != 0) & (mode == 2):
                total += tl.load(part + 2 * _BINS)
        limit = top_p * total.to(tl.float64)
        up_to = tl.cumsum(counts) + count
        mass_up_to = tl.cumsum(masses) + mass
        reached = ((mode == 1) & (up_to >= k)) | ((mode == 2) & (mass_up_to.to(tl.float64) >= limit))
        hit = tl.min(tl.where(reached, bins, _BINS))
        here = bins == hit
        bin_count = tl.sum(tl.where(here, counts, 0))
        bin_mass = tl.sum(tl.where(here, masses, 0))
        count = tl.where(hit < _BINS, tl.sum(tl.where(here, up_to, 0)) - bin_count, count)
        mass = tl.where(hit < _BINS, tl.sum(tl.where(here, mass_up_to, 0)) - bin_mass, mass + tl.sum(masses))
        shift = tl.maximum(size - _BITS, 0)
        whole = ((mode == 1) & (count + bin_count == k)) | (bin_count == 1)
        if hit == _BINS:  # fewer tokens than k, or (rounding) no limit to the mass: all that min-p leaves is kept
            total = tl.where(mode == 1, mass, total)
            mode = tl.full((), 0, tl.int64)
        elif whole:
            end = tl.minimum(end, start + ((hit + 1).to(tl.int64) << shift) - 1)
            total = tl.where(mode == 1, mass + bin_mass, total)
            mode = tl.full((), 0, tl.int64)
        elif shift == 0:
            each = bin_mass // bin_count
            kept = tl.where(mode == 1, k - count, _ties_within(limit, mass, tl.maximum(each, 1), bin_count))
            end = start + hit
            ties = tl.where(kept < bin_count, kept, -1)
            total = tl.where(mode == 1, mass + kept * each, total)
            mode = tl.full((), 0, tl.int64)
        else:
            start += hit.to(tl.int64) << shift
            size = shift
    if (restart != 0) & (k < vocab_size) & (top_p < 1) & (end < _FARTHEST):
        mode = tl.full((), 2, tl.int64)
        start = tl.full((), 0, tl.int64)
        size = _log2_size(end)
        count = tl.full((), 0, tl.int64)
        mass = tl.full((), 0, tl.int64)
        ties = tl.full((), -1, tl.int64)
    return mode, start, size, end, count, mass, total, ties


@triton.jit
def _store_state(state, mode, start, size, end, count, mass, total, ties):
    tl.store(state + _MODE, mode)
    tl.store(state + _START, start)
    tl.store(state + _SIZE, size)
    tl.store(state + _END, end)
    tl.store(state + _COUNT, count)
    tl.store(state + _MASS, mass)
    tl.store(state + _TOTAL, total)
    tl.store(state + _TIES, ties)


@triton.jit(do_not_specialize=NUMBERS)
def search_round(
    logits, stride, rows, row_params, groups, groups_stride, info, state, histogram, next_state, next_histogram,
    samples, vocab_size, vocab_local, tiles, per_program, first, restart,
    BEGIN: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    """Advances the state by the round before, unless this is the first (BEGIN), and counts this slice's histogram.

    Every program of a row advances for itself; the first keeps the result. next_histogram: zeros. Grid (S, programs).
    """
    sample = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    words = row_params + tl.load(rows + sample).to(tl.int64) * WORDS
    if (tl.load(words) & FILTERED) != 0:
        if BEGIN:
            mode = tl.load(state + sample * _STATE + _MODE)
            start = tl.load(state + sample * _STATE + _START)
            size = tl.load(state + sample * _STATE + _SIZE)
            end = tl.load(state + sample * _STATE + _END)
        else:
            mode, start, size, end, count, mass, total, ties = advanced(
                words, state + sample * _STATE, histogram, sample, samples, vocab_size, first, restart, WORLD
            )
            if program == 0:
                _store_state(next_state + sample * _STATE, mode, start, size, end, count, mass, total, ties)
        if mode != 0:
            top = tl.load(info + sample * _INFO + _TOP)
            peak = tl.load(info + sample * _INFO + _PEAK).to(tl.float64, bitcast=True)
            temperature = tl.load(words + _TEMPERATURE).to(tl.float64, bitcast=True)
            shift = tl.maximum(size - _BITS, 0)
            last = tl.minimum(end, start + (tl.full((), 1, tl.int64) << size) - 1)
            target = next_histogram + sample * _ROW
            whole = BEGIN & (mode == 2)
            whole_mass = tl.full((), 0, tl.int64)
            for tile in range(program * per_program, min((program + 1) * per_program, tiles)):
                highest = tl.max(tl.load(groups + sample * groups_stride + tile * GROUPS + tl.arange(0, GROUPS)))
                if whole | (top - ordered(highest) <= last):
                    place = tile * TILE + tl.arange(0, TILE)
                    inside = place < vocab_local
                    values = tl.load(logits + sample * stride + place, mask=inside, other=float("-inf")).to(tl.float32)
                    units = _units(values, peak, temperature)
                    x = top - ordered(values)
                    if whole:
                        whole_mass += tl.sum(tl.where(inside & (x <= end), units, 0))
                    inside = inside & (x >= start) & (x <= last)
                    bins = target + 2 * tl.where(inside, (x - start) >> shift, 0)
                    tl.atomic_add(bins, tl.full((TILE,), 1, tl.int64), mask=inside, sem="relaxed")
                    tl.atomic_add(bins + 1, units, mask=inside & (units != 0), sem="relaxed")
            if whole:
                tl.atomic_add(target + 2 * _BINS, whole_mass, sem="relaxed")


@triton.jit(do_not_specialize=NUMBERS)
def count_ties(
    logits, stride, rows, row_params, groups, groups_stride, info, state, histogram, next_state, tile_ties, rank_ties,
    samples, vocab_size, vocab_local, tiles, per_program,
    TILE: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    """After the last round: of rows that keep a part of the tokens at the cut, how many each tile has.

    tile_ties: int32 [S, tiles]. rank_ties: int64 [S], zeros. Grid (S, programs).
    """
    sample = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    words = row_params + tl.load(rows + sample).to(tl.int64) * WORDS
    if (tl.load(words) & FILTERED) != 0:
        mode, start, size, end, count, mass, total, ties = advanced(
            words, state + sample * _STATE, histogram, sample, samples, vocab_size, 0, 0, WORLD
        )
        if program == 0:
            _store_state(next_state + sample * _STATE, mode, start, size, end, count, mass, total, ties)
        if ties >= 0:
            cut = tl.load(info + sample * _INFO + _TOP) - end
            sum_ties = tl.full((), 0, tl.int64)
            for tile in range(program * per_program, min((program + 1) * per_program, tiles)):
                highest = tl.max(tl.load(groups + sample * groups_stride + tile * GROUPS + tl.arange(0, GROUPS)))
                found = tl.full((), 0, tl.int32)
                if ordered(highest) >= cut:
                    place = tile * TILE + tl.arange(0, TILE)
                    inside = place < vocab_local
                    values = tl.load(logits + sample * stride + place, mask=inside, other=float("-inf")).to(tl.float32)
                    found = tl.sum((inside & (ordered(values) == cut)).to(tl.int32))
                tl.store(tile_ties + sample * tiles + tile, found)
                sum_ties += found
            if sum_ties > 0:
                tl.atomic_add(rank_ties + sample, sum_ties, sem="relaxed")


@triton.jit(do_not_specialize=NUMBERS)
def place_cuts(
    logits, stride, rows, row_params, info, state, tile_ties, every_rank_ties, cuts,
    samples, vocab_local, vocab_start, tiles, rank,
    TILE: tl.constexpr, TILES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """cuts, int64 [S, 2]: the last ordered logit kept and the last id of this slice at it. Grid (S,).

    every_rank_ties: [WORLD, S]; lower ranks hold lower ids, so theirs are kept first.
    """
    sample = tl.program_id(0).to(tl.int64)
    cut = tl.full((), 0, tl.int64)
    last_id = tl.full((), 0x7FFFFFFF, tl.int64)
    if (tl.load(row_params + tl.load(rows + sample).to(tl.int64) * WORDS) & FILTERED) != 0:
        cut = tl.maximum(tl.load(info + sample * _INFO + _TOP) - tl.load(state + sample * _STATE + _END), 0)
        left = tl.load(state + sample * _STATE + _TIES)
        if left >= 0:
            for lower in range(rank):
                left -= tl.load(every_rank_ties + lower * samples + sample)
            if left <= 0:
                last_id = tl.full((), -1, tl.int64)
            elif left < tl.load(every_rank_ties + rank * samples + sample):
                index = tl.arange(0, TILES)
                each = tl.load(tile_ties + sample * tiles + index, mask=index < tiles, other=0)
                up_to = tl.cumsum(each)
                tile = tl.min(tl.where(up_to >= left, index, TILES))
                left -= tl.sum(tl.where(index < tile, each, 0))
                place = tile * TILE + tl.arange(0, TILE)
                inside = place < vocab_local
                values = tl.load(logits + sample * stride + place, mask=inside, other=float("-inf")).to(tl.float32)
                tie = inside & (ordered(values) == cut)
                rank_of_tie = tl.cumsum(tie.to(tl.int32))
                chosen = tie & (rank_of_tie == left)
                last_id = tl.sum(tl.where(chosen, place + vocab_start, 0)).to(tl.int64)
    tl.store(cuts + sample * 2, cut)
    tl.store(cuts + sample * 2 + 1, last_id)

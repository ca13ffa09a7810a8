/* Attention of many query tokens of one row over its paged keys and values.

   For each key/value head, keys and values are first laid out for matrix products, 64 keys to a panel. Then tiles of
   query rows (every query head of every token is a row) visit the panels in order with an online softmax (Milakov and
   Gimelshein 2018; Dao et al. 2022): scores, their exponentials against the running maximum, and the weighted values
   are made and used up in the first level cache.

   Both products run in units of 32 bits: one float, or, where the machine multiplies them, a pair of bfloat16. */
#include <stdlib.h>

#include "common.h"

#define ROWS 6    /* of a tile: 6 x 4 vectors of sums fill the registers */
#define COLUMNS 4 /* vectors */
#define KEYS (COLUMNS * LANES)
#define TILES 8 /* that visit a panel while it is in the cache */
#define GROUP_ROWS (ROWS * TILES)

#ifdef __AVX512BF16__
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

typedef struct {
    const void *q, *k_cache, *v_cache;
    const int32_t *table;
    void *out;
    int64_t q_stride, queries, context, q_heads, kv_heads, head_dim, block_size, window;
    float scale;
} problem;

typedef struct {
    uint32_t *keys;    /* [panels][units of a head][KEYS] */
    uint32_t *values;  /* [panels][slices of a head][units of KEYS][KEYS] */
    uint32_t *queries; /* [GROUP_ROWS][units of a head] */
    uint32_t *weights; /* [ROWS][units of KEYS] */
    vfloat *sums;      /* [GROUP_ROWS][slices][COLUMNS] */
    vfloat total[GROUP_ROWS]; /* of the weights, lane by lane */
    float largest[GROUP_ROWS];
    int64_t head_units, key_units, slices; /* a slice: KEYS elements of a value */
} workspace;

/* The float at `index`, as a unit of its own. */
INLINE uint32_t unit_of(const void *row, int64_t index, int bf16) {
    uint32_t bits;
    if (bf16)
        bits = (uint32_t)((const uint16_t *)row)[index] << 16;
    else
        memcpy(&bits, (const float *)row + index, 4);
    return bits;
}

INLINE const void *row_at(const problem *p, const void *cache, int64_t head, int64_t position, int bf16) {
    const int64_t block = p->table[position / p->block_size], offset = position % p->block_size;
    return at(cache, ((block * p->kv_heads + head) * p->block_size + offset) * p->head_dim, bf16);
}

/* Column j of a panel is key j; what lies past the context is zero. */
INLINE void pack_keys(const problem *p, workspace *s, int64_t head, int64_t panel, int bf16, int pairs) {
    uint32_t *target = s->keys + panel * s->head_units * KEYS;
    for (int64_t j = 0; j < KEYS; j++) {
        const int64_t position = panel * KEYS + j;
        if (position >= p->context) {
            for (int64_t u = 0; u < s->head_units; u++) target[u * KEYS + j] = 0;
            continue;
        }
        const void *row = row_at(p, p->k_cache, head, position, bf16);
        for (int64_t u = 0; u < s->head_units; u++)
            target[u * KEYS + j] = pairs ? ((const uint32_t *)row)[u] : unit_of(row, u, bf16);
    }
}

/* Row i of a panel holds one key's values, or those of two keys interleaved. */
INLINE void pack_values(const problem *p, workspace *s, int64_t head, int64_t panel, int bf16, int pairs) {
    static const uint32_t nothing[1024];
    const int64_t dim = p->head_dim, step = pairs ? 2 : 1;
    for (int64_t i = 0; i < s->key_units; i++) {
        const int64_t position = panel * KEYS + i * step;
        const void *row = position < p->context ? row_at(p, p->v_cache, head, position, bf16) : nothing;
        const void *second = position + 1 < p->context && pairs ? row_at(p, p->v_cache, head, position + 1, bf16) : nothing;
        for (int64_t slice = 0; slice < s->slices; slice++) {
            uint32_t *target = s->values + ((panel * s->slices + slice) * s->key_units + i) * KEYS;
            const int64_t first = slice * KEYS, count = dim - first < KEYS ? dim - first : KEYS;
            for (int64_t d = 0; d < count; d++)
                target[d] = pairs ? ((const uint16_t *)row)[first + d] | (uint32_t)((const uint16_t *)second)[first + d] << 16
                                  : unit_of(row, first + d, bf16);
            for (int64_t d = count; d < KEYS; d++) target[d] = 0;
        }
    }
}

INLINE vfloat multiply_add(vfloat sum, uint32_t unit, vuint units, int pairs) {
#if HAS_PAIRS
    if (pairs) return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)unit), (__m512bh)units);
#endif
    float value;
    memcpy(&value, &unit, 4);
    return sum + value * (vfloat)units;
}

/* sums [ROWS][COLUMNS] += left [ROWS][units] x right [units][KEYS] */
INLINE void multiply_tile(const uint32_t *left, int64_t units, const uint32_t *right, vfloat sums[ROWS][COLUMNS],
                          int pairs) {
    for (int64_t u = 0; u < units; u++, right += KEYS) {
        vuint column[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) column[c] = (vuint)load(right, c * LANES, 0);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) sums[r][c] = multiply_add(sums[r][c], left[r * units + u], column[c], pairs);
    }
}

/* One row of scores to weights: updates its maximum and total; returns by how much what came before has to shrink. */
INLINE float weigh_row(workspace *s, int64_t row, vfloat score[COLUMNS], float scale, int64_t first_key, int64_t begin,
                       int64_t end, uint32_t *weights, int pairs) {
    const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int masked = begin > first_key || end < first_key + KEYS;
    vint seen[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
        const vint key = lane + (int32_t)(c * LANES);
        seen[c] = (key >= (int32_t)(begin - first_key)) & (key < (int32_t)(end - first_key));
        score[c] *= scale;
        if (masked) score[c] = choose(seen[c], score[c], splat(-1e30f));
    }
    vfloat most = score[0];
    for (int c = 1; c < COLUMNS; c++) most = larger_lanes(score[c], most);
    const float before = s->largest[row], here = largest_lane(most), now = here > before ? here : before;
    const float shrink = here > before ? exp_lanes(splat(before - now))[0] : 1.0f;
    vfloat total = splat(0);
    for (int c = 0; c < COLUMNS; c++) {
        vfloat weight = exp_lanes(score[c] - now);
        if (masked) weight = choose(seen[c], weight, splat(0));
        total += weight;
        store(weights, c * LANES, weight, pairs);
    }
    s->largest[row] = now;
    s->total[row] = s->total[row] * shrink + total;
    return shrink;
}

/* Lets one tile of rows, the first of which is `row` of the whole and `local` of the group, see one panel. */
INLINE void visit(const problem *p, workspace *s, int64_t row, int64_t local, int64_t panel, int pairs) {
    const int64_t group = p->q_heads / p->kv_heads, prefix = p->context - p->queries, first_key = panel * KEYS;
    const int64_t rows = p->queries * group - row < ROWS ? p->queries * group - row : ROWS;
    const int64_t end = prefix + (row + rows - 1) / group + 1;
    const int64_t begin = p->window && prefix + row / group + 1 > p->window ? prefix + row / group + 1 - p->window : 0;
    if (first_key >= end || first_key + KEYS <= begin) return;
    vfloat scores[ROWS][COLUMNS] = {{{0}}};
    multiply_tile(s->queries + local * s->head_units, s->head_units, s->keys + panel * s->head_units * KEYS, scores, pairs);
    float shrink[ROWS];
    for (int64_t r = 0; r < ROWS; r++) {
        /* Rows past the last one repeat it; nobody reads what they become. */
        const int64_t own = prefix + (r < rows ? row + r : row + rows - 1) / group + 1;
        shrink[r] = weigh_row(s, local + r, scores[r], p->scale, first_key, p->window && own > p->window ? own - p->window : 0,
                              own, s->weights + r * s->key_units, pairs);
    }
    for (int64_t slice = 0; slice < s->slices; slice++) {
        vfloat sums[ROWS][COLUMNS];
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++)
                sums[r][c] = s->sums[((local + r) * s->slices + slice) * COLUMNS + c] * shrink[r];
        multiply_tile(s->weights, s->key_units, s->values + (panel * s->slices + slice) * s->key_units * KEYS, sums, pairs);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < COLUMNS; c++) s->sums[((local + r) * s->slices + slice) * COLUMNS + c] = sums[r][c];
    }
}

INLINE void load_queries(const problem *p, workspace *s, int64_t head, int64_t row, int64_t rows, int bf16, int pairs) {
    const int64_t group = p->q_heads / p->kv_heads;
    memset(s->queries, 0, GROUP_ROWS * s->head_units * 4);
    memset(s->sums, 0, GROUP_ROWS * s->slices * COLUMNS * sizeof(vfloat));
    for (int64_t r = 0; r < GROUP_ROWS; r++) {
        s->largest[r] = -1e30f;
        s->total[r] = splat(0);
        if (r >= rows) continue;
        const void *q = at(p->q, (row + r) / group * p->q_stride + (head * group + (row + r) % group) * p->head_dim, bf16);
        for (int64_t u = 0; u < s->head_units; u++)
            s->queries[r * s->head_units + u] = pairs ? ((const uint32_t *)q)[u] : unit_of(q, u, bf16);
    }
}

INLINE void store_results(const problem *p, const workspace *s, int64_t head, int64_t row, int64_t rows, int bf16) {
    const int64_t group = p->q_heads / p->kv_heads, dim = p->head_dim;
    for (int64_t r = 0; r < rows; r++) {
        void *target = at_mut(p->out, ((row + r) / group * p->q_heads + head * group + (row + r) % group) * dim, bf16);
        const float inverse = 1.0f / sum_lanes(s->total[r]);
        for (int64_t d = 0; d < dim; d += LANES)
            store_some(target, d, dim, s->sums[r * s->slices * COLUMNS + d / LANES] * inverse, bf16);
    }
}

INLINE void attend(const problem *p, workspace *s, int bf16, int pairs) {
    const int64_t group = p->q_heads / p->kv_heads, all = p->queries * group, prefix = p->context - p->queries;
    const int64_t first = p->window && prefix + 1 > p->window ? (prefix + 1 - p->window) / KEYS : 0;
    for (int64_t head = 0; head < p->kv_heads; head++) {
        for (int64_t panel = first; panel * KEYS < p->context; panel++) {
            pack_keys(p, s, head, panel, bf16, pairs);
            pack_values(p, s, head, panel, bf16, pairs);
        }
        for (int64_t row = 0; row < all; row += GROUP_ROWS) {
            const int64_t rows = all - row < GROUP_ROWS ? all - row : GROUP_ROWS;
            const int64_t last = prefix + (row + rows - 1) / group;
            load_queries(p, s, head, row, rows, bf16, pairs);
            for (int64_t panel = first; panel * KEYS <= last; panel++)
                for (int64_t local = 0; local < rows; local += ROWS) visit(p, s, row + local, local, panel, pairs);
            store_results(p, s, head, row, rows, bf16);
        }
    }
}

/* The queries are the last `queries` tokens of a context of `context`; each sees itself and what comes before, or the
   last `window` of that. q: [queries, q_heads, head_dim], tokens `q_stride` elements apart. k_cache, v_cache: [blocks,
   kv_heads, block_size, head_dim], head_dim even and at most 1024. table: the row's blocks. out: [queries, q_heads,
   head_dim]. Returns 0, or -1 when there is no memory for the panels. */
EXPORT int treadle_prefill_attention(const void *q, int64_t q_stride, const void *k_cache, const void *v_cache,
                                     const int32_t *table, void *out, int64_t queries, int64_t context,
                                     int64_t q_heads, int64_t kv_heads, int64_t head_dim, int64_t block_size,
                                     float scale, int64_t window, int bf16) {
    const problem p = {q,       k_cache,  v_cache,  table,      out,    q_stride, queries, context,
                       q_heads, kv_heads, head_dim, block_size, window, scale};
    const int pairs = bf16 && HAS_PAIRS;
    const int64_t panels = (context + KEYS - 1) / KEYS;
    workspace s = {.head_units = pairs ? head_dim / 2 : head_dim,
                   .key_units = pairs ? KEYS / 2 : KEYS,
                   .slices = (head_dim + KEYS - 1) / KEYS};
    const int64_t keys = panels * s.head_units * KEYS, values = panels * s.slices * s.key_units * KEYS;
    const int64_t fixed = GROUP_ROWS * s.head_units + ROWS * s.key_units, sums = GROUP_ROWS * s.slices * KEYS;
    /* `fixed` is a multiple of 16 units, so that every part begins on a cache line. */
    char *memory = aligned_alloc(64, (size_t)(sums + fixed + keys + values) * 4);
    if (!memory) return -1;
    s.sums = (vfloat *)memory;
    s.keys = (uint32_t *)memory + sums;
    s.values = s.keys + keys;
    s.queries = s.values + values;
    s.weights = s.queries + GROUP_ROWS * s.head_units;
    if (pairs)
        attend(&p, &s, 1, HAS_PAIRS);
    else if (bf16)
        attend(&p, &s, 1, 0);
    else
        attend(&p, &s, 0, 0);
    free(memory);
    return 0;
}

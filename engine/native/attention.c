/* Attention of one query token per row over paged keys and values.

   For each row and key/value head: scores of all its query heads against every key in the window, softmax over them,
   and the weighted sum of the values. Pages are read where they lie, each once per group of up to four query heads. */
#include <stdlib.h>

#include "common.h"

#define MAX_GROUP 4
#define SLICE 4 /* vectors of a value row that one pass keeps in registers */

typedef struct context {
    const struct context *next; /* the one that is worked on after this, or null */
    const void *keys, *values;  /* of this key/value head, in block 0 */
    const int32_t *table;
    size_t block_stride; /* elements from a block to the next */
    int64_t block_size, begin, end;
} context;

/* Sum over the lanes of each of 16 vectors: lane i of the result is the sum of rows[i]. Each round adds the two halves
   of pairs of vectors side by side. */
static __attribute__((noinline)) vfloat sum_each(const vfloat *rows) {
#define MIX(a, b, m0, m1) (__builtin_shuffle(a, b, m0) + __builtin_shuffle(a, b, m1))
    const vint even1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    const vint odd1 = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
    const vint even2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const vint odd2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    const vint even4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    const vint odd4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
    const vint even8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const vint odd8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
    vfloat two[8], four[4], eight[2];
    for (int i = 0; i < 8; i++) two[i] = MIX(rows[2 * i], rows[2 * i + 1], even1, odd1);
    for (int i = 0; i < 4; i++) four[i] = MIX(two[2 * i], two[2 * i + 1], even2, odd2);
    for (int i = 0; i < 2; i++) eight[i] = MIX(four[2 * i], four[2 * i + 1], even4, odd4);
    return MIX(eight[0], eight[1], even8, odd8);
#undef MIX
}

INLINE const void *page_of(const void *base, const context *c, int64_t position, int bf16) {
    return at(base, c->table[position / c->block_size] * c->block_stride, bf16);
}

/* How wide a head is, known to the compiler in the common cases. `whole`: a multiple of LANES, so that no vector of it
   is incomplete. */
typedef struct {
    int64_t dim;
    int whole;
} width;

/* Asks for one row of a page that will be read later, which is too far for L1. Spread over the arithmetic, such requests
   keep memory busy all the time; a burst of them would only queue. */
INLINE void prefetch_row(const void *row, width w, int bf16) {
    for (size_t byte = 0; byte < w.dim * element_size(bf16); byte += 64) __builtin_prefetch((const char *)row + byte, 0, 2);
}

INLINE int vectors_of(width w) { return (int)((w.dim + LANES - 1) / LANES); }

INLINE vfloat load_wide(const void *row, int64_t index, width w, int bf16) {
    return w.whole ? load(row, index, bf16) : load_some(row, index, w.dim, bf16);
}

INLINE void store_wide(void *row, int64_t index, vfloat value, width w, int bf16) {
    if (w.whole)
        store(row, index, value, bf16);
    else
        store_some(row, index, w.dim, value, bf16);
}

/* Up to LANES keys at once: scores[g * stride + j] = query[g] . key[j]. query: [group, vectors * LANES], zero padded.
   Always writes LANES scores; those past `count` are zero. `values`: of the same keys, to be read soon. */
INLINE void score_some(const float *query, const void *keys, const void *values, int count, float *scores,
                       int64_t stride, width w, int group, int bf16) {
    vfloat parts[MAX_GROUP][LANES];
    const int vectors = vectors_of(w);
    for (int j = 0; j < count; j++) {
        const void *row = at(keys, j * w.dim, bf16);
        prefetch_row(at(values, j * w.dim, bf16), w, bf16);
        vfloat sum[MAX_GROUP] = {{0}};
        for (int d = 0; d < vectors; d++) {
            vfloat k = load_wide(row, d * LANES, w, bf16);
            for (int g = 0; g < group; g++) sum[g] += k * load(query, (g * vectors + d) * LANES, 0);
        }
        for (int g = 0; g < group; g++) parts[g][j] = sum[g];
    }
    for (int g = 0; g < group; g++) {
        for (int j = count; j < LANES; j++) parts[g][j] = splat(0);
        store(scores, g * stride, sum_each(parts[g]), 0);
    }
}

INLINE void score_keys(const context *c, const float *query, float *scores, int64_t stride, width w, int group,
                       int bf16) {
    for (int64_t position = c->begin, last; position < c->end; position = last) {
        const int64_t first = position % c->block_size;
        last = position - first + c->block_size;
        if (last > c->end) last = c->end;
        const void *keys = at(page_of(c->keys, c, position, bf16), first * w.dim, bf16);
        const void *values = at(page_of(c->values, c, position, bf16), first * w.dim, bf16);
        float *target = scores + position - c->begin; /* a last write may go past the page: the next page's come after */
        const int64_t count = last - position;
        int64_t key = 0;
        for (; key + LANES <= count; key += LANES)
            score_some(query, at(keys, key * w.dim, bf16), at(values, key * w.dim, bf16), LANES, target + key, stride, w,
                       group, bf16);
        if (key < count)
            score_some(query, at(keys, key * w.dim, bf16), at(values, key * w.dim, bf16), (int)(count - key),
                       target + key, stride, w, group, bf16);
    }
}

/* In place: exp(score - max); returns the sum. `scores` has room for a whole last vector. */
static __attribute__((noinline)) float softmax(float *scores, int64_t count) {
    for (int64_t i = count; i % LANES; i++) scores[i] = -INFINITY;
    vfloat most = load(scores, 0, 0), total = splat(0);
    for (int64_t i = LANES; i < count; i += LANES) {
        vfloat s = load(scores, i, 0);
        most = larger_lanes(s, most);
    }
    const float largest = largest_lane(most);
    for (int64_t i = 0; i < count; i += LANES) {
        vfloat e = exp_lanes(load(scores, i, 0) - largest);
        store(scores, i, e, 0);
        total += e;
    }
    return sum_lanes(total);
}

/* out[g, offset ...] = sum over keys of weight[g][key] * value[key, offset ...], over `vectors` <= SLICE vectors. */
INLINE void weigh_slice(const context *c, const float *weights, int64_t stride, const float *scale, void *out,
                        int64_t offset, int vectors, width w, int group, int bf16) {
    vfloat sum[MAX_GROUP][SLICE] = {{{0}}};
    for (int64_t position = c->begin, last; position < c->end; position = last) {
        const int64_t first = position % c->block_size;
        last = position - first + c->block_size;
        if (last > c->end) last = c->end;
        const void *row = at(page_of(c->values, c, position, bf16), first * w.dim, bf16);
        const void *ahead = row;
        if (c->next && position < c->next->end) ahead = at(page_of(c->next->keys, c->next, position, bf16), first * w.dim, bf16);
        for (; position < last; position++, row = at(row, w.dim, bf16)) {
            const float *weight = weights + position - c->begin;
            prefetch_row(ahead, w, bf16);
            ahead = at(ahead, w.dim, bf16);
            for (int d = 0; d < vectors; d++) {
                vfloat v = load_wide(row, offset + d * LANES, w, bf16);
                for (int g = 0; g < group; g++) sum[g][d] += v * weight[g * stride];
            }
        }
    }
    for (int g = 0; g < group; g++)
        for (int d = 0; d < vectors; d++)
            store_wide(at_mut(out, g * w.dim, bf16), offset + d * LANES, sum[g][d] * scale[g], w, bf16);
}

INLINE void attend_group(const context *c, const void *q, void *out, float scale, float *scratch, width w, int group,
                         int bf16) {
    const int vectors = vectors_of(w);
    const int64_t count = c->end - c->begin, stride = count + 2 * LANES;
    float *query = scratch, *scores = scratch + group * vectors * LANES, inverse[MAX_GROUP];
    for (int g = 0; g < group; g++)
        for (int d = 0; d < vectors; d++)
            store(query, (g * vectors + d) * LANES, load_wide(at(q, g * w.dim, bf16), d * LANES, w, bf16) * scale, 0);
    score_keys(c, query, scores, stride, w, group, bf16);
    for (int g = 0; g < group; g++) inverse[g] = 1.0f / softmax(scores + g * stride, count);
    int d = 0;
    for (; d + SLICE <= vectors; d += SLICE)
        weigh_slice(c, scores, stride, inverse, out, d * LANES, SLICE, w, group, bf16);
    for (; d < vectors; d++) weigh_slice(c, scores, stride, inverse, out, d * LANES, 1, w, group, bf16);
}

typedef void (*attend)(const context *, const void *, void *, float, float *, int64_t dim);

/* Heads of 64 in bfloat16 are worth their own code, being small and common; it takes a while to compile. */
#define ATTEND(GROUP, BF16)                                                                                           \
    static void attend_##GROUP##_##BF16(const context *c, const void *q, void *out, float scale, float *scratch,      \
                                        int64_t dim) {                                                                \
        if (BF16 && dim == 64)                                                                                        \
            attend_group(c, q, out, scale, scratch, (width){64, 1}, GROUP, BF16);                                     \
        else                                                                                                          \
            attend_group(c, q, out, scale, scratch, (width){dim, 1}, GROUP, BF16);                                    \
    }
#define ATTEND_RAGGED(BF16)                                                                                           \
    static void attend_ragged_##BF16(const context *c, const void *q, void *out, float scale, float *scratch,         \
                                     int64_t dim) {                                                                   \
        attend_group(c, q, out, scale, scratch, (width){dim, 0}, 1, BF16);                                            \
    }
ATTEND(1, 0)
ATTEND(2, 0)
ATTEND(3, 0)
ATTEND(4, 0)
ATTEND(1, 1)
ATTEND(2, 1)
ATTEND(3, 1)
ATTEND(4, 1)
ATTEND_RAGGED(0)
ATTEND_RAGGED(1)

static const attend attend_whole[2][MAX_GROUP] = {{attend_1_0, attend_2_0, attend_3_0, attend_4_0},
                                                  {attend_1_1, attend_2_1, attend_3_1, attend_4_1}};
static const attend attend_ragged[2] = {attend_ragged_0, attend_ragged_1};

typedef struct {
    const void *q, *k_cache, *v_cache;
    const int32_t *table, *lengths;
    int64_t q_stride, pages, rows, q_heads, kv_heads, head_dim, block_size, window;
    int bf16;
} problem;

/* `index` counts the KV heads of all rows: those of a row come one after the other. */
static context context_of(const problem *p, int64_t index) {
    const int64_t row = index / p->kv_heads, length = p->lengths[row];
    const size_t plane = index % p->kv_heads * p->block_size * p->head_dim;
    return (context){
        .keys = at(p->k_cache, plane, p->bf16),
        .values = at(p->v_cache, plane, p->bf16),
        .table = p->table + row * p->pages,
        .block_stride = p->kv_heads * p->block_size * p->head_dim,
        .block_size = p->block_size,
        .begin = p->window && length > p->window ? length - p->window : 0,
        .end = length,
    };
}

static void attend_all(const problem *p, void *out, float scale, float *scratch) {
    const int64_t group = p->q_heads / p->kv_heads, contexts = p->rows * p->kv_heads;
    const int whole = p->head_dim % LANES == 0, most = whole ? MAX_GROUP : 1;
    context pair[2] = {context_of(p, 0)};
    for (int64_t index = 0; index < contexts; index++) {
        context *here = &pair[index & 1], *next = &pair[~index & 1];
        if (index + 1 < contexts) {
            *next = context_of(p, index + 1);
            here->next = next;
        }
        const int64_t row = index / p->kv_heads, begin = index % p->kv_heads * group;
        for (int64_t head = begin; head < begin + group; head += most) {
            const int64_t some = begin + group - head < most ? begin + group - head : most;
            const attend kernel = whole ? attend_whole[p->bf16][some - 1] : attend_ragged[p->bf16];
            kernel(here, at(p->q, row * p->q_stride + head * p->head_dim, p->bf16),
                   at_mut(out, (row * p->q_heads + head) * p->head_dim, p->bf16), scale, scratch, p->head_dim);
        }
    }
}

/* q: [rows, q_heads, head_dim], rows `q_stride` elements apart. k_cache, v_cache: [blocks, kv_heads, block_size,
   head_dim]. table: [rows, pages]. lengths: [rows], with the query's own token. window 0: no window.
   out: [rows, q_heads, head_dim]. Returns 0, or -1 when there is no memory for the scores. */
EXPORT int treadle_decode_attention(const void *q, int64_t q_stride, const void *k_cache, const void *v_cache,
                                    const int32_t *table, int64_t pages, const int32_t *lengths, void *out,
                                    int64_t rows, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                                    int64_t block_size, float scale, int64_t window, int bf16) {
    const problem p = {q,    k_cache, v_cache,  table,    lengths,    q_stride, pages,
                       rows, q_heads, kv_heads, head_dim, block_size, window,   bf16 != 0};
    if (rows == 0) return 0;
    int64_t longest = 0;
    for (int64_t row = 0; row < rows; row++) longest = lengths[row] > longest ? lengths[row] : longest;
    float *scratch = malloc(MAX_GROUP * (head_dim + longest + 3 * LANES) * sizeof(float));
    if (!scratch) return -1;
    attend_all(&p, out, scale, scratch);
    free(scratch);
    return 0;
}

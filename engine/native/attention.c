/* Attention of one query token per row over paged keys and values.

   For each row and key/value head: scores of all its query heads against every key in the window, softmax over them,
   and the weighted sum of the values. Pages are read where they lie, each once per group of up to four query heads. */
#include <stdlib.h>

#include "common.h"

#define MAX_GROUP 4
#define SLICE 4 /* vectors of a value row that one pass keeps in registers */

typedef struct {
    const void *keys, *values; /* of this key/value head, in block 0 */
    const int32_t *table;
    size_t block_stride; /* elements from a block to the next */
    int64_t block_size, head_dim, begin, end;
} context;

/* Sum over the lanes of each of 16 vectors: lane i of the result is the sum of rows[i]. Each round adds the two halves
   of pairs of vectors side by side. */
INLINE vfloat sum_each(vfloat *rows) {
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

INLINE void prefetch_rows(const void *base, int64_t elements, int bf16) {
    const char *byte = base;
    for (size_t i = 0; i < elements * element_size(bf16); i += 64) __builtin_prefetch(byte + i);
}

/* scores[g * stride + i] = query[g] . key[begin + i], for the keys of one page from `first` to `last`.
   query: [group, vectors * LANES], zero padded. Writes up to 15 floats too many, which the next page overwrites. */
INLINE void score_page(const float *query, const void *page, int64_t first, int64_t last, float *scores,
                       int64_t stride, int64_t dim, int vectors, int group, int bf16) {
    for (int64_t key = first; key < last; key += LANES, scores += LANES) {
        vfloat parts[MAX_GROUP][LANES];
        const int64_t count = last - key < LANES ? last - key : LANES;
        for (int64_t j = 0; j < count; j++) {
            const void *row = at(page, (key + j) * dim, bf16);
            vfloat sum[MAX_GROUP] = {{0}};
            for (int d = 0; d < vectors; d++) {
                vfloat k = load_some(row, d * LANES, dim, bf16);
                for (int g = 0; g < group; g++) sum[g] += k * load(query, (g * vectors + d) * LANES, 0);
            }
            for (int g = 0; g < group; g++) parts[g][j] = sum[g];
        }
        for (int64_t j = count; j < LANES; j++)
            for (int g = 0; g < group; g++) parts[g][j] = splat(0);
        for (int g = 0; g < group; g++) store(scores, g * stride, sum_each(parts[g]), 0);
    }
}

INLINE const void *page_of(const void *base, const context *c, int64_t position, int bf16) {
    return at(base, c->table[position / c->block_size] * c->block_stride, bf16);
}

INLINE void score_keys(const context *c, const float *query, float *scores, int64_t stride, int vectors, int group,
                       int bf16) {
    int64_t position = c->begin;
    while (position < c->end) {
        const int64_t first = position % c->block_size;
        int64_t last = first + c->end - position;
        if (last > c->block_size) last = c->block_size;
        const int64_t next = position - first + c->block_size;
        const void *page = page_of(c->keys, c, position, bf16);
        if (next < c->end) prefetch_rows(page_of(c->keys, c, next, bf16), c->block_size * c->head_dim, bf16);
        prefetch_rows(page_of(c->values, c, position, bf16), c->block_size * c->head_dim, bf16);
        score_page(query, page, first, last, scores + position - c->begin, stride, c->head_dim, vectors, group, bf16);
        position += last - first;
    }
}

/* In place: exp(score - max); returns the sum. `scores` has room for a whole last vector. */
INLINE float softmax(float *scores, int64_t count) {
    float largest = scores[0];
    for (int64_t i = 1; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = count; i % LANES; i++) scores[i] = -INFINITY;
    vfloat total = splat(0);
    for (int64_t i = 0; i < count; i += LANES) {
        vfloat e = exp_lanes(load(scores, i, 0) - largest);
        store(scores, i, e, 0);
        total += e;
    }
    return sum_lanes(total);
}

/* out[g, offset ...] = sum over keys of weight[g][key] * value[key, offset ...], over `vectors` <= SLICE vectors. */
INLINE void weigh_slice(const context *c, const float *weights, int64_t stride, const float *scale, void *out,
                        int64_t offset, int vectors, int group, int bf16) {
    vfloat sum[MAX_GROUP][SLICE] = {{{0}}};
    const int64_t dim = c->head_dim;
    int64_t position = c->begin;
    while (position < c->end) {
        const int64_t first = position % c->block_size;
        int64_t last = first + c->end - position;
        if (last > c->block_size) last = c->block_size;
        const void *page = page_of(c->values, c, position, bf16);
        const float *weight = weights + position - c->begin;
        for (int64_t key = first; key < last; key++, weight++) {
            for (int d = 0; d < vectors; d++) {
                vfloat v = load_some(at(page, key * dim, bf16), offset + d * LANES, dim, bf16);
                for (int g = 0; g < group; g++) sum[g][d] += v * weight[g * stride];
            }
        }
        position += last - first;
    }
    for (int g = 0; g < group; g++)
        for (int d = 0; d < vectors; d++)
            store_some(at_mut(out, g * dim, bf16), offset + d * LANES, dim, sum[g][d] * scale[g], bf16);
}

INLINE void attend_group(const context *c, const void *q, void *out, float scale, float *scratch, int vectors,
                         int group, int bf16) {
    const int64_t dim = c->head_dim, count = c->end - c->begin, stride = count + 2 * LANES;
    float *query = scratch, *scores = scratch + group * vectors * LANES, inverse[MAX_GROUP];
    for (int g = 0; g < group; g++)
        for (int d = 0; d < vectors; d++)
            store(query, (g * vectors + d) * LANES, load_some(at(q, g * dim, bf16), d * LANES, dim, bf16) * scale, 0);
    /* Small fixed widths are worth their own code; anything else takes the general loop. */
    if (dim == 64)
        score_keys(c, query, scores, stride, 4, group, bf16);
    else if (dim == 128)
        score_keys(c, query, scores, stride, 8, group, bf16);
    else
        score_keys(c, query, scores, stride, vectors, group, bf16);
    for (int g = 0; g < group; g++) inverse[g] = 1.0f / softmax(scores + g * stride, count);
    for (int d = 0; d < vectors; d += SLICE) {
        if (vectors - d >= SLICE && dim % LANES == 0)
            weigh_slice(c, scores, stride, inverse, out, d * LANES, SLICE, group, bf16);
        else
            weigh_slice(c, scores, stride, inverse, out, d * LANES, vectors - d < SLICE ? vectors - d : SLICE, group,
                        bf16);
    }
}

#define VARIANT(GROUP, BF16)                                                                                      \
    static __attribute__((noinline)) void attend_##GROUP##_##BF16(const context *c, const void *q, void *out,     \
                                                                  float scale, float *scratch, int vectors) {     \
        attend_group(c, q, out, scale, scratch, vectors, GROUP, BF16);                                            \
    }
VARIANT(1, 0) VARIANT(2, 0) VARIANT(3, 0) VARIANT(4, 0)
VARIANT(1, 1) VARIANT(2, 1) VARIANT(3, 1) VARIANT(4, 1)

typedef void (*variant)(const context *, const void *, void *, float, float *, int);
static const variant variants[2][MAX_GROUP] = {{attend_1_0, attend_2_0, attend_3_0, attend_4_0},
                                               {attend_1_1, attend_2_1, attend_3_1, attend_4_1}};

/* q: [rows, q_heads, head_dim], rows `q_stride` elements apart. k_cache, v_cache: [blocks, kv_heads, block_size,
   head_dim]. table: [rows, pages]. lengths: [rows], with the query's own token. window 0: no window.
   out: [rows, q_heads, head_dim]. Returns 0, or -1 when there is no memory for the scores. */
EXPORT int treadle_decode_attention(const void *q, int64_t q_stride, const void *k_cache, const void *v_cache,
                                    const int32_t *table, int64_t pages, const int32_t *lengths, void *out,
                                    int64_t rows, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                                    int64_t block_size, float scale, int64_t window, int bf16) {
    const int vectors = (int)((head_dim + LANES - 1) / LANES);
    const int64_t group = q_heads / kv_heads;
    int64_t longest = 0;
    for (int64_t row = 0; row < rows; row++) longest = lengths[row] > longest ? lengths[row] : longest;
    float *scratch = malloc(MAX_GROUP * (vectors * LANES + longest + 2 * LANES) * sizeof(float));
    if (!scratch) return -1;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t length = lengths[row];
        for (int64_t head = 0; head < kv_heads; head++) {
            const size_t plane = head * block_size * head_dim;
            const context c = {at(k_cache, plane, bf16), at(v_cache, plane, bf16), table + row * pages,
                               kv_heads * block_size * head_dim, block_size, head_dim,
                               window && length > window ? length - window : 0, length};
            for (int64_t g = 0; g < group; g += MAX_GROUP) {
                const int64_t some = group - g < MAX_GROUP ? group - g : MAX_GROUP, first = head * group + g;
                variants[bf16 != 0][some - 1](&c, at(q, row * q_stride + first * head_dim, bf16),
                                              at_mut(out, (row * q_heads + first) * head_dim, bf16), scale, scratch,
                                              vectors);
            }
        }
    }
    free(scratch);
    return 0;
}

/* The small operations between the matrix products: normalisation, rotary embedding with the cache write, SwiGLU. */
#include "common.h"

INLINE float inverse_rms(const void *x, size_t n, float eps, int bf16) {
    vfloat squares = splat(0);
    for (size_t i = 0; i < n; i += LANES) {
        vfloat v = load_some(x, i, n, bf16);
        squares += v * v;
    }
    return 1.0f / sqrtf(sum_lanes(squares) / (float)n + eps);
}

/* The normalised value is rounded to the element type before the weight multiplies it, as transformers does. */
INLINE vfloat rounded(vfloat x, int bf16) { return bf16 ? widen(narrow(x)) : x; }

INLINE void scale_row(const void *x, const void *weight, void *out, size_t n, float inverse, int bf16) {
    for (size_t i = 0; i < n; i += LANES) {
        vfloat normal = rounded(load_some(x, i, n, bf16) * inverse, bf16);
        store_some(out, i, n, normal * load_some(weight, i, n, bf16), bf16);
    }
}

INLINE void norm_rows(const void *x, void *residual, const void *weight, void *out, int64_t rows, int64_t n, float eps,
                      int bf16) {
    for (int64_t row = 0; row < rows; row++) {
        const void *source = at(x, row * n, bf16);
        if (residual) {
            void *sum = at_mut(residual, row * n, bf16);
            for (int64_t i = 0; i < n; i += LANES)
                store_some(sum, i, n, load_some(sum, i, n, bf16) + load_some(source, i, n, bf16), bf16);
            source = sum;
        }
        scale_row(source, weight, at_mut(out, row * n, bf16), n, inverse_rms(source, n, eps, bf16), bf16);
    }
}

/* out = norm(x) * weight; with a residual: residual += x first, and its norm is taken. All [rows, n], weight [n]. */
EXPORT void treadle_rms_norm(const void *x, void *residual, const void *weight, void *out, int64_t rows, int64_t n,
                             float eps, int bf16) {
    if (bf16)
        norm_rows(x, residual, weight, out, rows, n, eps, 1);
    else
        norm_rows(x, residual, weight, out, rows, n, eps, 0);
}

INLINE void silu_rows(const void *gate_up, void *out, int64_t rows, int64_t n, int bf16) {
    for (int64_t row = 0; row < rows; row++) {
        const void *gate = at(gate_up, row * 2 * n, bf16);
        const void *up = at(gate_up, row * 2 * n + n, bf16);
        void *target = at_mut(out, row * n, bf16);
        for (int64_t i = 0; i < n; i += LANES) {
            vfloat g = load_some(gate, i, n, bf16);
            vfloat activated = g / (1.0f + exp_lanes(-g));
            store_some(target, i, n, activated * load_some(up, i, n, bf16), bf16);
        }
    }
}

/* out [rows, n] = silu(gate) * up, from gate_up [rows, 2n]. */
EXPORT void treadle_silu_mul(const void *gate_up, void *out, int64_t rows, int64_t n, int bf16) {
    if (bf16)
        silu_rows(gate_up, out, rows, n, 1);
    else
        silu_rows(gate_up, out, rows, n, 0);
}

/* Rotates one head in place: the first half pairs with the second (Su et al. 2021, in the layout of GPT-NeoX). */
INLINE void rotate_head(void *head, const float *cos, const float *sin, size_t half, int bf16) {
    for (size_t i = 0; i < half; i += LANES) {
        vfloat c = load_some(cos, i, half, 0), s = load_some(sin, i, half, 0);
        vfloat a = load_some(head, i, half, bf16), b = load_some(head, half + i, 2 * half, bf16);
        store_some(head, i, half, a * c - b * s, bf16);
        store_some(head, half + i, 2 * half, b * c + a * s, bf16);
    }
}

typedef struct {
    void *qkv;              /* [tokens, (q_heads + 2 kv_heads) * head_dim]; queries and keys are rotated in place */
    void *k_cache, *v_cache; /* [blocks, kv_heads, block_size, head_dim] */
    const float *cos, *sin; /* [positions, head_dim / 2] */
    const int64_t *positions, *slots;
    const void *q_norm, *k_norm; /* [head_dim] or null */
    int64_t tokens, q_heads, kv_heads, head_dim, block_size;
    float eps;
} rope_arguments;

INLINE void rope_tokens(const rope_arguments *a, int bf16) {
    const int64_t dim = a->head_dim, half = dim / 2;
    const int64_t width = (a->q_heads + 2 * a->kv_heads) * dim;
    for (int64_t t = 0; t < a->tokens; t++) {
        void *row = at_mut(a->qkv, t * width, bf16);
        const float *cos = a->cos + a->positions[t] * half, *sin = a->sin + a->positions[t] * half;
        for (int64_t h = 0; h < a->q_heads + a->kv_heads; h++) {
            void *head = at_mut(row, h * dim, bf16);
            const void *norm = h < a->q_heads ? a->q_norm : a->k_norm;
            if (norm) scale_row(head, norm, head, dim, inverse_rms(head, dim, a->eps, bf16), bf16);
            rotate_head(head, cos, sin, half, bf16);
        }
        const int64_t block = a->slots[t] / a->block_size, offset = a->slots[t] % a->block_size;
        const size_t bytes = dim * element_size(bf16);
        for (int64_t h = 0; h < a->kv_heads; h++) {
            const size_t target = ((block * a->kv_heads + h) * a->block_size + offset) * dim;
            memcpy(at_mut(a->k_cache, target, bf16), at(row, (a->q_heads + h) * dim, bf16), bytes);
            memcpy(at_mut(a->v_cache, target, bf16), at(row, (a->q_heads + a->kv_heads + h) * dim, bf16), bytes);
        }
    }
}

EXPORT void treadle_rope_store(void *qkv, void *k_cache, void *v_cache, const float *cos, const float *sin,
                               const int64_t *positions, const int64_t *slots, const void *q_norm, const void *k_norm,
                               float eps, int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                               int64_t block_size, int bf16) {
    const rope_arguments a = {qkv,    k_cache, v_cache, cos,     sin,      positions, slots,     q_norm,
                              k_norm, tokens,  q_heads, kv_heads, head_dim, block_size, eps};
    if (bf16)
        rope_tokens(&a, 1);
    else
        rope_tokens(&a, 0);
}

/* What the products of bfloat16 matrices share: panels of outputs, the arguments, how sums begin and where they go. */
#ifndef TREADLE_LINEAR_H
#define TREADLE_LINEAR_H

#include "common.h"

enum { PANEL = 32 };
enum { OUT_BF16 = 0, OUT_FLOAT = 1, OUT_GATED = 2 };

/* The row of W [n, k] that is output `column` of the panel that begins at `first`, or -1 where there is none. gated:
   the first half of W are gates, the second half the values they gate (n is even), and each panel holds 16 gates and
   the 16 values that belong to them. */
INLINE int64_t row_of(int64_t first, int64_t column, int64_t n, int gated) {
    if (!gated) return first + column < n ? first + column : -1;
    const int64_t half = n / 2, gate = first / 2 + column % LANES;
    if (gate >= half) return -1;
    return column < LANES ? gate : gate + half;
}

#ifdef __AVX512BF16__

typedef struct {
    const uint16_t *x; /* [rows, k] with rows x_stride apart */
    const uint16_t *bias; /* [n] or null */
    void *y; /* [rows, n], or [rows, n / 2] where gated */
    int64_t rows, n, k, x_stride;
    int out;
} linear_arguments;

INLINE __m512 pairs(const uint16_t *x) {
    int32_t both;
    memcpy(&both, x, sizeof both);
    return (__m512)_mm512_set1_epi32(both);
}

INLINE vfloat bias_at(const linear_arguments *a, int64_t column) {
    if (!a->bias || column >= a->n) return splat(0);
    return load_some(a->bias, column, a->n, 1);
}

/* What the sums of the two halves of a panel begin with. */
INLINE void begin(const linear_arguments *a, int64_t column, vfloat *low, vfloat *high) {
    const int gated = a->out == OUT_GATED;
    *low = bias_at(a, gated ? column / 2 : column);
    *high = bias_at(a, gated ? a->n / 2 + column / 2 : column + LANES);
}

INLINE void put(const linear_arguments *a, int64_t row, int64_t column, vfloat low, vfloat high) {
    if (a->out == OUT_GATED) {
        const int64_t width = a->n / 2;
        const vfloat gate = widen(narrow(low)), value = widen(narrow(high));
        const vfloat activated = gate / (1.0f + exp_lanes(-gate));
        store_some(a->y, row * width + column / 2, (row + 1) * width, activated * value, 1);
        return;
    }
    const int bf16 = a->out == OUT_BF16;
    const int64_t at = row * a->n + column, end = (row + 1) * a->n;
    if (at < end) store_some(a->y, at, end, low, bf16);
    if (at + LANES < end) store_some(a->y, at + LANES, end, high, bf16);
}

#endif
#endif

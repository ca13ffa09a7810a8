/* Products of bfloat16 matrices, y = x W^T, on processors whose vectors multiply pairs of bfloat16 (AVX512-BF16).

   A decode step multiplies few rows with all the weights, so weights should stream from memory while the processor
   computes. They are stored in panels of 32 outputs: for each pair of inputs 2 x 16 outputs x 2 elements, two cache
   lines, in the order in which they are read. While a panel is multiplied the next is fetched, so the cost is the
   larger of the two and not their sum. A tile of 12 rows and one panel is accumulated in 24 registers (the scheme of
   Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication", with B laid out once). */
#include "common.h"

enum { PANEL = 32, TILE_ROWS = 12, CHUNK_ROWS = 96 };
enum { OUT_BF16 = 0, OUT_FLOAT = 1, OUT_GATED = 2 };

/* Elements of the packed form of W [n, k]; 0 where this machine or this k cannot use it, or where oneDNN has tile
   registers (AMX) to use. */
EXPORT int64_t treadle_linear_elements(int64_t n, int64_t k) {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
    return k % 2 == 0 && n > 0 && k > 0 ? (n + PANEL - 1) / PANEL * PANEL * k : 0;
#else
    (void)n, (void)k;
    return 0;
#endif
}

/* W [n, k], rows of bfloat16, to panels; outputs past n are zero. gated: the first half of W are gates, the second
   half the values they gate (n is even), and each panel holds 16 gates and the 16 values that belong to them. */
EXPORT void treadle_linear_pack(const uint16_t *w, uint16_t *packed, int64_t n, int64_t k, int gated) {
    for (int64_t first = 0; first < n; first += PANEL) {
        for (int64_t column = 0; column < PANEL; column++) {
            int64_t row = first + column, limit = n;
            if (gated) {
                limit = column < LANES ? n / 2 : n;
                row = first / 2 + column % LANES + (column < LANES ? 0 : n / 2);
            }
            uint16_t *to = packed + first * k + column * 2;
            for (int64_t i = 0; i < k; i += 2, to += 2 * PANEL) {
                to[0] = row < limit ? w[row * k + i] : 0;
                to[1] = row < limit ? w[row * k + i + 1] : 0;
            }
        }
    }
}

#ifdef __AVX512BF16__

typedef struct {
    const uint16_t *x; /* [rows, k] with rows x_stride apart */
    const uint16_t *packed, *bias; /* bias [n] or null */
    void *y; /* [rows, n], or [rows, n / 2] where gated */
    int64_t rows, n, k, x_stride;
    int out;
} linear_arguments;

INLINE __m512 pairs(const uint16_t *x) {
    int32_t both;
    memcpy(&both, x, sizeof both);
    return (__m512)_mm512_set1_epi32(both);
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

INLINE vfloat bias_at(const linear_arguments *a, int64_t column) {
    if (!a->bias || column >= a->n) return splat(0);
    return load_some(a->bias, column, a->n, 1);
}

/* `rows` (a constant) rows of x with one panel. ahead: what to fetch meanwhile, as long as a panel, or null. */
INLINE void tile(const linear_arguments *a, int64_t row, int64_t column, const int rows, const char *ahead) {
    const uint16_t *x = a->x + row * a->x_stride, *panel = a->packed + column * a->k;
    const int64_t stride = a->x_stride;
    __m512 low[TILE_ROWS], high[TILE_ROWS];
    int64_t second = a->out == OUT_GATED ? a->n / 2 + column / 2 : column + LANES;
    int64_t first = a->out == OUT_GATED ? column / 2 : column;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        low[r] = (__m512)bias_at(a, first);
        high[r] = (__m512)bias_at(a, second);
    }
    for (int64_t i = 0; i < a->k; i += 2, panel += 2 * PANEL) {
        const __m512bh w_low = (__m512bh)_mm512_loadu_si512(panel);
        const __m512bh w_high = (__m512bh)_mm512_loadu_si512(panel + PANEL);
        if (ahead) {
            _mm_prefetch(ahead, _MM_HINT_T1);
            _mm_prefetch(ahead + 64, _MM_HINT_T1);
            ahead += 128;
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const __m512bh both = (__m512bh)pairs(x + r * stride + i);
            low[r] = _mm512_dpbf16_ps(low[r], both, w_low);
            high[r] = _mm512_dpbf16_ps(high[r], both, w_high);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) put(a, row + r, column, (vfloat)low[r], (vfloat)high[r]);
}

#define TILE(count) \
    case count: tile(a, row, column, count, ahead); break
static void any_tile(const linear_arguments *a, int64_t row, int64_t column, int64_t rows, const char *ahead) {
    switch (rows) {
        TILE(1);
        TILE(2);
        TILE(3);
        TILE(4);
        TILE(5);
        TILE(6);
        TILE(7);
        TILE(8);
        TILE(9);
        TILE(10);
        TILE(11);
        TILE(12);
    }
}

static void multiply(const linear_arguments *a) {
    for (int64_t chunk = 0; chunk < a->rows; chunk += CHUNK_ROWS) {
        const int64_t stop = chunk + CHUNK_ROWS < a->rows ? chunk + CHUNK_ROWS : a->rows;
        for (int64_t column = 0; column < a->n; column += PANEL) {
            const int64_t next = column + PANEL < a->n ? column + PANEL : 0;
            const char *ahead = next ? (const char *)(a->packed + next * a->k) : NULL;
            for (int64_t row = chunk; row < stop; ahead = NULL) {
                const int64_t left = stop - row, tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
                const int64_t rows = (left + tiles - 1) / tiles;
                any_tile(a, row, column, rows, ahead);
                row += rows;
            }
        }
    }
}

#endif

/* y = x W^T + bias, W packed. out: 0 y is bfloat16; 1 y is float; 2 W was packed as gated, and y [rows, n / 2] is
   silu(gate) * value of the two halves, each rounded to bfloat16 first. */
EXPORT void treadle_linear(const uint16_t *x, int64_t x_stride, const uint16_t *packed, const uint16_t *bias, void *y,
                           int64_t rows, int64_t n, int64_t k, int out) {
#ifdef __AVX512BF16__
    const linear_arguments a = {x, packed, bias, y, rows, n, k, x_stride, out};
    multiply(&a);
#else
    (void)x, (void)x_stride, (void)packed, (void)bias, (void)y, (void)rows, (void)n, (void)k, (void)out;
#endif
}

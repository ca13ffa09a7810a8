/* Products of bfloat16 matrices, y = x W^T, on processors whose vectors multiply pairs of bfloat16 (AVX512-BF16).

   A decode step multiplies few rows with all the weights, so weights should stream from memory while the processor
   computes. They are stored in panels of 32 outputs: for each pair of inputs 2 x 16 outputs x 2 elements, two cache
   lines, in the order in which they are read. While a panel is multiplied the next is fetched, so the cost is the
   larger of the two and not their sum. A tile of 12 rows and one panel is accumulated in 24 registers (the scheme of
   Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication", with B laid out once). */
#include "linear.h"

enum { TILE_ROWS = 12, CHUNK_ROWS = 96 };

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

/* W [n, k], rows of bfloat16 and k even, to panels; outputs past n are zero. gated: see row_of. */
EXPORT void treadle_linear_pack(const uint16_t *w, uint16_t *packed, int64_t n, int64_t k, int gated) {
    enum { PIECE = 32 }; /* inputs at a time: a cache line of every row, and a piece of the panel that stays near */
    for (int64_t first = 0; first < n; first += PANEL) {
        for (int64_t start = 0; start < k; start += PIECE) {
            const int64_t count = k - start < PIECE ? (k - start) / 2 : PIECE / 2;
            for (int64_t column = 0; column < PANEL; column++) {
                const int64_t row = row_of(first, column, n, gated);
                uint16_t *to = packed + first * k + start * PANEL + column * 2;
                for (int64_t i = 0; i < count; i++) {
                    if (row < 0)
                        memset(to + i * 2 * PANEL, 0, 4);
                    else
                        memcpy(to + i * 2 * PANEL, w + row * k + start + i * 2, 4);
                }
            }
        }
    }
}

#ifdef __AVX512BF16__

/* `rows` (a constant) rows of x with one panel. ahead: what to fetch meanwhile, as long as a panel, or null. */
INLINE void tile(const linear_arguments *a, const uint16_t *panel, int64_t row, int64_t column, const int rows,
                 const char *ahead) {
    const uint16_t *x = a->x + row * a->x_stride;
    const int64_t stride = a->x_stride;
    __m512 low[TILE_ROWS], high[TILE_ROWS];
    vfloat first, second;
    begin(a, column, &first, &second);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        low[r] = (__m512)first;
        high[r] = (__m512)second;
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
    case count: tile(a, panel, row, column, count, ahead); break
static void any_tile(const linear_arguments *a, const uint16_t *panel, int64_t row, int64_t column, int64_t rows,
                     const char *ahead) {
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

static void multiply(const linear_arguments *a, const uint16_t *packed) {
    for (int64_t chunk = 0; chunk < a->rows; chunk += CHUNK_ROWS) {
        const int64_t stop = chunk + CHUNK_ROWS < a->rows ? chunk + CHUNK_ROWS : a->rows;
        for (int64_t column = 0; column < a->n; column += PANEL) {
            const int64_t next = column + PANEL < a->n ? column + PANEL : 0;
            const char *ahead = next ? (const char *)(packed + next * a->k) : NULL;
            for (int64_t row = chunk; row < stop; ahead = NULL) {
                const int64_t left = stop - row, tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
                const int64_t rows = (left + tiles - 1) / tiles;
                any_tile(a, packed + column * a->k, row, column, rows, ahead);
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
    const linear_arguments a = {x, bias, y, rows, n, k, x_stride, out};
    multiply(&a, packed);
#else
    (void)x, (void)x_stride, (void)packed, (void)bias, (void)y, (void)rows, (void)n, (void)k, (void)out;
#endif
}

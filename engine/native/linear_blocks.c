/* The same products for few rows, from weights as a GGUF file stores them: 4 or 8 bits each, in blocks of 32 inputs.

   A decode step costs what its weights take to arrive, and these take a quarter or half of what bfloat16 ones do. They
   become bfloat16 in registers, to the bit as `weights/dequantize.py` makes them (float32, then one rounding), and are
   added up in the order of `linear.c`, so the results are the same to the bit. The work of it is done once per tile:
   with many rows, bfloat16 panels are faster.

   Panels of 32 outputs again, each a sequence of groups of 32 inputs. A group: 32 float16 scales; for Q4_1 32 float16
   offsets; the numbers. A vector of numbers holds 8 outputs x 2 inputs, because two such vectors, narrowed and
   concatenated, are a vector of pairs. 4 bits: a 32-bit lane of 64 bytes holds its numbers of the 8 vectors of two
   pairs of inputs, lowest first. 8 bits: the 4 vectors of each pair of inputs, one after the other. */
#include "linear.h"

enum { GROUP = 32, FEW_ROWS = 6 }; /* with more, bfloat16 panels are as fast: measured */
enum { Q4_0 = 0, Q4_1 = 1, Q8_0 = 2 };
enum { SCALES = PANEL * 2 }; /* bytes of a group's scales, and of its offsets */
enum { AHEAD = 8192 }; /* bytes fetched ahead: longer than memory takes to answer, and no burden on the first cache */

INLINE int64_t numbers_at(int form) { return form == Q4_1 ? 2 * SCALES : SCALES; }

INLINE int64_t group_size(int form) { return numbers_at(form) + PANEL * GROUP / (form == Q8_0 ? 1 : 2); }

INLINE int64_t panel_size(int64_t k, int form) { return k / GROUP * group_size(form); }

INLINE int64_t stored_size(int form) { return form == Q8_0 ? 34 : form == Q4_1 ? 20 : 18; }

/* Bytes of the packed form of W [n, k]; 0 where there is none. form: 0 Q4_0, 1 Q4_1, 2 Q8_0. */
EXPORT int64_t treadle_blocks_bytes(int64_t n, int64_t k, int form) {
#ifdef __AVX512BF16__
    return k % GROUP == 0 && n > 0 && k > 0 ? (n + PANEL - 1) / PANEL * panel_size(k, form) : 0;
#else
    (void)n, (void)k, (void)form;
    return 0;
#endif
}

/* The numbers of one stored block, 16 bytes of 4 bits (the low halves first), into its lanes of a group. */
INLINE void pack_nibbles(const uint8_t *from, int64_t column, uint8_t *group) {
    uint8_t q[GROUP];
    for (int i = 0; i < GROUP / 2; i++) {
        q[i] = from[i] & 15;
        q[i + GROUP / 2] = from[i] >> 4;
    }
    /* Byte b of a lane holds the numbers of vectors 2b and 2b + 1. */
    const int64_t vector = column / 8, byte = vector / 2, shift = vector % 2 * 4;
    uint8_t *to = group + column % 8 * 8 + byte;
    for (int i = 0; i < GROUP; i += 4, to += 64) {
        to[0] |= (uint8_t)(q[i] << shift);
        to[4] |= (uint8_t)(q[i + 1] << shift);
        to[2] |= (uint8_t)(q[i + 2] << shift);
        to[6] |= (uint8_t)(q[i + 3] << shift);
    }
}

INLINE void pack_bytes(const uint8_t *from, int64_t column, uint8_t *group) {
    for (int i = 0; i < GROUP; i += 2) memcpy(group + i * PANEL + column * 2, from + i, 2);
}

/* Rows of stored blocks, [n, k / 32] blocks, to groups; outputs past n are zero. gated: see row_of. */
EXPORT void treadle_blocks_pack(const uint8_t *stored, uint8_t *packed, int64_t n, int64_t k, int form, int gated) {
    const int64_t groups = k / GROUP, size = stored_size(form), numbers = numbers_at(form);
    for (int64_t first = 0; first < n; first += PANEL) {
        for (int64_t g = 0; g < groups; g++, packed += group_size(form)) {
            memset(packed, 0, group_size(form));
            for (int64_t column = 0; column < PANEL; column++) {
                const int64_t row = row_of(first, column, n, gated);
                if (row < 0) continue;
                const uint8_t *block = stored + (row * groups + g) * size;
                memcpy(packed + column * 2, block, 2);
                if (form == Q4_1) memcpy(packed + SCALES + column * 2, block + 2, 2);
                if (form == Q8_0)
                    pack_bytes(block + 2, column, packed + numbers);
                else
                    pack_nibbles(block + size - GROUP / 2, column, packed + numbers);
            }
        }
    }
}

#ifdef __AVX512BF16__

typedef struct {
    __m512 scale[4], offset[4]; /* of 8 outputs each, every one twice */
} group_scales;

INLINE void spread(const uint8_t *halves, __m512 to[4]) {
    const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i second = _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
    for (int i = 0; i < 2; i++) {
        const __m512 sixteen = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves + i));
        to[2 * i] = _mm512_permutexvar_ps(first, sixteen);
        to[2 * i + 1] = _mm512_permutexvar_ps(second, sixteen);
    }
}

INLINE group_scales scales_of(const uint8_t *group, const int form) {
    group_scales s;
    spread(group, s.scale);
    if (form == Q4_1) spread(group + SCALES, s.offset);
    return s;
}

/* Vector `index` of a pair of inputs as numbers. odd: the second of the two pairs that share 64 bytes of 4 bits. */
INLINE __m512 numbers_of(const uint8_t *numbers, const int form, const int odd, const int index) {
    if (form == Q8_0) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(numbers + odd * 64) + index);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    const float z = form == Q4_0 ? 8 : 0;
    const __m512 values = _mm512_setr_ps(0 - z, 1 - z, 2 - z, 3 - z, 4 - z, 5 - z, 6 - z, 7 - z, 8 - z, 9 - z, 10 - z,
                                         11 - z, 12 - z, 13 - z, 14 - z, 15 - z);
    /* A permutation looks at the lowest 4 bits alone, so what is above them need not be cleared. */
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(numbers), 4 * (4 * odd + index)), values);
}

/* The weights of a pair of inputs. A scale (11 bits) times a number (8) is exact, so the fused sum is rounded as a
   product and a sum would be; and nothing here is so small that the narrowing would flush it. */
INLINE void weights_of(const uint8_t *numbers, const group_scales *s, const int form, const int odd, __m512bh *low,
                       __m512bh *high) {
    __m512 w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 q = numbers_of(numbers, form, odd, i);
        w[i] = form == Q4_1 ? _mm512_fmadd_ps(q, s->scale[i], s->offset[i]) : _mm512_mul_ps(q, s->scale[i]);
    }
    *low = _mm512_cvtne2ps_pbh(w[1], w[0]);
    *high = _mm512_cvtne2ps_pbh(w[3], w[2]);
}

INLINE void fetch(const uint8_t *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(from + AHEAD + i, _MM_HINT_T0);
}

/* Not part of each tile: so many copies would take the compiler long. */
static __attribute__((noinline)) void finish(const linear_arguments *a, int64_t row, int64_t column, vfloat low,
                                             vfloat high) {
    put(a, row, column, low, high);
}

/* All rows of x, `rows` (a constant), with one panel. What is fetched ahead are mostly the panels that follow. */
INLINE void block_tile(const linear_arguments *a, const uint8_t *panel, const int form, int64_t column, const int rows) {
    const uint16_t *x = a->x;
    const int64_t stride = a->x_stride, step = form == Q8_0 ? 128 : 64;
    __m512 low[FEW_ROWS], high[FEW_ROWS];
    vfloat first, second;
    begin(a, column, &first, &second);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        low[r] = (__m512)first;
        high[r] = (__m512)second;
    }
    for (int64_t i = 0; i < a->k; i += GROUP) {
        const group_scales s = scales_of(panel, form);
        fetch(panel, numbers_at(form));
        panel += numbers_at(form);
        for (int64_t j = i; j < i + GROUP; j += 4, panel += step) {
            fetch(panel, step);
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                __m512bh w_low, w_high;
                weights_of(panel, &s, form, odd, &w_low, &w_high);
#pragma GCC unroll 6
                for (int r = 0; r < rows; r++) {
                    const __m512bh both = (__m512bh)pairs(x + r * stride + j + 2 * odd);
                    low[r] = _mm512_dpbf16_ps(low[r], both, w_low);
                    high[r] = _mm512_dpbf16_ps(high[r], both, w_high);
                }
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) finish(a, r, column, (vfloat)low[r], (vfloat)high[r]);
}

/* A panel of blocks to one of bfloat16, [k / 2, 32, 2]. */
INLINE void unpack_panel(const uint8_t *panel, uint16_t *to, const int form, int64_t k) {
    for (int64_t i = 0; i < k; i += GROUP) {
        const group_scales s = scales_of(panel, form);
        panel += numbers_at(form);
        for (int j = 0; j < GROUP; j += 4, panel += form == Q8_0 ? 128 : 64) {
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++, to += 2 * PANEL) {
                __m512bh w_low, w_high;
                weights_of(panel, &s, form, odd, &w_low, &w_high);
                _mm512_storeu_si512(to, (__m512i)w_low);
                _mm512_storeu_si512(to + PANEL, (__m512i)w_high);
            }
        }
    }
}

#define TILE(count) \
    case count: block_tile(a, panel, form, column, count); break
INLINE void multiply(const linear_arguments *a, const uint8_t *panel, const int form) {
    const int64_t size = panel_size(a->k, form);
    for (int64_t column = 0; column < a->n; column += PANEL, panel += size) {
        switch (a->rows) {
            TILE(1);
            TILE(2);
            TILE(3);
            TILE(4);
            TILE(5);
            TILE(6);
        }
    }
}

#endif

/* The packed form to that of `linear.c`, as if the weights had been packed as bfloat16. */
EXPORT void treadle_blocks_unpack(const uint8_t *packed, uint16_t *panels, int64_t n, int64_t k, int form) {
#ifdef __AVX512BF16__
    for (int64_t column = 0; column < n; column += PANEL, packed += panel_size(k, form), panels += PANEL * k) {
        if (form == Q4_0) unpack_panel(packed, panels, Q4_0, k);
        if (form == Q4_1) unpack_panel(packed, panels, Q4_1, k);
        if (form == Q8_0) unpack_panel(packed, panels, Q8_0, k);
    }
#else
    (void)packed, (void)panels, (void)n, (void)k, (void)form;
#endif
}

/* The most rows that `treadle_blocks_linear` takes. */
EXPORT int treadle_blocks_rows(void) { return FEW_ROWS; }

/* What `treadle_linear` gives, from the packed blocks; rows <= treadle_blocks_rows(). */
EXPORT void treadle_blocks_linear(const uint16_t *x, int64_t x_stride, const uint8_t *packed, int form,
                                  const uint16_t *bias, void *y, int64_t rows, int64_t n, int64_t k, int out) {
#ifdef __AVX512BF16__
    const linear_arguments a = {x, bias, y, rows, n, k, x_stride, out};
    if (form == Q4_0) multiply(&a, packed, Q4_0);
    if (form == Q4_1) multiply(&a, packed, Q4_1);
    if (form == Q8_0) multiply(&a, packed, Q8_0);
#else
    (void)x, (void)x_stride, (void)packed, (void)form, (void)bias, (void)y, (void)rows, (void)n, (void)k, (void)out;
#endif
}

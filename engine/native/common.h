/* Sixteen lanes of float, loads and stores for the two element types, and exp.

   Elements are float32 or bfloat16 (the upper half of a float32); arithmetic is always float32. The flag `bf16` is a
   constant wherever it is passed on, so each kernel is compiled once per type. Vectors are the compiler's generic ones:
   a machine with shorter registers gets several instructions for one, and the same numbers. */
#ifndef TREADLE_COMMON_H
#define TREADLE_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef float vfloat __attribute__((vector_size(64)));
typedef int32_t vint __attribute__((vector_size(64)));
typedef uint32_t vuint __attribute__((vector_size(64)));
typedef uint16_t vhalf __attribute__((vector_size(32)));

INLINE vfloat splat(float x) { return (vfloat){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

/* lane-wise mask ? a : b, where a true lane is all ones */
INLINE vfloat choose(vint mask, vfloat a, vfloat b) { return (vfloat)((mask & (vint)a) | (~mask & (vint)b)); }

INLINE size_t element_size(int bf16) { return bf16 ? 2 : 4; }

INLINE const void *at(const void *base, size_t index, int bf16) {
    return (const char *)base + index * element_size(bf16);
}

INLINE void *at_mut(void *base, size_t index, int bf16) { return (char *)base + index * element_size(bf16); }

INLINE vfloat widen(vhalf half) {
#ifdef __AVX512F__ /* the generic form becomes twice the work */
    return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#else
    return (vfloat)(__builtin_convertvector(half, vuint) << 16);
#endif
}

/* round to nearest, ties to even; a NaN stays one */
INLINE vhalf narrow(vfloat x) {
#ifdef __AVX512BF16__
    return (vhalf)_mm512_cvtneps_pbh((__m512)x);
#else
    vuint bits = (vuint)x;
    vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vuint nan = (vuint)(x != x);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vhalf);
#endif
}

INLINE vfloat load(const void *base, size_t index, int bf16) {
    if (bf16) {
        vhalf half;
        memcpy(&half, (const uint16_t *)base + index, sizeof half);
        return widen(half);
    }
    vfloat value;
    memcpy(&value, (const float *)base + index, sizeof value);
    return value;
}

INLINE void store(void *base, size_t index, vfloat value, int bf16) {
    if (bf16) {
        vhalf half = narrow(value);
        memcpy((uint16_t *)base + index, &half, sizeof half);
    } else {
        memcpy((float *)base + index, &value, sizeof value);
    }
}

/* The last, incomplete vector of `count` < LANES elements; missing lanes are zero. */
INLINE vfloat load_part(const void *base, size_t index, size_t count, int bf16) {
    if (bf16) {
        vhalf half = {0};
        memcpy(&half, (const uint16_t *)base + index, count * 2);
        return widen(half);
    }
    vfloat value = {0};
    memcpy(&value, (const float *)base + index, count * 4);
    return value;
}

INLINE void store_part(void *base, size_t index, vfloat value, size_t count, int bf16) {
    if (bf16) {
        vhalf half = narrow(value);
        memcpy((uint16_t *)base + index, &half, count * 2);
    } else {
        memcpy((float *)base + index, &value, count * 4);
    }
}

INLINE vfloat load_some(const void *base, size_t index, size_t end, int bf16) {
    return index + LANES <= end ? load(base, index, bf16) : load_part(base, index, end - index, bf16);
}

INLINE void store_some(void *base, size_t index, size_t end, vfloat value, int bf16) {
    if (index + LANES <= end)
        store(base, index, value, bf16);
    else
        store_part(base, index, value, end - index, bf16);
}

/* Lane i meets lane i + 8, then i + 4, ...: lane 0 ends up with all. */
#define FOLD(x, combine)                                                                    \
    do {                                                                                    \
        const vint by8 = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};            \
        const vint by4 = {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11};            \
        const vint by2 = {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};            \
        const vint by1 = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};            \
        x = combine(x, __builtin_shuffle(x, by8));                                          \
        x = combine(x, __builtin_shuffle(x, by4));                                          \
        x = combine(x, __builtin_shuffle(x, by2));                                          \
        x = combine(x, __builtin_shuffle(x, by1));                                          \
    } while (0)

INLINE vfloat add_lanes(vfloat a, vfloat b) { return a + b; }

INLINE vfloat larger_lanes(vfloat a, vfloat b) { return choose(a > b, a, b); }

INLINE float sum_lanes(vfloat x) {
    FOLD(x, add_lanes);
    return x[0];
}

INLINE float largest_lane(vfloat x) {
    FOLD(x, larger_lanes);
    return x[0];
}

/* exp to within 2 units in the last place on [-87.3, 88]; arguments outside are clamped, NaN stays NaN.
   Reduction to |r| <= ln2/2 with a two-part ln2 (Cody and Waite), then the Taylor polynomial of degree 7. */
INLINE vfloat exp_lanes(vfloat x) {
    x = choose(x < -87.3f, splat(-87.3f), x);
    x = choose(x > 88.0f, splat(88.0f), x);
    const vfloat magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vfloat shifted = x * 1.44269504088896341f + magic;
    vfloat n = shifted - magic;
    vfloat r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vfloat p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vint power = (vint)shifted << 23; /* the low bits of `shifted` hold n */
    return (vfloat)((vint)p + power);
}

#endif

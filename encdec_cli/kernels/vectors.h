/* Vectors of LANES floats, and rows of float or bfloat16 (`bf16`), which are always computed with as float.
 *
 * Vectors are those of GCC and Clang, for any processor, and as wide as its registers: of wider ones compilers keep
 * what stands in memory.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define PAIR (2 * LANES)

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

#define INLINE static inline __attribute__((always_inline))
/* One function for both types; the compiler makes two of it. */
#define BY_TYPE(call, ...) (bf16 ? call(__VA_ARGS__, 1) : call(__VA_ARGS__, 0))

/* A vector of numbers of two, each from the place that `place(i, step)` tells, those of the second after the first's. */
#ifdef __clang__
#define MERGE(x, y, place, step) __builtin_shufflevector(x, y, EACH(place, step))
#else
#define MERGE(x, y, place, step) __builtin_shuffle(x, y, (ints){EACH(place, step)})
#endif
#define EIGHT(place, step, i) \
    place(i, step), place(i + 1, step), place(i + 2, step), place(i + 3, step), place(i + 4, step), \
        place(i + 5, step), place(i + 6, step), place(i + 7, step)
#if LANES == 16
#define EACH(place, step) EIGHT(place, step, 0), EIGHT(place, step, 8)
#else
#define EACH(place, step) EIGHT(place, step, 0)
#endif
#define SWAPPED_PLACE(i, step) ((i) ^ (step))
#define LOW_PLACE(i, step) ((i) & (step) ? ((i) ^ (step)) + LANES : (i))
#define HIGH_PLACE(i, step) ((i) & (step) ? (i) + LANES : (i) ^ (step))
#define EVERY_OTHER_PLACE(i, start) (2 * (i) + (start))
/* Neighbours `step` apart change places; and two vectors of which such neighbours become one, the lower or the higher. */
#define SWAPPED(x, step) MERGE(x, x, SWAPPED_PLACE, step)
#define LOW(x, y, step) MERGE(x, y, LOW_PLACE, step)
#define HIGH(x, y, step) MERGE(x, y, HIGH_PLACE, step)
#define EVERY_OTHER(x, y, start) MERGE(x, y, EVERY_OTHER_PLACE, start)

/* PAIR numbers: of bfloat16 those at even places and those at odd places, else the first and the last half. */
typedef struct {
    floats a, b;
} pair;

INLINE pair add(pair x, pair y) { return (pair){x.a + y.a, x.b + y.b}; }

INLINE const void *at(const void *from, int64_t place, int bf16) {
    return (const char *)from + place * (bf16 ? 2 : 4);
}

INLINE pair read_pair(const void *from, int64_t place, int bf16) {
    pair x;
    if (bf16) {
        words both;
        memcpy(&both, at(from, place, bf16), sizeof both);
        x.a = (floats)(both << 16);
        x.b = (floats)(both & 0xffff0000u);
    } else {
        memcpy(&x.a, at(from, place, bf16), sizeof x.a);
        memcpy(&x.b, at(from, place + LANES, bf16), sizeof x.b);
    }
    return x;
}

INLINE void write_pair(void *to, int64_t place, pair x, int bf16) {
    void *target = (void *)at(to, place, bf16);
    if (bf16) { /* rounded to nearest, ties to even */
        words a = (words)x.a, b = (words)x.b;
        a += 0x7fff + ((a >> 16) & 1);
        b += 0x7fff + ((b >> 16) & 1);
        words both = (a >> 16) | (b & 0xffff0000u);
        memcpy(target, &both, sizeof both);
    } else {
        memcpy(target, &x, sizeof x);
    }
}

INLINE float read_one(const void *from, int64_t place, int bf16) {
    float x;
    if (bf16) {
        uint32_t word = (uint32_t)((const uint16_t *)from)[place] << 16;
        memcpy(&x, &word, sizeof x);
    } else {
        x = ((const float *)from)[place];
    }
    return x;
}

INLINE void write_one(void *to, int64_t place, float x, int bf16) {
    uint32_t word;
    memcpy(&word, &x, sizeof x);
    if (bf16)
        ((uint16_t *)to)[place] = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    else
        ((float *)to)[place] = x;
}

INLINE floats all(float x) { return x - (floats){0}; }

INLINE floats larger(floats x, floats y) {
    ints first = x > y;
    return (floats)(((ints)x & first) | ((ints)y & ~first));
}

INLINE float sum_of(floats x) {
    if (LANES == 16) x += SWAPPED(x, 8);
    x += SWAPPED(x, 4);
    return (x[0] + x[2]) + (x[1] + x[3]);
}

#define FOURTH_PLACE(i, _) ((i) % 2 * (LANES / 2) + (i) / 2 % 2 * (LANES / 4))

/* To `sums` the sum of each of four vectors, added up in the order of `sum_of`. */
INLINE void four_sums(const floats *x, float *sums) {
    floats first = LOW(x[0], x[1], LANES / 2) + HIGH(x[0], x[1], LANES / 2);
    floats last = LOW(x[2], x[3], LANES / 2) + HIGH(x[2], x[3], LANES / 2);
    floats y = LOW(first, last, LANES / 4) + HIGH(first, last, LANES / 4);
    if (LANES == 16) y += SWAPPED(y, 2);
    y += SWAPPED(y, 1);
    y = MERGE(y, y, FOURTH_PLACE, 0);
    memcpy(sums, &y, 4 * sizeof *sums);
}

INLINE ints higher(ints x, ints y) {
    ints first = x > y;
    return (x & first) | (y & ~first);
}

INLINE int32_t highest_of(ints x) {
    if (LANES == 16) x = higher(x, SWAPPED(x, 8));
    x = higher(x, SWAPPED(x, 4));
    int32_t first = x[0] > x[1] ? x[0] : x[1], second = x[2] > x[3] ? x[2] : x[3];
    return first > second ? first : second;
}

INLINE float largest_of(floats x) {
    if (LANES == 16) x = larger(x, SWAPPED(x, 8));
    x = larger(x, SWAPPED(x, 4));
    float first = x[0] > x[1] ? x[0] : x[1], second = x[2] > x[3] ? x[2] : x[3];
    return first > second ? first : second;
}

/* Added to a float of less than 2^22, it rounds it to an integer, which then stands in the lowest bits. */
#define ROUNDER 12582912.0f
#define ROUNDER_BITS 0x4b400000u

/* The exponential of numbers that are at most 0: 2^whole by the exponent, 2^part by a polynomial (to 1e-7). */
INLINE floats exponential(floats x) {
    floats power = larger(x, all(-87.0f)) * 1.44269504f;
    floats whole = power + ROUNDER;
    floats part = power - (whole - ROUNDER);
    floats y = part * 1.32765e-3f + 9.67554e-3f;
    y = y * part + 5.550713e-2f;
    y = y * part + 2.402212e-1f;
    y = y * part + 6.9314697e-1f;
    y = y * part + 1.00000007f;
    return (floats)((ints)y + ((ints)whole << 23));
}

/* 0, but NaN of what is NaN or infinity, which comparisons and the exponential would hide; -infinity is a ban. */
INLINE floats nothing(floats x) { return (floats)((ints)(x - x) & ~(x == all(-INFINITY))); }

#define TURN(step) \
    for (int i = 0; i < LANES; i++) \
        if (!(i & step)) { \
            floats x = r[i], y = r[i + step]; \
            r[i] = LOW(x, y, step); \
            r[i + step] = HIGH(x, y, step); \
        }

/* LANES rows of so many numbers become its columns. */
INLINE void turn_block(floats *r) {
#if LANES == 16
    TURN(8)
#endif
    TURN(4)
    TURN(2)
    TURN(1)
}

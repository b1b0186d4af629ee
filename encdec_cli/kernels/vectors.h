/* Vectors of 16 floats, and rows of float or bfloat16 (`bf16`), which are always computed with as float.
 *
 * Vectors are those of GCC and Clang, for any processor.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))
/* One function for both types; the compiler makes two of it. */
#define BY_TYPE(call, ...) (bf16 ? call(__VA_ARGS__, 1) : call(__VA_ARGS__, 0))
#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#define MERGE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (ints){__VA_ARGS__})
#define MERGE(x, y, ...) __builtin_shuffle(x, y, (ints){__VA_ARGS__})
#endif

/* 32 numbers: of bfloat16 those at even places and those at odd places, else the first and the last half. */
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
        memcpy(&x.b, at(from, place + 16, bf16), sizeof x.b);
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
    x += SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    return (x[0] + x[2]) + (x[1] + x[3]);
}

/* To `sums` the sum of each of four vectors, added up in the order of `sum_of`. */
INLINE void four_sums(const floats *x, float *sums) {
    floats first = MERGE(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   MERGE(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    floats last = MERGE(x[2], x[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  MERGE(x[2], x[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    floats y = MERGE(first, last, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               MERGE(first, last, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    y += SHUFFLE(y, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    y += SHUFFLE(y, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    y = SHUFFLE(y, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    memcpy(sums, &y, 4 * sizeof *sums);
}

INLINE ints higher(ints x, ints y) {
    ints first = x > y;
    return (x & first) | (y & ~first);
}

INLINE int32_t highest_of(ints x) {
    x = higher(x, SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = higher(x, SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    int32_t first = x[0] > x[1] ? x[0] : x[1], second = x[2] > x[3] ? x[2] : x[3];
    return first > second ? first : second;
}

INLINE float largest_of(floats x) {
    x = larger(x, SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
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

#define LANES 16
#define LIST(...) __VA_ARGS__
#define SWAP(step, low, high) \
    for (int i = 0; i < LANES; i++) \
        if (!(i & step)) { \
            floats x = r[i], y = r[i + step]; \
            r[i] = MERGE(x, y, low); \
            r[i + step] = MERGE(x, y, high); \
        }

/* 16 rows of 16 numbers become its columns. */
INLINE void turn_block(floats *r) {
    SWAP(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
         LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    SWAP(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
         LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    SWAP(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
         LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    SWAP(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
         LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
}

/* What products share: vectors of sums, and how they are written. On processors with AVX-512, or AVX2. */
#pragma once
#include "kernels.h"
#include "vectors.h"

/* Sums of ROWS rows and a panel of VECTORS vectors stay in registers. */
#define ROWS 6
#define VECTORS (LANES == 16 ? 4 : 2)
#define PANEL (VECTORS * LANES)

#if defined __AVX512F__ ? defined __AVX512BW__ && defined __AVX512VL__ : defined __AVX2__ && defined __FMA__
#include <immintrin.h>

#define WIDE 1

/* Four products of levels are added to each number; those of a row come 128 higher, without a sign. Older processors
 * add up pairs in 16 bits, which two times 127 x 127 fit into, but not 255 x 127; so the signs of rows go to the weights. */
#if defined __AVX512VNNI__
#define RAISED 1
INLINE ints add_levels(ints sum, ints row, ints weights) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)row, (__m512i)weights);
}
#elif defined __AVX512F__
#define RAISED 0
INLINE ints add_levels(ints sum, ints row, ints weights) {
    __m512i x = (__m512i)(row ^ (int32_t)0x80808080), w = (__m512i)weights;
    w = _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(x), _mm512_setzero_si512(), w);
    return sum + (ints)_mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(x), w), _mm512_set1_epi16(1));
}
#elif defined __AVXVNNI__
#define RAISED 1
INLINE ints add_levels(ints sum, ints row, ints weights) {
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)row, (__m256i)weights);
}
#else
#define RAISED 0
INLINE ints add_levels(ints sum, ints row, ints weights) {
    __m256i x = (__m256i)(row ^ (int32_t)0x80808080), w = _mm256_sign_epi8((__m256i)weights, x);
    return sum + (ints)_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(x), w), _mm256_set1_epi16(1));
}
#endif

INLINE ints add_product(ints sum, ints row, ints weights, int kind) {
#ifdef __AVX512BF16__
    if (kind == BFLOATS) return (ints)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)weights);
#endif
    if (kind == LEVELS) return add_levels(sum, row, weights);
    return (ints)((floats)sum + (floats)row * (floats)weights);
}

/* To nearest, ties to even. */
INLINE shorts rounded(floats x) {
#ifdef __AVX512BF16__
    return (shorts)_mm512_cvtneps_pbh((__m512)x);
#else
    words bits = (words)x + 0x7fff + (((words)x >> 16) & 1);
    return __builtin_convertvector(bits >> 16, shorts);
#endif
}

/* The first of LANES numbers, as many as are left. */
#if LANES == 16
typedef __mmask16 some;

INLINE some some_of(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (1 << left) - 1; }
INLINE floats read_floats(const void *from, some first) { return (floats)_mm512_maskz_loadu_ps(first, from); }
INLINE shorts read_shorts(const void *from, some first) { return (shorts)_mm256_maskz_loadu_epi16(first, from); }
INLINE void write_floats(void *to, floats x, some first) { _mm512_mask_storeu_ps(to, first, (__m512)x); }
INLINE void write_shorts(void *to, shorts x, some first) { _mm256_mask_storeu_epi16(to, first, (__m256i)x); }
#else
typedef int64_t some;

INLINE some some_of(int64_t left) { return left >= LANES ? LANES : left < 0 ? 0 : left; }
INLINE floats read_floats(const void *from, some first) {
    floats x = all(0);
    if (first == LANES) memcpy(&x, from, sizeof x);
    else memcpy(&x, from, first * sizeof(float));
    return x;
}
INLINE shorts read_shorts(const void *from, some first) {
    shorts x = {0};
    memcpy(&x, from, first * sizeof(uint16_t));
    return x;
}
INLINE void write_floats(void *to, floats x, some first) {
    if (first == LANES) memcpy(to, &x, sizeof x);
    else memcpy(to, &x, first * sizeof(float));
}
INLINE void write_shorts(void *to, shorts x, some first) { memcpy(to, &x, first * sizeof(uint16_t)); }
#endif

/* Keeps a vector in a register of its own: compilers would rather load it again, or put it on the stack. */
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#define UNROLL _Pragma("GCC unroll 8")

/* Sums of some rows from where they are kept, `apart` from row to row, or zeros, and back. */
INLINE void start_sums(ints sum[ROWS][VECTORS], const int32_t *kept, int64_t apart, int begins, int rows) {
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) {
            sum[r][v] = (ints){0};
            if (!begins) memcpy(&sum[r][v], kept + r * apart + v * LANES, sizeof sum[r][v]);
        }
}
INLINE void keep_sums(ints sum[ROWS][VECTORS], int32_t *kept, int64_t apart, int rows) {
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) memcpy(kept + r * apart + v * LANES, &sum[r][v], sizeof sum[r][v]);
}

/* Add to sums what words of some rows, `apart` from row to row and `between` within one, make with a panel's weights. */
INLINE void add_products(ints sum[ROWS][VECTORS], const int32_t *x, int64_t apart, int64_t between, const ints *weights,
                         int64_t depth, int kind, int rows) {
    for (int64_t k = 0; k < depth; k++, weights += VECTORS) {
        ints w[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) {
            memcpy(&w[v], weights + v, sizeof w[v]);
            IN_REGISTER(w[v]);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            ints row = x[r * apart + k * between] - (ints){0};
            IN_REGISTER(row);
            UNROLL for (int v = 0; v < VECTORS; v++) {
                sum[r][v] = add_product(sum[r][v], row, w[v], kind);
                IN_REGISTER(sum[r][v]);
            }
        }
    }
}

/* LANES outputs: what becomes of sums before they are written. */
struct outputs {
    int64_t place;
    some first; /* of them are outputs */
    floats bias, by;
    ints offset;
};

INLINE struct outputs outputs_from(const struct matrix *m, int64_t place, int kind) {
    struct outputs o = {place, some_of(m->outputs - place), all(0), all(0), {0}};
    if (m->bias) memcpy(&o.bias, m->bias + place, sizeof o.bias);
    if (kind == LEVELS) memcpy(&o.by, m->scales + place, sizeof o.by);
    if (kind == LEVELS && RAISED) memcpy(&o.offset, m->offsets + place, sizeof o.offset);
    return o;
}

/* What a vector of sums stands for. */
INLINE floats finished(ints sum, const struct outputs *o, float scale, int relu, int kind) {
    floats y = (floats)sum;
    if (kind == LEVELS) y = __builtin_convertvector(sum - o->offset, floats) * o->by * scale;
    y += o->bias;
    return relu ? (floats)((ints)y & ~(y < 0)) : y;
}

/* Write a vector of sums to a row of `out`, each a row of the matrix's outputs. */
INLINE void write_sums(ints sum, const struct outputs *o, float scale, const void *added, void *out, int64_t row,
                       const struct matrix *m, int relu, int bf16, int kind) {
    floats y = finished(sum, o, scale, relu, kind);
    void *to = (void *)at(out, row * m->outputs + o->place, bf16);
    const void *from = added ? at(added, row * m->outputs + o->place, bf16) : 0;
    if (bf16) {
        if (from) y += (floats)(__builtin_convertvector(read_shorts(from, o->first), words) << 16);
        write_shorts(to, rounded(y), o->first);
    } else {
        if (from) y += read_floats(from, o->first);
        write_floats(to, y, o->first);
    }
}
#endif

/* What products share: vectors of sums, and how they are written. On processors with AVX-512. */
#pragma once
#include "kernels.h"
#include "vectors.h"

#define VECTORS (PANEL / 16)

#if defined __AVX512F__ && defined __AVX512BW__ && defined __AVX512VL__
#include <immintrin.h>

#define WIDE 1
#define ROWS 6 /* whose sums stay in registers, with those of a panel */

INLINE ints add_product(ints sum, ints row, ints weights, int kind) {
#ifdef __AVX512BF16__
    if (kind == BFLOATS) return (ints)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)weights);
#endif
#ifdef __AVX512VNNI__
    if (kind == LEVELS) return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)row, (__m512i)weights);
#endif
    return (ints)((floats)sum + (floats)row * (floats)weights);
}

/* To nearest, ties to even. */
INLINE __m256i rounded(floats x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
    words bits = (words)x + 0x7fff + (((words)x >> 16) & 1);
    return (__m256i)__builtin_convertvector(bits >> 16, shorts);
#endif
}

/* Keeps a vector in a register of its own: compilers would rather load it again, or put it on the stack. */
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#define UNROLL _Pragma("GCC unroll 8")

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

INLINE __mmask16 mask_of(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (1 << left) - 1; }

/* Some 16 outputs: what becomes of sums before they are written. */
struct outputs {
    int64_t place;
    __mmask16 mask;
    floats bias, by;
    ints offset;
};

INLINE struct outputs outputs_from(const struct matrix *m, int64_t place, int kind) {
    struct outputs o = {place, mask_of(m->outputs - place), all(0), all(0), {0}};
    if (m->bias) memcpy(&o.bias, m->bias + place, sizeof o.bias);
    if (kind == LEVELS) memcpy(&o.by, m->scales + place, sizeof o.by);
    if (kind == LEVELS) memcpy(&o.offset, m->offsets + place, sizeof o.offset);
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
        shorts more = from ? (shorts)_mm256_maskz_loadu_epi16(o->mask, from) : (shorts){0};
        y += (floats)(__builtin_convertvector(more, words) << 16);
        _mm256_mask_storeu_epi16(to, o->mask, rounded(y));
    } else {
        if (from) y += (floats)_mm512_maskz_loadu_ps(o->mask, from);
        _mm512_mask_storeu_ps(to, o->mask, (__m512)y);
    }
}
#endif

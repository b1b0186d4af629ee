/* Products of a few rows with a matrix that was packed for them, on processors with AVX-512.
 *
 * All three types work alike: 4 bytes of a row (a float, two bfloat16 or four levels of 8 bits) meet 64 bytes of the
 * matrix, and 16 sums grow. Six rows by four such vectors keep their sums in registers, so that a product of usual size
 * runs at 0.9 of what the processor can multiply. Every row's sums grow in one order, however many rows there are.
 */
#include "kernels.h"
#include "vectors.h"

#define ROWS 6
#define VECTORS (PANEL / 16)
#define BLOCK (1 << 18) /* bytes of rows that stay in the cache while all of the matrix passes */

INLINE void quantise_row(const void *row, int64_t width, uint8_t *levels, float *scale, int bf16) {
    /* Without their sign, floats are in the order of their bits, and what is no number is above all. */
    ints most = (ints)all(1e-20f);
    for (int64_t i = 0; i < width; i += 32) {
        pair x = read_pair(row, i, bf16);
        most = higher(most, higher((ints)x.a & 0x7fffffff, (ints)x.b & 0x7fffffff));
    }
    int32_t bits = highest_of(most);
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    float by = 127 / largest;
    *scale = largest / 127;
    for (int64_t i = 0; i < width; i += 32) {
        pair x = read_pair(row, i, bf16);
        words a = (words)(x.a * by + ROUNDER) - (ROUNDER_BITS - 128);
        words b = (words)(x.b * by + ROUNDER) - (ROUNDER_BITS - 128);
        if (bf16) {
            shorts both = __builtin_convertvector(a | (b << 8), shorts);
            memcpy(levels + i, &both, sizeof both);
        } else {
            bytes first = __builtin_convertvector(a, bytes), second = __builtin_convertvector(b, bytes);
            memcpy(levels + i, &first, sizeof first);
            memcpy(levels + i + 16, &second, sizeof second);
        }
    }
}

/* Whether there is a product for a kind of matrix: where a processor has matrix units, bfloat16 is for them. */
int has_product(int64_t kind) {
#if defined __AVX512F__ && defined __AVX512BW__ && defined __AVX512VL__
#if defined __AVX512BF16__ && !defined __AMX_BF16__
    if (kind == BFLOATS) return 1;
#endif
#ifdef __AVX512VNNI__
    if (kind == LEVELS) return 1;
#endif
    return kind == FLOATS;
#else
    return 0;
#endif
}

#if defined __AVX512F__ && defined __AVX512BW__ && defined __AVX512VL__
#include <immintrin.h>

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

/* rows x PANEL numbers of the product, from x [rows, depth] and one panel of the matrix. */
INLINE void tile(const int32_t *x, const float *scales, const struct matrix *m, int64_t panel, const void *added,
                 void *out, int relu, int bf16, int kind, int rows) {
    const ints *weights = (const ints *)m->weights + panel * m->depth * VECTORS;
    ints sum[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = (ints){0};
    for (int64_t k = 0; k < m->depth; k++, weights += VECTORS) {
        ints w[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) {
            memcpy(&w[v], weights + v, sizeof w[v]);
            IN_REGISTER(w[v]);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            ints row = x[r * m->depth + k] - (ints){0};
            IN_REGISTER(row);
            UNROLL for (int v = 0; v < VECTORS; v++) {
                sum[r][v] = add_product(sum[r][v], row, w[v], kind);
                IN_REGISTER(sum[r][v]);
            }
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        int64_t place = panel * PANEL + v * 16, left = m->outputs - place;
        __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
        floats bias = all(0), by = all(0);
        ints offset = {0};
        if (m->bias) memcpy(&bias, m->bias + place, sizeof bias);
        if (kind == LEVELS) memcpy(&by, m->scales + place, sizeof by);
        if (kind == LEVELS) memcpy(&offset, m->offsets + place, sizeof offset);
        UNROLL for (int r = 0; r < rows; r++) {
            floats y = (floats)sum[r][v];
            if (kind == LEVELS) y = __builtin_convertvector(sum[r][v] - offset, floats) * by * scales[r];
            y += bias;
            if (relu) y = (floats)((ints)y & ~(y < 0));
            void *to = (void *)at(out, r * m->outputs + place, bf16);
            const void *from = added ? at(added, r * m->outputs + place, bf16) : 0;
            if (bf16) {
                shorts more = from ? (shorts)_mm256_maskz_loadu_epi16(mask, from) : (shorts){0};
                y += (floats)(__builtin_convertvector(more, words) << 16);
                _mm256_mask_storeu_epi16(to, mask, rounded(y));
            } else {
                if (from) y += (floats)_mm512_maskz_loadu_ps(mask, from);
                _mm512_mask_storeu_ps(to, mask, (__m512)y);
            }
        }
    }
}

#define CASE(n) case n: tile(row, scale, m, panel, more, to, relu, bf16, kind, n); break;

INLINE void multiply(const void *x, int64_t rows, const struct matrix *m, const void *added, void *out,
                     int64_t first, int64_t last, int relu, int bf16, int kind) {
    int64_t width = m->depth * (kind == LEVELS ? 4 : bf16 ? 2 : 1), block = BLOCK / (m->depth * 4);
    if (block > rows) block = rows;
    if (block < ROWS) block = ROWS;
    int32_t levels[kind == LEVELS ? block * m->depth : 1];
    float scales[kind == LEVELS ? block : 1];
    for (int64_t start = 0; start < rows; start += block) {
        int64_t end = start + block < rows ? start + block : rows;
        const int32_t *lines = (const int32_t *)at(x, start * width, bf16);
        for (int64_t row = start; kind == LEVELS && row < end; row++)
            quantise_row(at(x, row * width, bf16), width, (uint8_t *)(levels + (row - start) * m->depth),
                         scales + (row - start), bf16);
        if (kind == LEVELS) lines = levels;
        for (int64_t panel = first; panel < last; panel++)
            for (int64_t place = start; place < end; place += ROWS) {
                const int32_t *row = lines + (place - start) * m->depth;
                const float *scale = kind == LEVELS ? scales + (place - start) : 0;
                const void *more = added ? at(added, place * m->outputs, bf16) : 0;
                void *to = (void *)at(out, place * m->outputs, bf16);
                switch (end - place > ROWS ? ROWS : end - place) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
            }
    }
}

#define multiply_levels(...) multiply(__VA_ARGS__, LEVELS)

void product(const void *x, int64_t rows, const struct matrix *m, const void *added, void *out, int64_t first,
             int64_t last, int relu, int bf16) {
    if (m->kind == FLOATS) multiply(x, rows, m, added, out, first, last, relu, 0, FLOATS);
    else if (m->kind == BFLOATS) multiply(x, rows, m, added, out, first, last, relu, 1, BFLOATS);
    else BY_TYPE(multiply_levels, x, rows, m, added, out, first, last, relu);
}
#else
void product(const void *x, int64_t rows, const struct matrix *m, const void *added, void *out, int64_t first,
             int64_t last, int relu, int bf16) {}
#endif

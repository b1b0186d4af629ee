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

/* rows x PANEL numbers of the product, from x [rows, depth] and one panel of the matrix. */
INLINE void tile(const int32_t *x, const float *scales, const struct matrix *m, int64_t panel, const void *added,
                 void *out, int relu, int bf16, int kind, int rows) {
    ints sum[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = (ints){0};
    add_products(sum, x, m->depth, 1, (const ints *)m->weights + panel * m->depth * VECTORS, m->depth, kind, rows);
    UNROLL for (int v = 0; v < VECTORS; v++) {
        int64_t place = panel * PANEL + v * 16, left = m->outputs - place;
        __mmask16 mask = mask_of(left);
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

/* Two rows of bfloat16 as words, the second above the first, or one of float; what is masked, or no row, is 0. */
INLINE words pair_of_rows(const void *row, int64_t width, int64_t left, int second, int bf16) {
    __mmask16 mask = mask_of(left);
    if (!bf16) return (words)_mm512_maskz_loadu_ps(mask, row);
    words x = __builtin_convertvector((shorts)_mm256_maskz_loadu_epi16(mask, row), words);
    if (!second) return x;
    const void *next = at(row, width, bf16);
    return x | (__builtin_convertvector((shorts)_mm256_maskz_loadu_epi16(mask, next), words) << 16);
}

/* Pack panels of a matrix given as rows [inputs, outputs], each an input. */
INLINE void pack_inputs(const void *from, const struct matrix *m, int64_t inputs, int64_t first, int64_t last, int bf16) {
    int64_t each = bf16 ? 2 : 1;
    for (int64_t k = 0; k * each < inputs; k++)
        for (int64_t v = first * VECTORS; v < last * VECTORS; v++) {
            const void *row = at(from, each * k * m->outputs + v * LANES, bf16);
            words x = pair_of_rows(row, m->outputs, m->outputs - v * LANES, 2 * k + 1 < inputs, bf16);
            memcpy((words *)m->weights + (v / VECTORS * m->depth + k) * VECTORS + v % VECTORS, &x, sizeof x);
        }
}

/* The same of one given as [outputs, inputs]: words are turned, 16 by 16. */
static void pack_outputs(const void *from, const struct matrix *m, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t k = 0; k < m->depth; k += LANES)
            for (int64_t v = 0; v < VECTORS; v++) {
                floats r[LANES];
                int64_t place = panel * PANEL + v * LANES;
                for (int64_t i = 0; i < LANES; i++) {
                    const float *row = (const float *)from + (place + i) * m->depth + k;
                    r[i] = place + i < m->outputs ? (floats)_mm512_maskz_loadu_ps(mask_of(m->depth - k), row) : all(0);
                }
                turn_block(r);
                floats *to = (floats *)m->weights + (panel * m->depth + k) * VECTORS + v;
                for (int64_t i = 0; i < LANES && k + i < m->depth; i++) memcpy(to + i * VECTORS, &r[i], sizeof r[i]);
            }
}

void map_rows(const void *x, int64_t rows, const void *weight, const void *bias, void *out, const struct matrix *m,
              int64_t first, int64_t last, int turned, int bf16) {
    if (turned) BY_TYPE(pack_inputs, weight, m, m->depth * (bf16 ? 2 : 1), first, last);
    else pack_outputs(weight, m, first, last);
    for (int64_t i = first * PANEL; bias && i < last * PANEL; i++)
        ((float *)m->bias)[i] = i < m->outputs ? read_one(bias, i, bf16) : 0;
    if (bf16) multiply(x, rows, m, 0, out, first, last, 0, 1, BFLOATS);
    else multiply(x, rows, m, 0, out, first, last, 0, 0, FLOATS);
}

_Static_assert(COLUMNS == ROWS * LANES, "a vector of each row of a tile");
#define AHEAD 16 /* rows, or pairs of them, that are asked for before they are read */
#define MORE 1   /* a row of each block is written past its end */

/* To `to` [LANES, depth + MORE, ROWS] words of COLUMNS columns of x [rows, width], in the order in which tiles read
 * them; and to sums their sums, added to what is there. */
INLINE void gather(const void *x, int64_t rows, int64_t width, int64_t start, int64_t depth, int32_t *to, float *sums,
                   int bf16) {
    floats sum[ROWS];
    UNROLL for (int v = 0; v < ROWS; v++) memcpy(&sum[v], sums + v * LANES, sizeof sum[v]);
    for (int64_t k = 0; k < (bf16 ? (rows + 1) / 2 : rows); k++) {
        words w[ROWS + 1];
        /* Rows are far apart: each is a page, and lines, that nobody else asks for in time. */
        for (int64_t row = 0; row < (bf16 ? 2 : 1); row++)
            for (int64_t line = 0; line < COLUMNS; line += bf16 ? 32 : 16)
                __builtin_prefetch(at(x, ((bf16 ? 2 : 1) * (k + AHEAD) + row) * width + start + line, bf16));
        UNROLL for (int v = 0; v < ROWS; v++) {
            int64_t place = start + v * LANES;
            const void *row = at(x, (bf16 ? 2 : 1) * k * width + place, bf16);
            w[v] = pair_of_rows(row, width, width - place, 2 * k + 1 < rows, bf16);
            if (bf16) {
                sum[v] += (floats)(w[v] << 16);
                sum[v] += (floats)(w[v] & 0xffff0000u);
            } else {
                sum[v] += (floats)w[v];
            }
        }
        w[ROWS] = w[ROWS - 1];
        UNROLL for (int b = 0; b < LANES; b++) {
            int64_t begin = b * ROWS % LANES;
            ints which = (ints){0, 1, 2, 3, 4, 5, 6, 7} + (int32_t)begin;
            words *both = w + b * ROWS / LANES;
            __m512i block = _mm512_permutex2var_epi32((__m512i)both[0], (__m512i)which, (__m512i)both[1]);
            _mm256_storeu_si256((void *)(to + (b * (depth + MORE) + k) * ROWS), _mm512_castsi512_si256(block));
        }
    }
    UNROLL for (int v = 0; v < ROWS; v++) memcpy(sums + v * LANES, &sum[v], sizeof sum[v]);
}

/* A tile of the product of gathered columns: it goes on from `kept` unless it is the first, and back, or out at last. */
INLINE void tile_of_columns(const int32_t *x, const struct matrix *m, int64_t panel, int64_t depth, float *kept,
                            void *out, int begins, int ends, int bf16, int rows) {
    ints sum[ROWS][VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) {
            sum[r][v] = (ints){0};
            if (!begins) memcpy(&sum[r][v], kept + r * m->panels * PANEL + v * LANES, sizeof sum[r][v]);
        }
    const ints *weights = (const ints *)m->weights + panel * m->depth * VECTORS;
    add_products(sum, x, 1, ROWS, weights, depth, bf16 ? BFLOATS : FLOATS, rows);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) {
            int64_t place = panel * PANEL + v * LANES;
            void *to = (void *)at(out, r * m->outputs + place, bf16);
            if (!ends) memcpy(kept + r * m->panels * PANEL + v * LANES, &sum[r][v], sizeof sum[r][v]);
            else if (bf16) _mm256_mask_storeu_epi16(to, mask_of(m->outputs - place), rounded((floats)sum[r][v]));
            else _mm512_mask_storeu_ps(to, mask_of(m->outputs - place), (__m512)sum[r][v]);
        }
}

#define COLUMN_CASE(n) \
    case n: tile_of_columns(words, m, panel, depth, sum, to, start == 0, end == rows, bf16, n); break;

INLINE void columns(const void *a, int64_t rows, int64_t width, const void *x, void *out, float *sums, float *kept,
                    const struct matrix *m, int64_t first, int64_t last, int bf16) {
    int64_t each = bf16 ? 2 : 1;
    int32_t gathered[COLUMNS * (m->depth + MORE)];
    for (int64_t start = 0, end; start < rows; start = end) {
        end = start + m->depth * each < rows ? start + m->depth * each : rows;
        int64_t depth = (end - start + each - 1) / each;
        pack_inputs(at(x, start * m->outputs, bf16), m, end - start, first, last, bf16);
        for (int64_t block = 0; block < width; block += COLUMNS) {
            gather(at(a, start * width, bf16), end - start, width, block, m->depth, gathered, sums + block, bf16);
            for (int64_t panel = first; panel < last; panel++)
                for (int64_t place = block; place < block + COLUMNS && place < width; place += ROWS) {
                    const int32_t *words = gathered + (place - block) * (m->depth + MORE);
                    float *sum = kept + (place * m->panels + panel) * PANEL;
                    void *to = (void *)at(out, place * m->outputs, bf16);
                    switch (width - place > ROWS ? ROWS : width - place) {
                        COLUMN_CASE(1) COLUMN_CASE(2) COLUMN_CASE(3) COLUMN_CASE(4) COLUMN_CASE(5) COLUMN_CASE(6)
                    }
                }
        }
    }
}

void map_columns(const void *a, int64_t rows, int64_t width, const void *x, void *out, float *sums, float *kept,
                 const struct matrix *m, int64_t first, int64_t last, int bf16) {
    BY_TYPE(columns, a, rows, width, x, out, sums, kept, m, first, last);
}
#else
void map_rows(const void *x, int64_t rows, const void *weight, const void *bias, void *out, const struct matrix *m,
              int64_t first, int64_t last, int turned, int bf16) {}
void map_columns(const void *a, int64_t rows, int64_t width, const void *x, void *out, float *sums, float *kept,
                 const struct matrix *m, int64_t first, int64_t last, int bf16) {}
void product(const void *x, int64_t rows, const struct matrix *m, const void *added, void *out, int64_t first,
             int64_t last, int relu, int bf16) {}
#endif

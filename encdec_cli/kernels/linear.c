/* Products of training: their matrices are packed on the way, for a few panels each. */
#include "products.h"
#include "tiles.h"

int64_t words_at_once(int bf16) {
    return bf16 && has_units() ? 128 : 512; /* units keep sums between them at little cost */
}

#ifdef WIDE
/* Two rows of bfloat16 as words, the second above the first, or one of float; what is masked, or no row, is 0. */
INLINE words pair_of_rows(const void *row, int64_t width, int64_t left, int second, int bf16) {
    some first = some_of(left);
    if (!bf16) return (words)read_floats(row, first);
    words x = __builtin_convertvector(read_shorts(row, first), words);
    if (!second) return x;
    const void *next = at(row, width, bf16);
    return x | (__builtin_convertvector(read_shorts(next, first), words) << 16);
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

/* The same of one given as [outputs, inputs]: words are turned, LANES by LANES. */
static void pack_outputs(const void *from, const struct matrix *m, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t k = 0; k < m->depth; k += LANES)
            for (int64_t v = 0; v < VECTORS; v++) {
                floats r[LANES];
                int64_t place = panel * PANEL + v * LANES;
                for (int64_t i = 0; i < LANES; i++) {
                    const float *row = (const float *)from + (place + i) * m->depth + k;
                    r[i] = place + i < m->outputs ? read_floats(row, some_of(m->depth - k)) : all(0);
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
    product(x, rows, m, 0, out, first, last, 0, bf16);
}

_Static_assert(COLUMNS % ROWS == 0 && COLUMNS % LANES == 0, "vectors that tiles read");
#define AHEAD 16 /* rows, or pairs of them, that are asked for before they are read */
#define MORE 1   /* a row of each block is written past its end */

/* To `to` [COLUMNS / ROWS, depth + MORE, ROWS] words of COLUMNS columns of x [rows, width], in the order in which tiles read
 * them; and to sums their sums, added to what is there. */
INLINE void gather(const void *x, int64_t rows, int64_t width, int64_t start, int64_t depth, int32_t *to, float *sums,
                   int bf16) {
    floats sum[COLUMNS / LANES];
    memcpy(sum, sums, sizeof sum);
    for (int64_t k = 0; k < (bf16 ? (rows + 1) / 2 : rows); k++) {
        words w[COLUMNS / LANES + 1];
        /* Rows are far apart: each is a page, and lines, that nobody else asks for in time. */
        for (int64_t row = 0; row < (bf16 ? 2 : 1); row++)
            for (int64_t line = 0; line < COLUMNS; line += bf16 ? 32 : 16)
                __builtin_prefetch(at(x, ((bf16 ? 2 : 1) * (k + AHEAD) + row) * width + start + line, bf16));
        UNROLL for (int v = 0; v < COLUMNS / LANES; v++) {
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
        w[COLUMNS / LANES] = w[COLUMNS / LANES - 1];
        UNROLL for (int b = 0; b < COLUMNS / ROWS; b++) {
            int32_t *block = to + (b * (depth + MORE) + k) * ROWS;
#if LANES == 16
            ints which = (ints){0, 1, 2, 3, 4, 5, 6, 7} + b * ROWS % LANES;
            words *both = w + b * ROWS / LANES;
            __m512i some = _mm512_permutex2var_epi32((__m512i)both[0], (__m512i)which, (__m512i)both[1]);
            _mm256_storeu_si256((void *)block, _mm512_castsi512_si256(some));
#else
            memcpy(block, (const int32_t *)w + b * ROWS, 8 * sizeof *block);
#endif
        }
    }
    memcpy(sums, sum, sizeof sum);
}

/* A tile of the product of gathered columns: it goes on from `kept` unless it is the first, and back, or out at last. */
INLINE void tile_of_columns(const int32_t *x, const struct matrix *m, int64_t panel, int64_t depth, int32_t *kept,
                            void *out, int begins, int ends, int bf16, int rows) {
    const ints *weights = (const ints *)m->weights + panel * m->depth * VECTORS;
    ints sum[ROWS][VECTORS];
    start_sums(sum, kept, m->panels * PANEL, begins, rows);
    add_products(sum, x, 1, ROWS, weights, depth, bf16 ? BFLOATS : FLOATS, rows);
    if (!ends) {
        keep_sums(sum, kept, m->panels * PANEL, rows);
        return;
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) {
            int64_t place = panel * PANEL + v * LANES;
            void *to = (void *)at(out, r * m->outputs + place, bf16);
            if (bf16) write_shorts(to, rounded((floats)sum[r][v]), some_of(m->outputs - place));
            else write_floats(to, (floats)sum[r][v], some_of(m->outputs - place));
        }
}

#define COLUMN_CASE(n) \
    case n: tile_of_columns(words, m, panel, depth, sum, to, start == 0, end == rows, bf16, n); break;

INLINE void columns(const void *a, int64_t rows, int64_t width, const void *x, void *out, float *sums, int32_t *kept,
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
                    int32_t *sum = kept + (place * m->panels + panel) * PANEL;
                    void *to = (void *)at(out, place * m->outputs, bf16);
                    switch (width - place > ROWS ? ROWS : width - place) {
                        COLUMN_CASE(1) COLUMN_CASE(2) COLUMN_CASE(3) COLUMN_CASE(4) COLUMN_CASE(5) COLUMN_CASE(6)
                    }
                }
        }
    }
}

#ifdef UNITS
/* To `to` [depth / 16, GROUP, 16] pairs of rows of GROUP columns of x [rows, width] of bfloat16, with zeros after the
 * last; and to sums their sums, added to what is there. */
static void gather_tiles(const void *x, int64_t rows, int64_t width, int64_t start, int64_t depth, int32_t *to,
                         float *sums) {
    floats sum[GROUP / LANES];
    memcpy(sum, sums, sizeof sum);
    for (int64_t k = 0; k < depth; k += LANES, to += WORDS)
        for (int64_t v = 0; v < GROUP / LANES; v++) {
            int64_t place = start + v * LANES;
            floats r[LANES];
            UNROLL for (int64_t i = 0; i < LANES; i++) {
                int64_t row = 2 * (k + i), left = row < rows ? width - place : 0;
                __builtin_prefetch(at(x, (row + 2 * LANES + v) * width + start, 1)); /* rows are far apart */
                words w = pair_of_rows(at(x, row * width + place, 1), width, left, row + 1 < rows, 1);
                sum[v] += (floats)(w << 16);
                sum[v] += (floats)(w & 0xffff0000u);
                r[i] = (floats)w;
            }
            turn_block(r);
            memcpy(to + v * LANES * LANES, r, sizeof r);
        }
    memcpy(sums, sum, sizeof sum);
}

/* `columns` of bfloat16 by the matrix units; the depth of m is a multiple of 16. */
static void columns_by_tiles(const void *a, int64_t rows, int64_t width, const void *x, void *out, float *sums,
                             int32_t *kept, const struct matrix *m, int64_t first, int64_t last) {
    int32_t gathered[GROUP * m->depth] __attribute__((aligned(64)));
    ints done[GROUP][2] __attribute__((aligned(64)));
    begin_tiles();
    for (int64_t start = 0, end; start < rows; start = end) {
        end = start + m->depth * 2 < rows ? start + m->depth * 2 : rows;
        int64_t pairs = (end - start + 1) / 2, depth = (pairs + LANES - 1) / LANES * LANES;
        pack_inputs(at(x, start * m->outputs, 1), m, end - start, first, last, 1);
        for (int64_t panel = first; panel < last; panel++)
            memset((int32_t *)m->weights + (panel * m->depth + pairs) * PANEL, 0, (depth - pairs) * PANEL * 4);
        for (int64_t block = 0; block < width; block += GROUP) {
            gather_tiles(at(a, start * width, 1), end - start, width, block, depth, gathered, sums + block);
            struct tiles lines = gathered_tiles(gathered);
            for (int64_t half = 2 * first; half < 2 * last && half * HALF < m->outputs; half++) {
                struct outputs o[2];
                for (int v = 0; v < 2; v++) o[v] = outputs_from(m, half * HALF + v * LANES, BFLOATS);
                /* Sums of a group of columns and of half a panel lie together. */
                ints(*sum)[2] = (ints(*)[2])kept + (block * 2 * m->panels + half * GROUP);
                if (start == 0 && end == rows) sum = done;
                sum_tiles(lines, half_of(m, half, 0), depth, sum, start == 0, BFLOATS, 1);
                for (int64_t r = 0; end == rows && r < GROUP && block + r < width; r++)
                    write_half(sum[r], o, 0, 0, out, block + r, m, 0, 1, BFLOATS);
            }
        }
    }
    end_tiles();
}
#endif

void map_columns(const void *a, int64_t rows, int64_t width, const void *x, void *out, float *sums, int32_t *kept,
                 const struct matrix *m, int64_t first, int64_t last, int bf16) {
#ifdef UNITS
    if (bf16 && has_units()) return columns_by_tiles(a, rows, width, x, out, sums, kept, m, first, last);
#endif
    BY_TYPE(columns, a, rows, width, x, out, sums, kept, m, first, last);
}
#else
void map_rows(const void *x, int64_t rows, const void *weight, const void *bias, void *out, const struct matrix *m,
              int64_t first, int64_t last, int turned, int bf16) {}
void map_columns(const void *a, int64_t rows, int64_t width, const void *x, void *out, float *sums, int32_t *kept,
                 const struct matrix *m, int64_t first, int64_t last, int bf16) {}
#endif

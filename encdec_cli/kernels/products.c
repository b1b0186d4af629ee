/* Products of a few rows with a matrix that was packed for them, on processors with AVX-512 or AVX2.
 *
 * All three types work alike: 4 bytes of a row (a float, two bfloat16 or four levels of 8 bits) meet a vector of the
 * matrix, and LANES sums grow. Six rows by four such vectors, of AVX2 by two, keep their sums in registers, so that a
 * product of usual size runs at 0.9 of what the processor can multiply. Matrix units, where there are any, take 16 times
 * 16 sums at once.
 * Every row's sums grow in one order, however many rows there are.
 */
#include "products.h"
#include "tiles.h"
#ifdef UNITS
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define BLOCK (1 << 18) /* bytes of rows that stay in the cache while all of the matrix passes */

INLINE void quantise_row(const void *row, int64_t width, uint8_t *levels, float *scale, int bf16) {
    /* Without their sign, floats are in the order of their bits, and what is no number is above all. */
    ints most = (ints)all(1e-20f);
    for (int64_t i = 0; i < width; i += PAIR) {
        pair x = read_pair(row, i, bf16);
        most = higher(most, higher((ints)x.a & 0x7fffffff, (ints)x.b & 0x7fffffff));
    }
    int32_t bits = highest_of(most);
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    float by = 127 / largest;
    *scale = largest / 127;
    for (int64_t i = 0; i < width; i += PAIR) {
        pair x = read_pair(row, i, bf16);
        words a = (words)(x.a * by + ROUNDER) - (ROUNDER_BITS - 128);
        words b = (words)(x.b * by + ROUNDER) - (ROUNDER_BITS - 128);
        if (bf16) {
            shorts both = __builtin_convertvector(a | (b << 8), shorts);
            memcpy(levels + i, &both, sizeof both);
        } else {
            bytes first = __builtin_convertvector(a, bytes), second = __builtin_convertvector(b, bytes);
            memcpy(levels + i, &first, sizeof first);
            memcpy(levels + i + LANES, &second, sizeof second);
        }
    }
}

int64_t panel_outputs(void) { return PANEL; }

/* Whether there is a product for a kind of matrix. */
int has_product(int64_t kind) {
#if defined WIDE && defined __AVX512BF16__
    return 1;
#elif defined WIDE
    return kind != BFLOATS;
#else
    return 0;
#endif
}

#ifdef WIDE
/* rows x PANEL numbers of the product, from x [rows, depth] and one panel of the matrix; of a deep one in several calls,
 * each of words from k to before `end`, between which sums are kept [rows, PANEL]. */
INLINE void tile(const int32_t *x, const float *scales, const struct matrix *m, int64_t panel, int64_t k, int64_t end,
                 int32_t *kept, const void *added, void *out, int relu, int bf16, int kind, int rows) {
    ints sum[ROWS][VECTORS];
    start_sums(sum, kept, PANEL, k == 0, rows);
    const ints *weights = (const ints *)m->weights + (panel * m->depth + k) * VECTORS;
    add_products(sum, x + k, m->depth, 1, weights, end - k, kind, rows);
    if (end < m->depth) {
        keep_sums(sum, kept, PANEL, rows);
        return;
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        struct outputs o = outputs_from(m, panel * PANEL + v * LANES, kind);
        UNROLL for (int r = 0; r < rows; r++)
            write_sums(sum[r][v], &o, kind == LEVELS ? scales[r] : 0, added, out, r, m, relu, bf16, kind);
    }
}

#ifdef UNITS
#define SHALLOW 256    /* words of rows that meet half a panel at once, so that both stay in the nearest cache */
#define MOST_HALVES 16 /* halves of panels that meet a group of rows one after the other */

static int units;

/* A process is given the units when it asks for them, by a system that keeps their state. */
__attribute__((constructor)) static void ask_for_units(void) {
    enum { ASK = 0x1023, TILES = 18 };
    units = syscall(SYS_arch_prctl, ASK, TILES) == 0;
}

int has_units(void) { return units; }

/* To `to` [words / 16, GROUP, 16] words of some rows, which lie `apart`, with zeros for rows that are none. */
INLINE void gather_rows(const int32_t *x, int64_t apart, int64_t rows, int64_t words, int32_t *to) {
    for (int64_t row = 0; row < GROUP; row++)
        for (int64_t k = 0; k < words; k += LANES) {
            ints some = {0};
            if (row < rows) memcpy(&some, x + row * apart + k, sizeof some);
            memcpy(to + k * GROUP + row * LANES, &some, sizeof some);
        }
}

/* The same of any number of rows and some panels, by the matrix units; the depth is a multiple of 16. */
INLINE void tile_rows(const int32_t *x, int64_t rows, const float *scales, const struct matrix *m, const void *added,
                      void *out, int64_t first, int64_t last, int relu, int bf16, int kind) {
    int64_t groups = (rows + GROUP - 1) / GROUP, stop = (m->outputs + HALF - 1) / HALF;
    if (stop > 2 * last) stop = 2 * last;
    int64_t halves = stop - 2 * first < MOST_HALVES ? stop - 2 * first : MOST_HALVES;
    int32_t gathered[GROUP * SHALLOW] __attribute__((aligned(64)));
    ints sums[m->depth > SHALLOW ? halves * groups : 2][GROUP][2] __attribute__((aligned(64)));
    begin_tiles();
    for (int64_t begin = 2 * first; begin < stop; begin += halves)
        for (int64_t k = 0; k < m->depth; k += SHALLOW) {
            int64_t left = m->depth - k, deep = left < SHALLOW ? left : SHALLOW;
            int64_t end = begin + halves < stop ? begin + halves : stop;
            for (int64_t row = 0; row < rows; row += GROUP) {
                int64_t count = rows - row < GROUP ? rows - row : GROUP;
                const int32_t *upper = x + row * m->depth + k;
                struct tiles lines = {upper, upper + LANES * m->depth, 4 * m->depth, LANES};
                if (count < GROUP) {
                    gather_rows(upper, m->depth, count, deep, gathered);
                    lines = gathered_tiles(gathered);
                }
                for (int64_t half = begin; half < end; half++) {
                    struct outputs o[2];
                    for (int v = 0; v < 2; v++) o[v] = outputs_from(m, half * HALF + v * LANES, kind);
                    ints(*sum)[2] = sums[m->depth > SHALLOW ? (half - begin) * groups + row / GROUP : half % 2];
                    if (count > LANES) sum_tiles(lines, half_of(m, half, k), deep, sum, k == 0, kind, 1);
                    else sum_tiles(lines, half_of(m, half, k), deep, sum, k == 0, kind, 0);
                    for (int64_t r = 0; left <= SHALLOW && r < count; r++) {
                        float scale = kind == LEVELS ? scales[row + r] : 0;
                        write_half(sum[r], o, scale, added, out, row + r, m, relu, bf16, kind);
                    }
                }
            }
        }
    end_tiles();
}
#endif

#define LEAST 256        /* rows of a block by the matrix units: each asks for the whole matrix */
#define DEEP 512         /* words of rows that meet a panel at once, so that both stay in near caches, */
#define MOST_OUTPUTS 512 /* and outputs whose sums are kept meanwhile */
#define CASE(n) case n: tile(row, scale, m, panel, k, stop, sums, more, to, relu, bf16, kind, n); break;

INLINE void multiply(const void *x, int64_t rows, const struct matrix *m, const void *added, void *out,
                     int64_t first, int64_t last, int relu, int bf16, int kind) {
    int by_units = kind != FLOATS && has_units() && m->depth % LANES == 0;
    int64_t width = m->depth * (kind == LEVELS ? 4 : bf16 ? 2 : 1);
    int64_t deep = by_units || m->depth < DEEP ? m->depth : DEEP;
    int64_t block = BLOCK / ((kind == LEVELS ? m->depth : deep) * 4), least = by_units && kind == BFLOATS ? LEAST : ROWS;
    if (block < least) block = least;
    if (block > rows) block = rows;
    int32_t levels[kind == LEVELS ? block * m->depth : 1] __attribute__((aligned(64)));
    float scales[kind == LEVELS ? block : 1];
    int64_t group = deep < m->depth ? MOST_OUTPUTS / PANEL : last - first;
    int32_t kept[deep < m->depth ? block * MOST_OUTPUTS : 1];
    for (int64_t start = 0; start < rows; start += block) {
        int64_t end = start + block < rows ? start + block : rows;
        const int32_t *lines = (const int32_t *)at(x, start * width, bf16);
        for (int64_t row = start; kind == LEVELS && row < end; row++)
            quantise_row(at(x, row * width, bf16), width, (uint8_t *)(levels + (row - start) * m->depth),
                         scales + (row - start), bf16);
        if (kind == LEVELS) lines = levels;
#ifdef UNITS
        if (by_units) {
            const void *more = added ? at(added, start * m->outputs, bf16) : 0;
            void *to = (void *)at(out, start * m->outputs, bf16);
            tile_rows(lines, end - start, scales, m, more, to, first, last, relu, bf16, kind);
            continue;
        }
#endif
        for (int64_t begin = first; begin < last; begin += group)
            for (int64_t k = 0; k < m->depth; k += deep)
                for (int64_t panel = begin; panel < last && panel < begin + group; panel++)
                    for (int64_t place = start; place < end; place += ROWS) {
                        int64_t stop = k + deep < m->depth ? k + deep : m->depth;
                        const int32_t *row = lines + (place - start) * m->depth;
                        const float *scale = kind == LEVELS ? scales + (place - start) : 0;
                        const void *more = added ? at(added, place * m->outputs, bf16) : 0;
                        void *to = (void *)at(out, place * m->outputs, bf16);
                        int32_t *sums = kept + ((panel - begin) * block + place - start) * PANEL;
                        switch (end - place > ROWS ? ROWS : end - place) {
                            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
                        }
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

/* The matrix units of a processor (AMX): 16 rows of 16 words of 4 bytes meet 16 words of 16 outputs.
 *
 * A panel of a packed matrix holds such tiles as they are. The sums of 32 rows and of 32 outputs, half a panel, grow in
 * four tiles; each row's grow in one order, whatever stands in the others.
 */
#pragma once
#include "products.h"

#if defined __AVX512BF16__ && defined __AMX_TILE__ && defined __AMX_BF16__ && defined __AMX_INT8__ && defined __linux__
#define UNITS 1
#define HALF (PANEL / 2)
#define GROUP (2 * LANES)     /* rows whose sums grow together */
#define WORDS (GROUP * LANES) /* of their two tiles */

/* Whether the system lets this process use them. */
int has_units(void);

/* From here to `end_tiles` this thread has eight tiles of 16 rows of 64 bytes. */
INLINE void begin_tiles(void) {
    struct {
        uint8_t palette, start[15];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {1, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}
INLINE void end_tiles(void) { __asm__ volatile("tilerelease"); }

#define NO_SUM(t) __asm__ volatile("tilezero %%tmm" #t : :)
#define READ_TILE(t, from, apart) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(from), "r"((int64_t)(apart)) : "memory")
#define WRITE_TILE(t, to, apart) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(apart)) : "memory")
#define ADD_TILES(sum, rows, weights) \
    if (kind == LEVELS) __asm__ volatile("tdpbusd %%tmm" #weights ", %%tmm" #rows ", %%tmm" #sum : :); \
    else __asm__ volatile("tdpbf16ps %%tmm" #weights ", %%tmm" #rows ", %%tmm" #sum : :)

/* Two tiles of rows and those that follow them: bytes from row to row, and words to the next 16. */
struct tiles {
    const int32_t *first, *second;
    int64_t apart, next;
};

/* Those of rows that were put together as [words / 16, GROUP, 16]. */
INLINE struct tiles gathered_tiles(const int32_t *x) { return (struct tiles){x, x + LANES * LANES, 64, WORDS}; }

/* Half a panel of a matrix, from word k on. */
INLINE const int32_t *half_of(const struct matrix *m, int64_t half, int64_t k) {
    return (const int32_t *)m->weights + (half / 2 * m->depth + k) * PANEL + half % 2 * HALF;
}

/* To sums of 32 rows what `depth` words, a multiple of 16, of them make with half a panel; more is added to what stands
 * there unless it `begins`. Without `both` there is one tile of rows. */
INLINE void sum_tiles(struct tiles x, const int32_t *weights, int64_t depth, ints sums[GROUP][2], int begins, int kind,
                      int both) {
    NO_SUM(0);
    NO_SUM(1);
    NO_SUM(2);
    NO_SUM(3);
    if (!begins) {
        READ_TILE(0, &sums[0][0], sizeof *sums);
        READ_TILE(1, &sums[0][1], sizeof *sums);
        if (both) READ_TILE(2, &sums[LANES][0], sizeof *sums);
        if (both) READ_TILE(3, &sums[LANES][1], sizeof *sums);
    }
    for (int64_t k = 0; k < depth; k += LANES, weights += LANES * PANEL) {
        READ_TILE(4, x.first, x.apart);
        READ_TILE(6, weights, 4 * PANEL);
        ADD_TILES(0, 4, 6);
        READ_TILE(7, weights + LANES, 4 * PANEL);
        ADD_TILES(1, 4, 7);
        x.first += x.next;
        if (!both) continue;
        READ_TILE(5, x.second, x.apart);
        ADD_TILES(2, 5, 6);
        ADD_TILES(3, 5, 7);
        x.second += x.next;
    }
    WRITE_TILE(0, &sums[0][0], sizeof *sums);
    WRITE_TILE(1, &sums[0][1], sizeof *sums);
    if (both) WRITE_TILE(2, &sums[LANES][0], sizeof *sums);
    if (both) WRITE_TILE(3, &sums[LANES][1], sizeof *sums);
}

/* Write the sums of 32 outputs to a row of `out`. */
INLINE void write_half(const ints sum[2], const struct outputs o[2], float scale, const void *added, void *out,
                       int64_t row, const struct matrix *m, int relu, int bf16, int kind) {
    if (!bf16 || added) {
        for (int v = 0; v < 2; v++) write_sums(sum[v], &o[v], scale, added, out, row, m, relu, bf16, kind);
        return;
    }
    floats low = finished(sum[0], o, scale, relu, kind), high = finished(sum[1], o + 1, scale, relu, kind);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    __mmask32 first = o[0].first | (__mmask32)o[1].first << 16;
    _mm512_mask_storeu_epi16((void *)at(out, row * m->outputs + o->place, 1), first, both);
}
#else
INLINE int has_units(void) { return 0; }
#endif

/* Gradients of norms and of biases. Sums are float and have one order, whatever the number of threads. */
#include "norms.h"

/* Columns from `first` to before `last` of the sums of rows x [rows, width], to sums [last - first] of float. */
INLINE void add_rows(const void *x, int64_t rows, int64_t width, int64_t first, int64_t last, float *sums, int bf16) {
    int64_t columns = last - first, whole = columns / 32 * 32;
    memset(sums, 0, columns * sizeof *sums);
    for (int64_t row = 0; row < rows; row += 4) {
        int64_t count = rows - row < 4 ? rows - row : 4, place = row * width + first;
        for (int64_t i = 0; i < whole; i += 32) { /* four rows at a time: sums are read and written less often */
            pair y = read_pair(x, place + i, bf16);
            for (int64_t n = 1; n < count; n++) y = add(y, read_pair(x, place + n * width + i, bf16));
            write_pair(sums, i, add(read_pair(sums, i, 0), y), 0);
        }
        for (int64_t i = whole; i < columns; i++)
            for (int64_t n = 0; n < count; n++) sums[i] += read_one(x, place + n * width + i, bf16);
    }
}

/* Sums [count] as pairs have them, of bfloat16 32 even and odd places one after the other, to out [count] in order. */
static void write_sums(const float *sums, int64_t count, void *out, int64_t start, int bf16) {
    for (int64_t i = 0; i < count; i++) {
        int64_t odd = i % 2 * 16, place = bf16 && i < count / 32 * 32 ? i / 32 * 32 + odd + i % 32 / 2 : i;
        write_one(out, start + i, sums[place], bf16);
    }
}

/* Sums of the columns of x [rows, width] from `first` to before `last`, to the same columns of out [width]. */
void sum_rows(const void *x, int64_t rows, int64_t width, int64_t first, int64_t last, void *out, int bf16) {
    enum { MOST = 1024 }; /* columns at a time, whose sums stay in the first cache */
    float sums[MOST];
    for (int64_t start = first; start < last; start += MOST) {
        int64_t end = start + MOST < last ? start + MOST : last;
        BY_TYPE(add_rows, x, rows, width, start, end, sums);
        write_sums(sums, end - start, out, start, bf16);
    }
}

/* Rows of x from `row` on, four at most: their own gradient, and to sums [2, width] more is added, as pairs. */
INLINE void norm_rows_gradient(const void *x, const void *outer, int64_t row, int64_t rows, int64_t width,
                               const void *weight, float epsilon, int centred, void *by_x, float *sums, int count,
                               int bf16) {
    struct some f = some_rows(x, row, rows, width, count, bf16), o = some_rows(outer, row, rows, width, count, bf16);
    floats pulls[4] = {{0}}, turns[4] = {{0}};
    float mean[4], by[4], pull[4], turn[4];
    moments(&f, width, epsilon, centred, mean, by, count, bf16);
    for (int64_t i = 0; i < width; i += 32) {
        pair w = read_pair(weight, i, bf16);
        for (int64_t n = 0; n < count; n++) {
            pair y = centred_pair(f.rows[n], i, mean[n], bf16), g = read_pair(o.rows[n], i, bf16);
            g.a *= w.a;
            g.b *= w.b;
            pulls[n] += g.a + g.b;
            turns[n] += g.a * y.a + g.b * y.b;
        }
    }
    four_sums(pulls, pull);
    four_sums(turns, turn);
    for (int64_t n = 0; n < count; n++) {
        pull[n] = centred ? pull[n] / width : 0;
        turn[n] = turn[n] * by[n] / width;
    }
    for (int64_t n = 0; n < count && row + n < rows; n++)
        for (int64_t i = 0; i < width; i += 32) {
            pair y = centred_pair(f.rows[n], i, mean[n], bf16), g = read_pair(o.rows[n], i, bf16);
            pair w = read_pair(weight, i, bf16), by_weight = read_pair(sums, i, 0);
            y.a *= by[n];
            y.b *= by[n];
            by_weight.a += g.a * y.a;
            by_weight.b += g.b * y.b;
            write_pair(sums, i, by_weight, 0);
            write_pair(sums, width + i, add(read_pair(sums, width + i, 0), g), 0);
            pair found = {(g.a * w.a - pull[n] - y.a * turn[n]) * by[n], (g.b * w.b - pull[n] - y.b * turn[n]) * by[n]};
            write_pair(by_x, (row + n) * width + i, found, bf16);
        }
}

/* The gradient of `norm` by rows x [rows, width], to by_x, where `outer` is that by its output; and what every `block`
 * rows, a multiple of four, add to those by weight and bias, to sums [rows / block, 2, width], which are zero before. */
void norm_gradient(const void *x, const void *outer, int64_t rows, int64_t width, const void *weight, float epsilon,
                   int centred, int64_t block, void *by_x, float *sums, int bf16) {
    int is_short = width * (bf16 ? 2 : 4) <= SHORT;
    for (int64_t row = 0; row < rows; row += is_short ? 4 : 1) {
        float *its = sums + row / block * 2 * width;
        if (is_short) BY_TYPE(norm_rows_gradient, x, outer, row, rows, width, weight, epsilon, centred, by_x, its, 4);
        else BY_TYPE(norm_rows_gradient, x, outer, row, rows, width, weight, epsilon, centred, by_x, its, 1);
    }
}

/* To out [count] the sum of sums [blocks, count], which are spoilt. */
void add_blocks(float *sums, int64_t blocks, int64_t count, void *out, int bf16) {
    for (int64_t block = 1; block < blocks; block++)
        for (int64_t i = 0; i < count; i++) sums[i] += sums[block * count + i];
    write_sums(sums, count, out, 0, bf16);
}

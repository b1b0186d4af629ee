/* Gradients of norms. Sums are float and have one order, whatever the number of threads. */
#include "norms.h"

/* Rows of x from `row` on, four at most: their own gradient, and to sums [2, width] more is added, as pairs. */
INLINE void norm_rows_gradient(const void *x, const void *outer, int64_t row, int64_t rows, int64_t width,
                               const void *weight, float epsilon, int centred, void *by_x, float *sums, int count,
                               int bf16) {
    struct some f = some_rows(x, row, rows, width, count, bf16), o = some_rows(outer, row, rows, width, count, bf16);
    floats pulls[4] = {{0}}, turns[4] = {{0}};
    float mean[4], by[4], pull[4], turn[4];
    moments(&f, width, epsilon, centred, mean, by, count, bf16);
    for (int64_t i = 0; i < width; i += PAIR) {
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
        for (int64_t i = 0; i < width; i += PAIR) {
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

/* To out [count], a multiple of 32, the sum of sums [blocks, count], which are spoilt. They stand as pairs do: of
 * bfloat16 even and odd places one after the other. */
void add_blocks(float *sums, int64_t blocks, int64_t count, void *out, int bf16) {
    for (int64_t block = 1; block < blocks; block++)
        for (int64_t i = 0; i < count; i++) sums[i] += sums[block * count + i];
    for (int64_t i = 0; i < count; i += PAIR) write_pair(out, i, read_pair(sums, i, 0), bf16);
}

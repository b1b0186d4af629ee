/* Norms go through four short rows at a time, since most of one is waiting for its sums; long ones, in turn. */
#pragma once
#include "vectors.h"

#define SHORT 1024 /* bytes */

/* `count` rows, 1 or 4, of x [rows, width] from `row` on; those past the end are the first of them again. */
struct some {
    const void *rows[4];
};

INLINE struct some some_rows(const void *x, int64_t row, int64_t rows, int64_t width, int count, int bf16) {
    struct some f;
    for (int64_t n = 0; n < count; n++) f.rows[n] = at(x, (row + n < rows ? row + n : row) * width, bf16);
    return f;
}

INLINE pair centred_pair(const void *row, int64_t i, float mean, int bf16) {
    pair x = read_pair(row, i, bf16);
    return (pair){x.a - mean, x.b - mean};
}

/* To mean and by [4] the mean of each row, 0 if they are not `centred`, and one over its root mean square without that. */
INLINE void moments(const struct some *f, int64_t width, float epsilon, int centred, float *mean, float *by, int count,
                    int bf16) {
    floats sums[4] = {{0}}, squares[4] = {{0}};
    for (int64_t i = 0; centred && i < width; i += PAIR)
        for (int64_t n = 0; n < count; n++) {
            pair x = read_pair(f->rows[n], i, bf16);
            sums[n] += x.a + x.b;
        }
    four_sums(sums, mean);
    for (int64_t n = 0; n < count; n++) mean[n] /= width;
    for (int64_t i = 0; i < width; i += PAIR)
        for (int64_t n = 0; n < count; n++) {
            pair x = centred_pair(f->rows[n], i, mean[n], bf16);
            squares[n] += x.a * x.a + x.b * x.b;
        }
    four_sums(squares, by);
    for (int64_t n = 0; n < count; n++) by[n] = 1 / sqrtf(by[n] / width + epsilon);
}

/* Losses of rows of logits, and their gradients. */
#include "vectors.h"

/* 32 numbers of which the row ends at `end`; beyond stands `filler`. */
INLINE pair read_some(const void *from, int64_t place, int64_t end, float filler, int bf16) {
    if (place + 32 <= end) return read_pair(from, place, bf16);
    char some[128];
    write_pair(some, 0, (pair){all(filler), all(filler)}, bf16);
    memcpy(some, at(from, place, bf16), (end - place) * (bf16 ? 2 : 4));
    return read_pair(some, 0, bf16);
}

INLINE void write_some(void *to, int64_t place, int64_t end, pair x, int bf16) {
    if (place + 32 <= end) {
        write_pair(to, place, x, bf16);
        return;
    }
    char some[128];
    write_pair(some, 0, x, bf16);
    memcpy((void *)at(to, place, bf16), some, (end - place) * (bf16 ? 2 : 4));
}

/* 32 floats, as a pair of the other type has them. */
INLINE pair read_floats(const float *from, int64_t place, int64_t end, int bf16) {
    pair x = read_some(from, place, end, 0, 0);
    if (!bf16) return x;
    return (pair){MERGE(x.a, x.b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                  MERGE(x.a, x.b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

/* How a row is smoothed: a share of its probability is spread as `prior` [vocab] says, evenly if that is NULL. */
struct smoothing {
    float share;
    const float *prior;
};

INLINE float cost(const void *row, int64_t vocab, int64_t target, const struct smoothing *s, float weight, float scale,
                  void *gradient, int bf16) {
    const float *prior = s->prior;
    pair most = {all(-INFINITY), all(-INFINITY)}, total = {all(0), all(0)}, sum = total;
    for (int64_t i = 0; i < vocab; i += 32) {
        pair x = read_some(row, i, vocab, -INFINITY, bf16);
        most.a = larger(most.a, x.a);
        most.b = larger(most.b, x.b);
        if (i + 32 > vocab) x = read_some(row, i, vocab, 0, bf16);
        if (prior) {
            pair p = read_floats(prior, i, vocab, bf16);
            x.a *= p.a;
            x.b *= p.b;
        }
        total.a += x.a;
        total.b += x.b;
    }
    float best = largest_of(larger(most.a, most.b)), mean = sum_of(total.a + total.b), right = read_one(row, target, bf16);
    for (int64_t i = 0; i < vocab; i += 32) {
        pair x = read_some(row, i, vocab, -INFINITY, bf16);
        sum.a += exponential(x.a - best);
        sum.b += exponential(x.b - best);
    }
    /* Comparisons have passed over what is no number, the exponential over what is infinite. */
    float norm = mean == mean && fabsf(best) < INFINITY ? sum_of(sum.a + sum.b) : NAN;
    float by = weight / norm, even = s->share * weight / vocab;
    for (int64_t i = 0; i < vocab; i += 32) {
        pair x = read_some(row, i, vocab, -INFINITY, bf16);
        pair less = {all(even), all(even)};
        if (prior) {
            less = read_floats(prior, i, vocab, bf16);
            less.a *= s->share * weight;
            less.b *= s->share * weight;
        }
        x.a = (exponential(x.a - best) * by - less.a) * scale;
        x.b = (exponential(x.b - best) * by - less.b) * scale;
        write_some(gradient, i, vocab, x, bf16);
    }
    float its = prior ? s->share * weight * prior[target] : even;
    write_one(gradient, target, (expf(right - best) * by - its + (s->share - 1) * weight) * scale, bf16);
    mean = s->share ? (prior ? mean : mean / vocab) * s->share : 0;
    return (logf(norm) + best - (1 - s->share) * right - mean) * scale;
}

/* To losses [rows] the smoothed cross-entropy of rows of logits [rows, vocab] with target [rows], to gradient
 * [rows, vocab], which may be the logits themselves, `weight` times its gradient; each times the row's scale [rows], if
 * that is not NULL. A row that holds NaN or infinity has the loss NaN, and nothing else in its gradient. */
void cross_entropy(const void *logits, int64_t rows, int64_t vocab, const int64_t *target, const float *prior,
                   const float *scale, float share, float weight, float *losses, void *gradient, int bf16) {
    struct smoothing s = {share, prior};
    for (int64_t row = 0; row < rows; row++)
        losses[row] = BY_TYPE(cost, at(logits, row * vocab, bf16), vocab, target[row], &s, weight,
                              scale ? scale[row] : 1, (void *)at(gradient, row * vocab, bf16));
}

/* Losses of rows of logits, and their gradients. */
#include "vectors.h"

/* PAIR numbers of which the row ends at `end`; beyond stands `filler`. */
INLINE pair read_some(const void *from, int64_t place, int64_t end, float filler, int bf16) {
    if (place + PAIR <= end) return read_pair(from, place, bf16);
    char some[4 * PAIR];
    write_pair(some, 0, (pair){all(filler), all(filler)}, bf16);
    memcpy(some, at(from, place, bf16), (end - place) * (bf16 ? 2 : 4));
    return read_pair(some, 0, bf16);
}

INLINE void write_some(void *to, int64_t place, int64_t end, pair x, int bf16) {
    if (place + PAIR <= end) {
        write_pair(to, place, x, bf16);
        return;
    }
    char some[4 * PAIR];
    write_pair(some, 0, x, bf16);
    memcpy((void *)at(to, place, bf16), some, (end - place) * (bf16 ? 2 : 4));
}

/* PAIR floats, as a pair of the other type has them. */
INLINE pair read_floats(const float *from, int64_t place, int64_t end, int bf16) {
    pair x = read_some(from, place, end, 0, 0);
    if (!bf16) return x;
    return (pair){EVERY_OTHER(x.a, x.b, 0), EVERY_OTHER(x.a, x.b, 1)};
}

/* What rows should come to: their targets, of whose probability a share is spread as `prior` [vocab] says, evenly if that
 * is NULL. */
struct wanted {
    int64_t vocab;
    const float *prior;
    float share;
};

/* Of a row: its largest logit, the sum of exponentials over that, the target's logit, and the mean under the prior. */
struct known {
    float best, norm, right, mean;
};

INLINE struct known look(const void *row, int64_t target, const struct wanted *w, int bf16) {
    pair most = {all(-INFINITY), all(-INFINITY)}, total = {all(0), all(0)}, sum = total;
    for (int64_t i = 0; i < w->vocab; i += PAIR) {
        pair x = read_some(row, i, w->vocab, -INFINITY, bf16);
        most.a = larger(most.a, x.a);
        most.b = larger(most.b, x.b);
        if (i + PAIR > w->vocab) x = read_some(row, i, w->vocab, 0, bf16);
        if (w->prior) {
            pair p = read_floats(w->prior, i, w->vocab, bf16);
            x.a *= p.a;
            x.b *= p.b;
        }
        total.a += x.a;
        total.b += x.b;
    }
    float best = largest_of(larger(most.a, most.b)), mean = sum_of(total.a + total.b);
    for (int64_t i = 0; i < w->vocab; i += PAIR) {
        pair x = read_some(row, i, w->vocab, -INFINITY, bf16);
        sum.a += exponential(x.a - best);
        sum.b += exponential(x.b - best);
    }
    /* Comparisons have passed over what is no number, the exponential over what is infinite. */
    float norm = mean == mean && fabsf(best) < INFINITY ? sum_of(sum.a + sum.b) : NAN;
    return (struct known){best, norm, read_one(row, target, bf16), w->prior ? mean : mean / w->vocab};
}

INLINE float cost(const struct known *k, const struct wanted *w) {
    return logf(k->norm) + k->best - (1 - w->share) * k->right - (w->share ? w->share * k->mean : 0);
}

/* `weight` times what is wanted of PAIR tokens by the prior. */
INLINE pair wanted_share(const struct wanted *w, int64_t i, float weight, int bf16) {
    if (!w->prior) return (pair){all(w->share * weight / w->vocab), all(w->share * weight / w->vocab)};
    pair p = read_floats(w->prior, i, w->vocab, bf16);
    return (pair){p.a * (w->share * weight), p.b * (w->share * weight)};
}

INLINE float one_share(const struct wanted *w, int64_t target, float weight) {
    return w->share * weight * (w->prior ? w->prior[target] : 1.0f / w->vocab);
}

INLINE float cross_entropy_row(const void *row, int64_t target, const struct wanted *w, float weight, float scale,
                               void *gradient, int bf16) {
    struct known k = look(row, target, w, bf16);
    float by = weight / k.norm;
    for (int64_t i = 0; i < w->vocab; i += PAIR) {
        pair x = read_some(row, i, w->vocab, -INFINITY, bf16), less = wanted_share(w, i, weight, bf16);
        x.a = (exponential(x.a - k.best) * by - less.a) * scale;
        x.b = (exponential(x.b - k.best) * by - less.b) * scale;
        write_some(gradient, i, w->vocab, x, bf16);
    }
    float right = expf(k.right - k.best) * by - one_share(w, target, weight) - (1 - w->share) * weight;
    write_one(gradient, target, right * scale, bf16);
    return cost(&k, w) * scale;
}

/* To losses [rows] the smoothed cross-entropy of rows of logits [rows, vocab] with target [rows], to gradient
 * [rows, vocab] `weight` times its gradient; each times the row's scale [rows], if that is not NULL. A row that holds NaN
 * or infinity has the loss NaN, and nothing else in its gradient. */
void cross_entropy(const void *logits, int64_t rows, int64_t vocab, const int64_t *target, const float *prior,
                   const float *scale, float share, float weight, float *losses, void *gradient, int bf16) {
    struct wanted w = {vocab, prior, share};
    for (int64_t row = 0; row < rows; row++)
        losses[row] = BY_TYPE(cross_entropy_row, at(logits, row * vocab, bf16), target[row], &w, weight,
                              scale ? scale[row] : 1, (void *)at(gradient, row * vocab, bf16));
}

/* Of a token alone: `half` of its chance, and `share` of what pulls it to that of the other row. */
static float pulled(float x, const struct known *k, float y, const struct known *l, float ratio, float half,
                    float share) {
    float p = expf(x - k->best) / k->norm, q = expf(y - l->best) / l->norm;
    return p * half + share * (p * ratio - q);
}

/* Two rows with distributions p and q: half of their cross-entropy, and `pull` times KL(p, q) + KL(q, p).
 * Of KL(p, q) by the logits of p: p (ln p/q - KL); of KL(q, p): p - q. */
INLINE float agreement_rows(const void *first, const int64_t *target, const struct wanted *w, float pull, float weight,
                            void *gradient, int bf16) {
    const void *second = at(first, w->vocab, bf16);
    void *other = (void *)at(gradient, w->vocab, bf16);
    struct known k = look(first, target[0], w, bf16), l = look(second, target[1], w, bf16);
    pair sums[2] = {{{0}}};
    for (int64_t i = 0; i < w->vocab; i += PAIR) {
        pair x = read_some(first, i, w->vocab, -1e30f, bf16), y = read_some(second, i, w->vocab, -1e30f, bf16);
        sums[0].a += exponential(x.a - k.best) * (x.a - y.a);
        sums[0].b += exponential(x.b - k.best) * (x.b - y.b);
        sums[1].a += exponential(y.a - l.best) * (x.a - y.a);
        sums[1].b += exponential(y.b - l.best) * (x.b - y.b);
    }
    /* ln p/q is the difference of logits less this. */
    float less = k.best + logf(k.norm) - l.best - logf(l.norm);
    float forth = sum_of(sums[0].a + sums[0].b) / k.norm - less, back = less - sum_of(sums[1].a + sums[1].b) / l.norm;
    float by = 1 / k.norm, its = 1 / l.norm, half = weight / 2, share = weight * pull;
    for (int64_t i = 0; i < w->vocab; i += PAIR) {
        pair x = read_some(first, i, w->vocab, 0, bf16), y = read_some(second, i, w->vocab, 0, bf16);
        pair even = wanted_share(w, i, half, bf16);
        floats a[2] = {x.a, x.b}, b[2] = {y.a, y.b}, e[2] = {even.a, even.b};
        for (int n = 0; n < 2; n++) {
            floats p = exponential(a[n] - k.best) * by, q = exponential(b[n] - l.best) * its, ratio = a[n] - b[n] - less;
            a[n] = p * half - e[n] + share * (p * (ratio + (1 - forth)) - q);
            b[n] = q * half - e[n] + share * (q * ((1 - back) - ratio) - p);
        }
        write_some(gradient, i, w->vocab, (pair){a[0], a[1]}, bf16);
        write_some(other, i, w->vocab, (pair){b[0], b[1]}, bf16);
    }
    float its_other = read_one(second, target[0], bf16), others = read_one(first, target[1], bf16);
    float right = pulled(k.right, &k, its_other, &l, k.right - its_other - less + (1 - forth), half, share);
    write_one(gradient, target[0], right - one_share(w, target[0], half) - (1 - w->share) * half, bf16);
    right = pulled(l.right, &l, others, &k, l.right - others + less + (1 - back), half, share);
    write_one(other, target[1], right - one_share(w, target[1], half) - (1 - w->share) * half, bf16);
    return (cost(&k, w) + cost(&l, w)) / 2 + pull * (forth + back);
}

/* To losses [pairs] half of the cross-entropy of each two rows of logits [pairs, 2, vocab] with target [pairs, 2], plus
 * `pull` times the divergence of their distributions, both ways; to gradient as cross_entropy. */
void agreement(const void *logits, int64_t pairs, int64_t vocab, const int64_t *target, const float *prior, float share,
               float pull, float weight, float *losses, void *gradient, int bf16) {
    struct wanted w = {vocab, prior, share};
    for (int64_t row = 0; row < pairs; row++)
        losses[row] = BY_TYPE(agreement_rows, at(logits, 2 * row * vocab, bf16), target + 2 * row, &w, pull, weight,
                              (void *)at(gradient, 2 * row * vocab, bf16));
}

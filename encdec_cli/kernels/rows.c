/* Norms and attention, row by row. */
#include "kernels.h"
#include "norms.h"

INLINE void norm_rows(const void *x, int64_t row, int64_t rows, int64_t width, const void *weight, const void *bias,
                      float epsilon, int centred, void *out, int count, int bf16) {
    struct some f = some_rows(x, row, rows, width, count, bf16);
    float mean[4], by[4];
    moments(&f, width, epsilon, centred, mean, by, count, bf16);
    for (int64_t n = 0; n < count && row + n < rows; n++)
        for (int64_t i = 0; i < width; i += PAIR) {
            pair y = centred_pair(f.rows[n], i, mean[n], bf16), w = read_pair(weight, i, bf16);
            y.a = y.a * by[n] * w.a;
            y.b = y.b * by[n] * w.b;
            if (bias) y = add(y, read_pair(bias, i, bf16));
            write_pair(out, (row + n) * width + i, y, bf16);
        }
}

/* To out [rows, width] the rows of x less their mean (if centred), over their root mean square, times
 * weight [width], and bias [width], if it is not NULL, added. */
void norm(const void *x, int64_t rows, int64_t width, const void *weight, const void *bias, float epsilon, int centred,
          void *out, int bf16) {
    int is_short = width * (bf16 ? 2 : 4) <= SHORT;
    for (int64_t row = 0; row < rows; row += is_short ? 4 : 1)
        if (is_short) BY_TYPE(norm_rows, x, row, rows, width, weight, bias, epsilon, centred, out, 4);
        else BY_TYPE(norm_rows, x, row, rows, width, weight, bias, epsilon, centred, out, 1);
}

/* Mix the values of a head by its weights for one query. seen, extra: [count] keys and what to add to their scores. */
INLINE void mix(const void *query, const void *keys, const void *values, const int64_t *seen, const float *extra,
                int64_t count, float *weights, void *out, const struct attention *z, int64_t width, int bf16) {
    float best = -INFINITY, scale = 1 / sqrtf((float)width);
    pair q[width / PAIR];
    for (int64_t i = 0; i < width / PAIR; i++) q[i] = read_pair(query, i * PAIR, bf16);
    for (int64_t j = 0; j < count; j += 4) { /* four sums cost little more than one; those past the end are not used */
        floats sums[4];
        for (int64_t n = 0; n < 4; n++) {
            pair sum = {all(0), all(0)};
            int64_t key = seen[j + n < count ? j + n : j] * z->key[2];
            for (int64_t i = 0; i < width / PAIR; i++) {
                pair k = read_pair(keys, key + i * PAIR, bf16);
                sum.a += q[i].a * k.a;
                sum.b += q[i].b * k.b;
            }
            sums[n] = sum.a + sum.b;
        }
        four_sums(sums, weights + j);
    }
    for (int64_t j = 0; j < count; j++) {
        weights[j] = weights[j] * scale + extra[j];
        best = weights[j] > best ? weights[j] : best;
    }
    for (int64_t j = count; j < count + LANES; j++) weights[j] = -1e30f;
    floats sum = all(0);
    for (int64_t j = 0; j < count; j += LANES) {
        floats x;
        memcpy(&x, weights + j, sizeof x);
        x = exponential(x - best) + nothing(x);
        memcpy(weights + j, &x, sizeof x);
        sum += x;
    }
    float share = 1 / sum_of(sum);
    pair mixed[width / PAIR];
    for (int64_t i = 0; i < width / PAIR; i++) mixed[i].a = mixed[i].b = all(0);
    for (int64_t j = 0; j < count; j++)
        for (int64_t i = 0; i < width / PAIR; i++) {
            pair v = read_pair(values, seen[j] * z->value[2] + i * PAIR, bf16);
            mixed[i].a += weights[j] * v.a;
            mixed[i].b += weights[j] * v.b;
        }
    for (int64_t i = 0; i < width / PAIR; i++) {
        mixed[i].a *= share;
        mixed[i].b *= share;
        write_pair(out, i * PAIR, mixed[i], bf16);
    }
}

/* With usual widths known to the compiler, what loops over them stays in registers. */
#define BY_WIDTH(...) \
    (z->width == 64 ? BY_TYPE(mix, __VA_ARGS__, 64) \
                    : z->width == 32 ? BY_TYPE(mix, __VA_ARGS__, 32) : BY_TYPE(mix, __VA_ARGS__, z->width))

/* softmax(query keys^T / sqrt(width) + bias) values, to out [sentences, queries, heads, width]. Keys whose bias is as
 * good as minus infinity are not looked at: most of them are, where the rows of a sentence share their keys. */
void attend(const void *query, const void *keys, const void *values, const void *bias, void *out,
            const struct attention *z, int bf16) {
    float weights[z->keys + LANES], extra[z->keys + 1];
    int64_t seen[z->keys + 1];
    for (int64_t place = 0; place < z->sentences * z->queries; place++) {
        int64_t sentence = place / z->queries, row = place % z->queries, count = 0;
        for (int64_t j = 0; bias && j < z->keys; j++) {
            extra[count] = read_one(bias, sentence * z->bias[0] + row * z->bias[1] + j, bf16);
            seen[count] = j;
            count += extra[count] > -1e37f;
        }
        if (count == 0) /* nothing is masked, or all is, and then a query looks everywhere */
            for (; count < z->keys; count++) seen[count] = count, extra[count] = 0;
        for (int64_t head = 0; head < z->heads; head++)
            BY_WIDTH(at(query, sentence * z->query[0] + head * z->query[1] + row * z->query[2], bf16),
                    at(keys, sentence * z->key[0] + head * z->key[1], bf16),
                    at(values, sentence * z->value[0] + head * z->value[1], bf16), seen, extra, count, weights,
                    (void *)at(out, (place * z->heads + head) * z->width, bf16), z);
    }
}

/* The inner loops of a step of decoding that torch's operators do in many passes: see kernels.py.
 *
 * Numbers are float or bfloat16 (`bf16`), always computed with as float. Every row is computed apart from all others,
 * in one order, so it has the same bits in every batch. Vectors are those of GCC and Clang, for any processor.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))
/* One function for both types; the compiler makes two of it. */
#define BY_TYPE(call, ...) (bf16 ? call(__VA_ARGS__, 1) : call(__VA_ARGS__, 0))
#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (ints){__VA_ARGS__})
#endif

/* 32 numbers: of bfloat16 those at even places and those at odd places, else the first and the last half. */
typedef struct {
    floats a, b;
} pair;

INLINE const void *at(const void *from, int64_t place, int bf16) {
    return (const char *)from + place * (bf16 ? 2 : 4);
}

INLINE pair read_pair(const void *from, int64_t place, int bf16) {
    pair x;
    if (bf16) {
        words both;
        memcpy(&both, at(from, place, bf16), sizeof both);
        x.a = (floats)(both << 16);
        x.b = (floats)(both & 0xffff0000u);
    } else {
        memcpy(&x.a, at(from, place, bf16), sizeof x.a);
        memcpy(&x.b, at(from, place + 16, bf16), sizeof x.b);
    }
    return x;
}

INLINE void write_pair(void *to, int64_t place, pair x, int bf16) {
    void *target = (void *)at(to, place, bf16);
    if (bf16) { /* rounded to nearest, ties to even */
        words a = (words)x.a, b = (words)x.b;
        a += 0x7fff + ((a >> 16) & 1);
        b += 0x7fff + ((b >> 16) & 1);
        words both = (a >> 16) | (b & 0xffff0000u);
        memcpy(target, &both, sizeof both);
    } else {
        memcpy(target, &x, sizeof x);
    }
}

INLINE float read_one(const void *from, int64_t place, int bf16) {
    float x;
    if (bf16) {
        uint32_t word = (uint32_t)((const uint16_t *)from)[place] << 16;
        memcpy(&x, &word, sizeof x);
    } else {
        x = ((const float *)from)[place];
    }
    return x;
}

INLINE floats all(float x) { return x - (floats){0}; }

INLINE floats larger(floats x, floats y) {
    ints first = x > y;
    return (floats)(((ints)x & first) | ((ints)y & ~first));
}

INLINE float sum_of(floats x) {
    x += SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    return (x[0] + x[2]) + (x[1] + x[3]);
}

INLINE ints higher(ints x, ints y) {
    ints first = x > y;
    return (x & first) | (y & ~first);
}

INLINE int32_t highest_of(ints x) {
    x = higher(x, SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = higher(x, SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    int32_t first = x[0] > x[1] ? x[0] : x[1], second = x[2] > x[3] ? x[2] : x[3];
    return first > second ? first : second;
}

INLINE float largest_of(floats x) {
    x = larger(x, SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    float first = x[0] > x[1] ? x[0] : x[1], second = x[2] > x[3] ? x[2] : x[3];
    return first > second ? first : second;
}

/* Added to a float of less than 2^22, it rounds it to an integer, which then stands in the lowest bits. */
#define ROUNDER 12582912.0f
#define ROUNDER_BITS 0x4b400000u

/* The exponential of numbers that are at most 0: 2^whole by the exponent, 2^part by a polynomial (to 1e-7). */
INLINE floats exponential(floats x) {
    floats power = larger(x, all(-87.0f)) * 1.44269504f;
    floats whole = power + ROUNDER;
    floats part = power - (whole - ROUNDER);
    floats y = part * 1.32765e-3f + 9.67554e-3f;
    y = y * part + 5.550713e-2f;
    y = y * part + 2.402212e-1f;
    y = y * part + 6.9314697e-1f;
    y = y * part + 1.00000007f;
    return (floats)((ints)y + ((ints)whole << 23));
}

/* 0, but NaN of what is NaN or infinity, which comparisons and the exponential would hide; -infinity is a ban. */
INLINE floats nothing(floats x) { return (floats)((ints)(x - x) & ~(x == all(-INFINITY))); }

INLINE void scan_row(const void *row, int64_t vocab, float *normaliser, float *maxima, int bf16) {
    int64_t whole = vocab / CHUNK;
    float best = -INFINITY, rest = 0;
    for (int64_t chunk = 0; chunk < whole; chunk++) {
        pair x = read_pair(row, chunk * CHUNK, bf16), y = read_pair(row, chunk * CHUNK + 32, bf16);
        maxima[chunk] = largest_of(larger(larger(x.a, x.b), larger(y.a, y.b)));
        best = maxima[chunk] > best ? maxima[chunk] : best;
    }
    if (vocab % CHUNK) {
        maxima[whole] = -INFINITY;
        for (int64_t token = whole * CHUNK; token < vocab; token++) {
            float x = read_one(row, token, bf16);
            maxima[whole] = x > maxima[whole] ? x : maxima[whole];
        }
        best = maxima[whole] > best ? maxima[whole] : best;
        for (int64_t token = whole * CHUNK; token < vocab; token++) rest += expf(read_one(row, token, bf16) - best);
    }
    pair sum = {all(0), all(0)};
    for (int64_t token = 0; token < whole * CHUNK; token += 32) {
        pair x = read_pair(row, token, bf16);
        sum.a += exponential(x.a - best) + nothing(x.a);
        sum.b += exponential(x.b - best) + nothing(x.b);
    }
    *normaliser = best + logf(sum_of(sum.a + sum.b) + rest);
}

/* logits: [rows, vocab]; to normaliser [rows] the log of the sum of exponentials, to maxima [rows, chunks] the largest
 * of each CHUNK of logits. */
void scan(const void *logits, int64_t rows, int64_t vocab, float *normaliser, float *maxima, int bf16) {
    int64_t chunks = (vocab + CHUNK - 1) / CHUNK;
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(scan_row, at(logits, row * vocab, bf16), vocab, normaliser + row, maxima + row * chunks);
}

/* The k best of each sentence's beam x vocab continuations: [sentences, k] values, rows of the sentence and tokens. */
void candidates(const void *logits, const float *normaliser, const float *maxima, const float *totals,
                int64_t sentences, int64_t beam, int64_t vocab, int64_t k, float *values, int64_t *parents,
                int64_t *tokens, int bf16) {
    int64_t chunks = (vocab + CHUNK - 1) / CHUNK;
    for (int64_t row = 0; row < sentences * beam; row++) {
        int64_t place = row / beam * k, count = row % beam * vocab < k ? row % beam * vocab : k;
        float *best = values + place, total = totals[row], norm = normaliser[row];
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            /* What is found later has a higher row or token, so it must be better to take a place. */
            if (count == k && !(total + (maxima[row * chunks + chunk] - norm) > best[k - 1])) continue;
            int64_t end = (chunk + 1) * CHUNK < vocab ? (chunk + 1) * CHUNK : vocab;
            for (int64_t token = chunk * CHUNK; token < end; token++) {
                float value = total + (read_one(logits, row * vocab + token, bf16) - norm);
                if (count == k && !(value > best[k - 1])) continue;
                int64_t rank = count < k ? count++ : k - 1;
                for (; rank > 0 && value > best[rank - 1]; rank--) {
                    best[rank] = best[rank - 1];
                    parents[place + rank] = parents[place + rank - 1];
                    tokens[place + rank] = tokens[place + rank - 1];
                }
                best[rank] = value;
                parents[place + rank] = row % beam;
                tokens[place + rank] = token;
            }
        }
    }
    for (int64_t row = 0; row < sentences * beam; row++) /* comparisons have passed over what is no number */
        for (int64_t i = 0; normaliser[row] != normaliser[row] && i < k; i++) values[row / beam * k + i] = NAN;
}

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

/* x: [rows, width]; to levels [rows, width] 128 + what of -127 to 127 is nearest to x / scale, to scales [rows] these. */
void quantise(const void *x, int64_t rows, int64_t width, uint8_t *levels, float *scales, int bf16) {
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(quantise_row, at(x, row * width, bf16), width, levels + row * width, scales + row);
}

INLINE void rescale_row(void *row, int64_t width, float scale, const void *bias, int bf16) {
    for (int64_t i = 0; i < width; i += 32) {
        pair x = read_pair(row, i, bf16);
        x.a *= scale;
        x.b *= scale;
        if (bias) {
            pair y = read_pair(bias, i, bf16);
            x.a += y.a;
            x.b += y.b;
        }
        write_pair(row, i, x, bf16);
    }
}

/* x [rows, width] becomes x scales[:, None] + bias; bias: [width] of x's type, or NULL. */
void rescale(void *x, int64_t rows, int64_t width, const float *scales, const void *bias, int bf16) {
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(rescale_row, (void *)at(x, row * width, bf16), width, scales[row], bias);
}

INLINE void norm_row(const void *row, int64_t width, const void *weight, const void *bias, float epsilon, int centred,
                     void *out, int bf16) {
    floats sum = all(0), squares = all(0);
    for (int64_t i = 0; centred && i < width; i += 32) {
        pair x = read_pair(row, i, bf16);
        sum += x.a + x.b;
    }
    float mean = sum_of(sum) / width;
    for (int64_t i = 0; i < width; i += 32) {
        pair x = read_pair(row, i, bf16);
        x.a -= mean;
        x.b -= mean;
        squares += x.a * x.a + x.b * x.b;
    }
    float by = 1 / sqrtf(sum_of(squares) / width + epsilon);
    for (int64_t i = 0; i < width; i += 32) {
        pair x = read_pair(row, i, bf16), w = read_pair(weight, i, bf16);
        x.a = (x.a - mean) * by * w.a;
        x.b = (x.b - mean) * by * w.b;
        if (bias) {
            pair y = read_pair(bias, i, bf16);
            x.a += y.a;
            x.b += y.b;
        }
        write_pair(out, i, x, bf16);
    }
}

/* To out [rows, width] the rows of x less their mean (if centred), over their root mean square, times weight [width],
 * and bias [width], if it is not NULL, added. */
void norm(const void *x, int64_t rows, int64_t width, const void *weight, const void *bias, float epsilon, int centred,
          void *out, int bf16) {
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(norm_row, at(x, row * width, bf16), width, weight, bias, epsilon, centred,
                (void *)at(out, row * width, bf16));
}

/* Shapes and strides, in elements, of a call of `attend`; the last dimension of every tensor is dense. */
struct attention {
    int64_t sentences, heads, queries, keys, width;
    int64_t query[3], key[3], value[3]; /* of sentences, heads, places */
    int64_t bias[2];                    /* of sentences, queries */
};

/* Mix the values of a head by its weights for one query. seen, extra: [count] keys and what to add to their scores. */
INLINE void mix(const void *query, const void *keys, const void *values, const int64_t *seen, const float *extra,
                int64_t count, float *weights, void *out, const struct attention *z, int64_t width, int bf16) {
    float best = -INFINITY, scale = 1 / sqrtf((float)width);
    pair q[width / 32];
    for (int64_t i = 0; i < width / 32; i++) q[i] = read_pair(query, i * 32, bf16);
    for (int64_t j = 0; j < count; j++) {
        pair sum = {all(0), all(0)};
        for (int64_t i = 0; i < width / 32; i++) {
            pair k = read_pair(keys, seen[j] * z->key[2] + i * 32, bf16);
            sum.a += q[i].a * k.a;
            sum.b += q[i].b * k.b;
        }
        weights[j] = sum_of(sum.a + sum.b) * scale + extra[j];
        best = weights[j] > best ? weights[j] : best;
    }
    for (int64_t j = count; j < count + 16; j++) weights[j] = -1e30f;
    floats sum = all(0);
    for (int64_t j = 0; j < count; j += 16) {
        floats x;
        memcpy(&x, weights + j, sizeof x);
        x = exponential(x - best) + nothing(x);
        memcpy(weights + j, &x, sizeof x);
        sum += x;
    }
    float share = 1 / sum_of(sum);
    pair mixed[width / 32];
    for (int64_t i = 0; i < width / 32; i++) mixed[i].a = mixed[i].b = all(0);
    for (int64_t j = 0; j < count; j++)
        for (int64_t i = 0; i < width / 32; i++) {
            pair v = read_pair(values, seen[j] * z->value[2] + i * 32, bf16);
            mixed[i].a += weights[j] * v.a;
            mixed[i].b += weights[j] * v.b;
        }
    for (int64_t i = 0; i < width / 32; i++) {
        mixed[i].a *= share;
        mixed[i].b *= share;
        write_pair(out, i * 32, mixed[i], bf16);
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
    float weights[z->keys + 16], extra[z->keys + 1];
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

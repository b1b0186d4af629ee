/* Attention for training: forward and backward, a head of a sentence at a time, whose numbers all stay in the cache.
 *
 * Everything is computed in float; weights are computed a second time in the backward pass, not kept. Sums grow in one
 * order, whatever else is computed beside them.
 */
#include <stdlib.h>
#include "kernels.h"
#include "vectors.h"

#if defined __AVX512F__ || (defined __AVX2__ && defined __FMA__) /* else torch is the faster one */
#define MOST_ROWS 12
#define MOST_VECTORS (LANES == 16 ? 4 : 2)
#define SUMS (LANES == 16 ? 24 : 12) /* what fits into the registers */
#define ROWS(vectors) (SUMS / vectors < MOST_ROWS ? SUMS / vectors : MOST_ROWS)
#if LANES == 16
#define BY_ALL BY(1) BY(2) BY(3) BY(4)
#else
#define BY_ALL BY(1) BY(2)
#endif
#define UNROLL _Pragma("GCC unroll 16")
#define IN_REGISTER(x) __asm__("" : "+v"(x))

INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

INLINE floats read_vector(const void *from, int64_t place, int bf16) {
    floats x;
    if (bf16) {
        shorts half;
        memcpy(&half, at(from, place, bf16), sizeof half);
        x = (floats)(__builtin_convertvector(half, words) << 16);
    } else {
        memcpy(&x, at(from, place, bf16), sizeof x);
    }
    return x;
}

INLINE void write_vector(void *to, int64_t place, floats x, int bf16) {
    void *target = (void *)at(to, place, bf16);
    if (bf16) { /* rounded to nearest, ties to even; what is no number stays none */
        words bits = (words)x;
        words round = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        words odd = (words)(x != x);
        shorts half = __builtin_convertvector((round & ~odd) | (odd & 0x7fc0), shorts);
        memcpy(target, &half, sizeof half);
    } else {
        memcpy(target, &x, sizeof x);
    }
}

/* To `to` [count, width] some rows of `from`, `stride` apart, times `by`. */
INLINE void read_rows(const void *from, int64_t stride, int64_t count, int64_t width, float by, float *to, int bf16) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            floats x = read_vector(from, row * stride + i, bf16) * by;
            memcpy(to + row * width + i, &x, sizeof x);
        }
}

INLINE void write_rows(const float *from, int64_t count, int64_t width, float by, void *to, int64_t stride, int bf16) {
    for (int64_t row = 0; row < count; row++)
        for (int64_t i = 0; i < width; i += LANES) {
            floats x;
            memcpy(&x, from + row * width + i, sizeof x);
            write_vector(to, row * stride + i, x * by, bf16);
        }
}

/* To `to` [width, padded(count)] what stands in rows [count, width], with zeros after the last. */
static void turn(const float *rows, int64_t count, int64_t width, float *to) {
    int64_t length = padded(count);
    for (int64_t first = 0; first < count; first += LANES)
        for (int64_t place = 0; place < width; place += LANES) {
            floats r[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                r[i] = all(0);
                if (first + i < count) memcpy(&r[i], rows + (first + i) * width + place, sizeof r[i]);
            }
            turn_block(r);
            for (int64_t i = 0; i < LANES; i++) memcpy(to + (place + i) * length + first, &r[i], sizeof r[i]);
        }
}

/* A factor whose numbers are taken one by one: that of row r and term k stands at r x row + k x term. */
struct factor {
    const float *from;
    int64_t row, term;
};

INLINE void tile(struct factor a, int64_t terms, const float *b, int64_t width, float *to, int rows, int vectors) {
    floats sum[MOST_ROWS][MOST_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = all(0);
    for (int64_t k = 0; k < terms; k++) {
        floats y[MOST_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) {
            memcpy(&y[v], b + k * width + v * LANES, sizeof y[v]);
            IN_REGISTER(y[v]);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            floats x = all(a.from[r * a.row + k * a.term]);
            IN_REGISTER(x);
            UNROLL for (int v = 0; v < vectors; v++) {
                sum[r][v] += x * y[v];
                IN_REGISTER(sum[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) memcpy(to + r * width + v * LANES, &sum[r][v], sizeof sum[r][v]);
}

#define ONE(n, v) \
    case n: if (n <= ROWS(v)) tile(left, terms, b + place, width, to + row * width + place, n, v); break;
#define ALL(v) \
    ONE(1, v) ONE(2, v) ONE(3, v) ONE(4, v) ONE(5, v) ONE(6, v) ONE(7, v) ONE(8, v) ONE(9, v) ONE(10, v) ONE(11, v) \
    ONE(12, v)
#define BY(v) \
    case v: \
        for (int64_t row = 0, count; row < rows; row += count) { \
            struct factor left = {a.from + row * a.row, a.row, a.term}; \
            count = rows - row > ROWS(v) ? ROWS(v) : rows - row; \
            switch (count) { ALL(v) } \
        } \
        break;

/* To `to` [rows, width] the product of a [rows, terms] and b [terms, width]; the width in whole vectors. */
static void multiply(struct factor a, int64_t rows, int64_t terms, const float *b, int64_t width, float *to) {
    for (int64_t place = 0; place < width; place += MOST_VECTORS * LANES)
        switch (width - place > MOST_VECTORS * LANES ? MOST_VECTORS : (width - place) / LANES) { BY_ALL }
}

/* To `weights` [queries, padded(keys)] the scores with the mask added, and -infinity after the last. */
INLINE void mask(float *weights, const void *bias, const struct attention_training *z, int bf16) {
    int64_t length = padded(z->keys);
    for (int64_t i = 0; i < z->queries; i++) {
        float *row = weights + i * length;
        int64_t end = z->causal ? i + 1 + z->keys - z->queries : z->keys;
        for (int64_t j = 0; bias && j < end; j++) row[j] += read_one(bias, i * z->bias[1] + j, bf16);
        for (int64_t j = end; j < length; j++) row[j] = -INFINITY;
    }
}

/* In the place of a row's scores the exponentials of what they are above `most`; what is masked by -infinity is 0. */
INLINE void exponentials(float *row, int64_t length, float most) {
    for (int64_t j = 0; j < length; j += LANES) {
        floats x;
        memcpy(&x, row + j, sizeof x);
        ints seen = x != all(-INFINITY);
        x = (floats)((ints)(exponential(x - most) + nothing(x)) & seen);
        memcpy(row + j, &x, sizeof x);
    }
}

struct room {
    float *queries, *keys, *values, *turned, *outer, *weights, *changes, *out;
};

/* Memory for what is computed of a head; NULL in `queries` if there is none. */
static struct room make_room(const struct attention_training *z) {
    int64_t length = padded(z->keys), rows = z->queries > length ? z->queries : length;
    int64_t matrix = rows * z->width, square = z->queries * length;
    struct room room = {0};
    if (posix_memalign((void **)&room.queries, 64, sizeof(float) * (6 * matrix + 2 * square))) return room;
    room.keys = room.queries + matrix;
    room.values = room.keys + matrix;
    room.turned = room.values + matrix;
    room.outer = room.turned + matrix;
    room.out = room.outer + matrix;
    room.weights = room.out + matrix;
    room.changes = room.weights + square;
    return room;
}

struct head {
    const void *query, *keys, *values, *bias, *outer;
    void *out, *query_change, *keys_change, *values_change;
    float *sums; /* [queries, 2]: the largest score, and 1 over the sum of the exponentials */
};

/* To room.weights the scores of a head; queries and keys stay in the room. */
INLINE void score(const struct head *h, const struct attention_training *z, struct room *room, int bf16) {
    int64_t length = padded(z->keys), width = z->width;
    read_rows(h->query, z->query[2], z->queries, width, 1 / sqrtf((float)width), room->queries, bf16);
    read_rows(h->keys, z->key[2], z->keys, width, 1, room->keys, bf16);
    turn(room->keys, z->keys, width, room->turned);
    multiply((struct factor){room->queries, width, 1}, z->queries, width, room->turned, length, room->weights);
    mask(room->weights, h->bias, z, bf16);
}

INLINE void forward(const struct head *h, const struct attention_training *z, struct room *room, int bf16) {
    int64_t length = padded(z->keys), width = z->width;
    score(h, z, room, bf16);
    read_rows(h->values, z->value[2], z->keys, width, 1, room->values, bf16);
    for (int64_t i = 0; i < z->queries; i++) {
        float *row = room->weights + i * length;
        floats most = all(-INFINITY), sum = all(0), x;
        for (int64_t j = 0; j < length; j += LANES) {
            memcpy(&x, row + j, sizeof x);
            most = larger(x, most);
        }
        h->sums[2 * i] = largest_of(most);
        exponentials(row, length, h->sums[2 * i]);
        for (int64_t j = 0; j < length; j += LANES) {
            memcpy(&x, row + j, sizeof x);
            sum += x;
        }
        h->sums[2 * i + 1] = 1 / sum_of(sum);
    }
    multiply((struct factor){room->weights, length, 1}, z->queries, z->keys, room->values, width, room->out);
    for (int64_t i = 0; i < z->queries; i++)
        write_rows(room->out + i * width, 1, width, h->sums[2 * i + 1], (void *)at(h->out, i * z->out[2], bf16), 0,
                   bf16);
}

INLINE void backward(const struct head *h, const struct attention_training *z, struct room *room, int bf16) {
    int64_t length = padded(z->keys), width = z->width;
    score(h, z, room, bf16);
    read_rows(h->outer, z->out[2], z->queries, width, 1, room->outer, bf16);
    read_rows(h->values, z->value[2], z->keys, width, 1, room->values, bf16);
    turn(room->values, z->keys, width, room->turned);
    multiply((struct factor){room->outer, width, 1}, z->queries, width, room->turned, length, room->changes);
    for (int64_t i = 0; i < z->queries; i++) {
        float *row = room->weights + i * length, *changes = room->changes + i * length;
        floats sum = all(0), x, y;
        exponentials(row, length, h->sums[2 * i]);
        for (int64_t j = 0; j < length; j += LANES) {
            memcpy(&x, row + j, sizeof x);
            memcpy(&y, changes + j, sizeof y);
            x *= h->sums[2 * i + 1];
            sum += x * y;
            memcpy(row + j, &x, sizeof x);
        }
        float mean = sum_of(sum);
        for (int64_t j = 0; j < length; j += LANES) {
            memcpy(&x, row + j, sizeof x);
            memcpy(&y, changes + j, sizeof y);
            y = x * (y - mean);
            memcpy(changes + j, &y, sizeof y);
        }
    }
    struct factor changes = {room->changes, length, 1}, by_key = {room->changes, 1, length};
    multiply(changes, z->queries, z->keys, room->keys, width, room->out);
    write_rows(room->out, z->queries, width, 1 / sqrtf((float)width), h->query_change, z->query_change[2], bf16);
    multiply(by_key, z->keys, z->queries, room->queries, width, room->out); /* those queries are scaled already */
    write_rows(room->out, z->keys, width, 1, h->keys_change, z->key_change[2], bf16);
    multiply((struct factor){room->weights, 1, length}, z->keys, z->queries, room->outer, width, room->out);
    write_rows(room->out, z->keys, width, 1, h->values_change, z->value_change[2], bf16);
}

/* See kernels.h. */
int attend_in_training(const struct attention_training *z, int64_t first, int64_t last, int bf16) {
    struct room room = make_room(z);
    if (!room.queries) return 1;
    for (int64_t place = first; place < last; place++) {
        int64_t sentence = place / z->heads, head = place % z->heads;
        int64_t row = sentence, query = 0, key = 0, before = sentence * z->queries;
        struct attention_training own = *z; /* with the lengths of this sentence */
        if (z->query_starts) {
            row = 0, query = before = z->query_starts[sentence], key = z->key_starts[sentence];
            own.queries = z->query_starts[sentence + 1] - query;
            own.keys = z->key_starts[sentence + 1] - key;
        }
#define OF(tensor, strides, start) \
    (void *)at(tensor, row * (strides)[0] + head * (strides)[1] + (start) * (strides)[2], bf16)
        struct head h = {
            .query = OF(z->queries_at, z->query, query), .keys = OF(z->keys_at, z->key, key),
            .values = OF(z->values_at, z->value, key),
            .bias = z->bias_at ? at(z->bias_at, sentence * z->bias[0], bf16) : 0,
            .sums = z->sums_at + (before * z->heads + head * own.queries) * 2,
        };
        if (z->query_change_at) {
            h.outer = OF(z->out_at, z->out, query);
            h.query_change = OF(z->query_change_at, z->query_change, query);
            h.keys_change = OF(z->key_change_at, z->key_change, key);
            h.values_change = OF(z->value_change_at, z->value_change, key);
            BY_TYPE(backward, &h, &own, &room);
        } else {
            h.out = OF(z->out_at, z->out, query);
            BY_TYPE(forward, &h, &own, &room);
        }
    }
    free(room.queries);
    return 0;
}
#else
int attend_in_training(const struct attention_training *z, int64_t first, int64_t last, int bf16) { return 1; }
#endif

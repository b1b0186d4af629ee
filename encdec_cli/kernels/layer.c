/* A whole layer of an encoder, or of a decoder for one new token of every row, which by torch's operators would be some
 * forty calls. */
#include <string.h>

#include "kernels.h"
#include "vectors.h"

/* The sigmoid of numbers of any sign, without overflow. */
INLINE floats sigmoid(floats x) {
    floats magnitude = (floats)((ints)x & 0x7fffffff), e = exponential(-magnitude), share = 1 / (1 + e);
    ints below = x < 0;
    return (floats)(((ints)(share * e) & below) | ((ints)share & ~below));
}

/* The error function of numbers, to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26). */
INLINE floats error_function(floats x) {
    floats magnitude = (floats)((ints)x & 0x7fffffff), t = 1 / (1 + 0.3275911f * magnitude);
    floats y = 1.061405429f * t - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    y = 1 - y * t * exponential(-magnitude * magnitude);
    return (floats)((ints)y | ((ints)x & (int32_t)0x80000000));
}

INLINE void gelu(void *x, int64_t count, int bf16) {
    for (int64_t i = 0; i < count; i += PAIR) {
        pair y = read_pair(x, i, bf16);
        y.a *= 0.5f + 0.5f * error_function(y.a * 0.70710678f);
        y.b *= 0.5f + 0.5f * error_function(y.b * 0.70710678f);
        write_pair(x, i, y, bf16);
    }
}

/* x [rows, 2 width], gates and then values, becomes [rows, width]. */
INLINE void swiglu(void *x, int64_t rows, int64_t width, int bf16) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i += PAIR) {
            pair gate = read_pair(x, row * 2 * width + i, bf16), y = read_pair(x, (row * 2 + 1) * width + i, bf16);
            y.a *= gate.a * sigmoid(gate.a);
            y.b *= gate.b * sigmoid(gate.b);
            write_pair(x, row * width + i, y, bf16);
        }
}

/* Turn the heads of a row by its position; column i is paired with column i + width / 2. turns: [2, width / 2]. */
INLINE void turn(void *row, int64_t heads, int64_t width, const void *turns, int bf16) {
    for (int64_t head = 0; head < heads; head++)
        for (int64_t i = 0; i < width / 2; i++) {
            int64_t place = head * width + i;
            float x = read_one(row, place, bf16), y = read_one(row, place + width / 2, bf16);
            float sine = read_one(turns, i, bf16), cosine = read_one(turns, width / 2 + i, bf16);
            write_one(row, place, x * cosine - y * sine, bf16);
            write_one(row, place + width / 2, y * cosine + x * sine, bf16);
        }
}

/* Turn the queries and keys of joined [rows, 3 dim] by their position, and put keys and values into their stores. */
INLINE void store(const struct layer *l, const struct step *s, void *joined, int bf16) {
    int64_t dim = l->heads * l->width, size = bf16 ? 2 : 4;
    for (int64_t row = 0; row < s->rows; row++) {
        char *x = (char *)joined + row * 3 * dim * size;
        if (s->turns) turn(x, 2 * l->heads, l->width, s->turns, bf16);
        for (int64_t head = 0; head < l->heads; head++) {
            int64_t place = ((row / s->beam * l->heads + head) * s->room + s->place + row % s->beam) * l->width;
            const char *key = x + (dim + head * l->width) * size;
            memcpy((char *)s->keys + place * size, key, l->width * size);
            memcpy((char *)s->values + place * size, key + dim * size, l->width * size);
        }
    }
}

static void multiply(const struct matrix *m, const void *x, const struct step *s, const void *added, void *out,
                     int relu, int bf16) {
    product(x, s->rows, m, added, out, 0, m->panels, relu, bf16);
}

/* What enters a part of the layer: [rows, dim]. */
static const void *enter(const struct layer *l, const struct step *s, int part, int bf16) {
    const struct norm *n = &l->norms[part];
    if (!l->pre) return s->x;
    norm(s->x, s->rows, l->heads * l->width, n->weight, n->bias, n->epsilon, n->centred, s->scratch, bf16);
    return s->scratch;
}

/* Add the last product of a part to x. */
static void leave(const struct layer *l, const struct step *s, int part, const struct matrix *m, const void *from,
                  int bf16) {
    const struct norm *n = &l->norms[part];
    multiply(m, from, s, s->x, l->pre ? s->x : s->scratch, 0, bf16);
    if (l->pre) return;
    norm(s->scratch, s->rows, l->heads * l->width, n->weight, n->bias, n->epsilon, n->centred, s->x, bf16);
}

/* `together` rows look at the same keys and values [.., heads, length, width]; their queries lie `apart`. */
static struct attention shape(const struct layer *l, const struct step *s, int64_t together, int64_t length,
                              int64_t apart) {
    int64_t head = length * l->width, all = l->heads * head;
    struct attention z = {s->rows / together, l->heads, together, length, l->width, {together * apart, l->width, apart},
                          {all, head, l->width}, {all, head, l->width}};
    return z;
}

static void feed_forward(const struct layer *l, const struct step *s, void *wide, int bf16) {
    multiply(&l->inner, enter(l, s, 2, bf16), s, 0, wide, l->activation == RELU, bf16);
    if (l->activation == GELU) BY_TYPE(gelu, wide, s->rows * l->feed_forward);
    if (l->activation == SWIGLU) BY_TYPE(swiglu, wide, s->rows, l->feed_forward);
    leave(l, s, 2, &l->outer, wide, bf16);
}

void decoder_layer(const struct layer *l, const struct step *s, int bf16) {
    int64_t dim = l->heads * l->width;
    void *mixed = (void *)at(s->scratch, s->rows * dim, bf16), *wide = (void *)at(s->scratch, s->rows * dim * 2, bf16);

    multiply(&l->joined, enter(l, s, 0, bf16), s, 0, wide, 0, bf16);
    BY_TYPE(store, l, s, wide);
    struct attention own = shape(l, s, s->beam, s->room, 3 * dim);
    memcpy(own.bias, s->bias_strides, sizeof own.bias);
    attend(wide, s->keys, s->values, s->bias, mixed, &own, bf16);
    leave(l, s, 0, &l->output, mixed, bf16);

    multiply(&l->query, enter(l, s, 1, bf16), s, 0, wide, 0, bf16);
    struct attention source = shape(l, s, s->source_rows, s->source_length, dim);
    source.bias[0] = s->source_length;
    attend(wide, s->source_keys, s->source_values, s->source_bias, mixed, &source, bf16);
    leave(l, s, 1, &l->cross_output, mixed, bf16);

    feed_forward(l, s, wide, bf16);
}

void encoder_layer(const struct layer *l, const struct step *s, int bf16) {
    int64_t dim = l->heads * l->width, length = s->source_rows, block = s->block / length;
    void *mixed = (void *)at(s->scratch, block * length * dim, bf16);
    void *wide = (void *)at(s->scratch, block * length * dim * 2, bf16);
    for (int64_t sentence = 0; sentence < s->rows / length; sentence += block) {
        int64_t left = s->rows / length - sentence;
        struct step part = *s;
        part.rows = (left < block ? left : block) * length;
        part.x = (void *)at(s->x, sentence * length * dim, bf16);
        multiply(&l->joined, enter(l, &part, 0, bf16), &part, 0, wide, 0, bf16);
        for (int64_t row = 0; s->turns && row < part.rows; row++)
            BY_TYPE(turn, (void *)at(wide, row * 3 * dim, bf16), 2 * l->heads, l->width,
                    at(s->turns, row % length * l->width, bf16));
        int64_t apart = 3 * dim, whole = length * apart;
        struct attention own = {part.rows / length, l->heads, length, length, l->width, {whole, l->width, apart},
                                {whole, l->width, apart}, {whole, l->width, apart}, {length, 0}};
        const void *bias = s->source_bias ? at(s->source_bias, sentence * length, bf16) : 0;
        attend(wide, at(wide, dim, bf16), at(wide, 2 * dim, bf16), bias, mixed, &own, bf16);
        leave(l, &part, 0, &l->output, mixed, bf16);
        feed_forward(l, &part, wide, bf16);
    }
}

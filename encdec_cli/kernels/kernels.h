/* The inner loops of decoding that torch's operators do in many passes: see __init__.py.
 *
 * Numbers are float or bfloat16 (`bf16`). Every row is computed apart from all others, in one order, so it has the same
 * bits in every batch.
 */
#pragma once
#include <stdint.h>

/* Shapes and strides, in elements, of a call of `attend`; the last dimension of every tensor is dense. */
struct attention {
    int64_t sentences, heads, queries, keys, width;
    int64_t query[3], key[3], value[3]; /* of sentences, heads, places */
    int64_t bias[2];                    /* of sentences, queries */
};

/* A matrix [outputs, inputs] by which rows are multiplied: its kind, and its numbers as `product` reads them. */
enum { FLOATS, BFLOATS, LEVELS };
struct matrix {
    int64_t kind, depth, outputs, panels; /* depth: the bytes of a row over 4; panels: of PANEL outputs each */
    const void *weights;    /* [panels, depth, PANEL, 4 bytes] */
    const float *bias;      /* [panels x PANEL], or NULL */
    const float *scales;    /* of LEVELS: what one of 127 levels stands for, for each output */
    const int32_t *offsets; /* of LEVELS: 128 times the sum of the levels, for each output */
};

int has_product(int64_t kind);

/* PANEL, which depends on the processor. */
int64_t panel_outputs(void);

/* To out [rows, outputs] x [rows, inputs] times the matrix, plus its bias, not below 0 if `relu`, plus `added` (of the
 * shape of out, or NULL), for the outputs of the panels from `first` to before `last`. x, added and out: of FLOATS
 * float, of BFLOATS bfloat16, of LEVELS either: then each row of x is rounded to 127 levels of its largest number. */
void product(const void *x, int64_t rows, const struct matrix *m, const void *added, void *out, int64_t first,
             int64_t last, int relu, int bf16);

/* The same of a matrix that is packed here, for some panels, into m->weights (and m->bias): from weight [outputs,
 * inputs], or (`turned`) from [inputs, outputs]. Of bfloat16 the inputs are even. */
void map_rows(const void *x, int64_t rows, const void *weight, const void *bias, void *out, const struct matrix *m,
              int64_t first, int64_t last, int turned, int bf16);

/* How many words of 4 bytes of every output `map_columns` packs at a time. */
int64_t words_at_once(int bf16);

/* To out [width, outputs] the product of a [rows, width], turned, and x [rows, outputs], for some panels of outputs; the
 * columns of a are added to sums [width rounded up to 96]. x is packed in m->weights, m->depth words of 4 bytes at a
 * time, a multiple of 16, between which unfinished sums are kept [width rounded up to 32, panels x PANEL]. */
void map_columns(const void *a, int64_t rows, int64_t width, const void *x, void *out, float *sums, int32_t *kept,
                 const struct matrix *m, int64_t first, int64_t last, int bf16);

void norm(const void *x, int64_t rows, int64_t width, const void *weight, const void *bias, float epsilon, int centred,
          void *out, int bf16);
void attend(const void *query, const void *keys, const void *values, const void *bias, void *out,
            const struct attention *z, int bf16);

/* A call of attention in training: sizes, strides in elements (of sentences, heads, places; the last dimension of every
 * tensor is dense), and where the tensors are. */
struct attention_training {
    int64_t sentences, heads, queries, keys, width, causal;
    int64_t query[3], key[3], value[3], out[3], query_change[3], key_change[3], value_change[3];
    int64_t bias[2]; /* of sentences, queries */
    const void *queries_at, *keys_at, *values_at, *bias_at; /* bias: [sentences, queries, keys]; NULL: none, as with starts */
    void *out_at;   /* [sentences, queries, heads, width]: written forward; backward the gradient by it, read */
    float *sums_at; /* [sentences, heads, queries, 2], each sentence's own queries: written forward, read backward */
    void *query_change_at, *key_change_at, *value_change_at; /* gradients, written; NULL: forward */
    const int64_t *query_starts, *key_starts; /* [sentences + 1]: where in one row of places each begins, if they differ in
                                               * length: queries and keys are then the most; NULL: a row for each */
};

/* To out_at softmax(query keys^T / sqrt(width) + bias) values, or the gradients by query, keys and values, for the heads
 * of all sentences from number `first` to before `last`. Not 0 if there is no memory. */
int attend_in_training(const struct attention_training *z, int64_t first, int64_t last, int bf16);

struct norm {
    const void *weight, *bias; /* bias: NULL for none */
    float epsilon;
    int32_t centred;
};

/* A layer of a decoder, or of an encoder, which has no norms[1], query and cross_output; heads x width is its dim. */
enum { RELU, GELU, SWIGLU };
struct layer {
    int64_t heads, width, feed_forward, activation, pre; /* pre: each part begins with its norm; else it ends with it */
    struct norm norms[3];
    struct matrix joined, output, query, cross_output, inner, outer;
};

/* A new token of every row. */
struct step {
    int64_t rows;
    void *x;       /* [rows, dim]: read and written */
    void *scratch; /* [rows, 2 dim + the most of 3 dim and what `inner` gives] */

    /* Of a decoder: */
    int64_t beam, room, place; /* `beam` rows have a store together, with so much room, written from `place` on */
    void *keys, *values;       /* the stores, [rows / beam, heads, room, width] */
    const void *bias;          /* as of `attend`; NULL for none */
    int64_t bias_strides[2];   /* of stores, and of the rows that have one together */
    const void *turns;         /* sines and cosines of the new position, [2, width / 2]; NULL if heads are not turned */

    int64_t source_rows, source_length;      /* so many rows look at one source */
    const void *source_keys, *source_values; /* [rows / source_rows, heads, source_length, width] */

    const void *source_bias; /* [rows / source_rows, source_length]; NULL for none */
    /* Of an encoder `source_rows` are the tokens of a source, `turns` has those of all its positions, and so many rows
     * pass through the layer together, so that what they need stays in the cache; `scratch` has room for them. */
    int64_t block;
};

void decoder_layer(const struct layer *l, const struct step *s, int bf16);
void encoder_layer(const struct layer *l, const struct step *s, int bf16);

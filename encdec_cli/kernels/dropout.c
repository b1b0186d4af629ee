/* Random words as torch draws them, and what dropout does with them. */
#include "vectors.h"

/* The state of a generator of torch on a CPU, as its `get_state` gives it: the Mersenne Twister (Matsumoto and Nishimura
 * 1998, https://doi.org/10.1145/272991.272995). */
#define STATE 624
#define LAG 397
struct twister {
    uint64_t seed;
    int32_t left, seeded; /* left: one more than the numbers that are still to be taken */
    uint64_t next, state[STATE];
};

INLINE uint32_t twisted(uint32_t a, uint32_t b) {
    uint32_t y = (a & 0x80000000u) | (b & 0x7fffffffu);
    return (y >> 1) ^ (-(y & 1) & 0x9908b0dfu);
}

static void twist(uint32_t *s) {
    for (int i = 0; i < STATE - LAG; i++) s[i] = s[i + LAG] ^ twisted(s[i], s[i + 1]);
    for (int i = STATE - LAG; i < STATE - 1; i++) s[i] = s[i + LAG - STATE] ^ twisted(s[i], s[i + 1]);
    s[STATE - 1] = s[LAG - 1] ^ twisted(s[STATE - 1], s[0]);
}

INLINE uint32_t tempered(uint32_t y) {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

/* To words [count] what `Tensor.random_` would write into int64, in an eighth of its time. Two numbers make a word, the
 * first its upper half, without its sign. */
void draw(struct twister *t, uint64_t *words, int64_t count) {
    uint32_t s[STATE];
    int64_t place = STATE - (t->left - 1);
    for (int i = 0; i < STATE; i++) s[i] = t->state[i];
    for (int64_t done = 0; done < count;) {
        if (place == STATE) twist(s), place = 0;
        int64_t pairs = (STATE - place) / 2 < count - done ? (STATE - place) / 2 : count - done;
        for (int64_t i = 0; i < pairs; i++) {
            uint32_t first = tempered(s[place + 2 * i]), second = tempered(s[place + 2 * i + 1]);
            words[done + i] = (uint64_t)(first & 0x7fffffffu) << 32 | second;
        }
        place += 2 * pairs;
        done += pairs;
        if (done < count && place == STATE - 1) { /* somebody has taken half a word */
            uint64_t first = tempered(s[place]) & 0x7fffffffu;
            twist(s);
            words[done++] = first << 32 | tempered(s[0]);
            place = 1;
        }
    }
    for (int i = 0; i < STATE; i++) t->state[i] = s[i];
    t->left = STATE - place + 1;
    t->next = place;
}

INLINE floats as_stored(floats x, int bf16) {
    words bits = (words)x;
    return bf16 ? (floats)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u) : x;
}

/* PAIR elements: x times `factor` where the lowest 15 bits of their lane of 16 are below `kept`, else times 0, plus
 * `added`, if that is not NULL. */
INLINE void drop(const void *x, const uint16_t *lanes, const void *added, int64_t i, int32_t kept, float factor,
                 ints always, void *out, int bf16) {
    ints first, second;
    if (bf16) {
        words both;
        memcpy(&both, lanes + i, sizeof both);
        first = (ints)(both & 0x7fff);
        second = (ints)(both >> 16 & 0x7fff);
    } else {
        shorts low, high;
        memcpy(&low, lanes + i, sizeof low);
        memcpy(&high, lanes + i + LANES, sizeof high);
        first = __builtin_convertvector(low, ints) & 0x7fff;
        second = __builtin_convertvector(high, ints) & 0x7fff;
    }
    pair y = read_pair(x, i, bf16);
    y.a *= (floats)((ints)all(factor) & (first < kept));
    y.b *= (floats)((ints)all(factor) & (second < kept));
    if (added) { /* the product is rounded before, which one instruction for both would not do */
        pair z = read_pair(added, i, bf16);
        y.a = z.a + as_stored((floats)((ints)y.a & always), bf16);
        y.b = z.b + as_stored((floats)((ints)y.b & always), bf16);
    }
    write_pair(out, i, y, bf16);
}

INLINE void drop_all(const void *x, const uint16_t *lanes, const void *added, int64_t count, int32_t kept, float factor,
                     ints always, void *out, int bf16) {
    int64_t whole = count / PAIR * PAIR, size = bf16 ? 2 : 4, left = (count - whole) * size;
    for (int64_t i = 0; i < whole; i += PAIR) drop(x, lanes, added, i, kept, factor, always, out, bf16);
    if (!left) return;
    char its_x[4 * PAIR] = {0}, its_added[4 * PAIR] = {0};
    uint16_t its_lanes[PAIR] = {0};
    memcpy(its_x, at(x, whole, bf16), left);
    memcpy(its_lanes, lanes + whole, left / size * 2);
    if (added) memcpy(its_added, at(added, whole, bf16), left);
    drop(its_x, its_lanes, added ? its_added : 0, 0, kept, factor, always, its_x, bf16);
    memcpy((void *)at(out, whole, bf16), its_x, left);
}

/* To out [count] x times `factor` or 0, by lanes [count] of 16 random bits, plus `added` [count], if that is not NULL;
 * each is rounded as by operators of their own. always: -1, which the compiler is not to know. */
void dropout(const void *x, const uint16_t *lanes, const void *added, int64_t count, int64_t kept, float factor,
             int32_t always, void *out, int bf16) {
    BY_TYPE(drop_all, x, lanes, added, count, kept, factor, (ints){0} + always, out);
}

/* What a search asks of the logits, in one pass each. */
#include "vectors.h"

INLINE float chunk_maximum(const void *row, int64_t chunk, int64_t vocab, int bf16) {
    float most = -INFINITY;
    if ((chunk + 1) * CHUNK <= vocab) {
        pair most = read_pair(row, chunk * CHUNK, bf16);
        for (int64_t token = chunk * CHUNK + PAIR; token < (chunk + 1) * CHUNK; token += PAIR) {
            pair x = read_pair(row, token, bf16);
            most.a = larger(most.a, x.a);
            most.b = larger(most.b, x.b);
        }
        return largest_of(larger(most.a, most.b));
    }
    for (int64_t token = chunk * CHUNK; token < vocab; token++) {
        float x = read_one(row, token, bf16);
        most = x > most ? x : most;
    }
    return most;
}

INLINE void scan_row(const void *row, int64_t vocab, float *normaliser, float *maxima, int bf16) {
    float best = -INFINITY, rest = 0;
    for (int64_t chunk = 0; chunk * CHUNK < vocab; chunk++) {
        maxima[chunk] = chunk_maximum(row, chunk, vocab, bf16);
        best = maxima[chunk] > best ? maxima[chunk] : best;
    }
    for (int64_t token = vocab / PAIR * PAIR; token < vocab; token++) rest += expf(read_one(row, token, bf16) - best);
    pair sum = {all(0), all(0)};
    for (int64_t token = 0; token < vocab / PAIR * PAIR; token += PAIR) {
        pair x = read_pair(row, token, bf16);
        sum.a += exponential(x.a - best) + nothing(x.a);
        sum.b += exponential(x.b - best) + nothing(x.b);
    }
    *normaliser = best + logf(sum_of(sum.a + sum.b) + rest);
}

/* logits: [rows, vocab]; to normaliser [rows] the log of the sum of exponentials. Then the banned tokens become
 * -infinity, and to maxima [rows, chunks] goes the largest of each CHUNK of logits. */
void scan(void *logits, int64_t rows, int64_t vocab, float *normaliser, float *maxima, const int64_t *banned,
          int64_t count, int bf16) {
    int64_t chunks = (vocab + CHUNK - 1) / CHUNK;
    for (int64_t row = 0; row < rows; row++) {
        BY_TYPE(scan_row, at(logits, row * vocab, bf16), vocab, normaliser + row, maxima + row * chunks);
        for (int64_t i = 0; i < count; i++) write_one(logits, row * vocab + banned[i], -INFINITY, bf16);
        for (int64_t i = 0; i < count; i++) {
            int64_t chunk = banned[i] / CHUNK;
            if (i > 0 && banned[i - 1] / CHUNK == chunk) continue; /* most bans stand together */
            maxima[row * chunks + chunk] =
                BY_TYPE(chunk_maximum, at(logits, row * vocab, bf16), chunk, vocab);
        }
    }
}

/* The k-th largest that the best of a chunk comes to, of all chunks of a sentence: k tokens are at least as good. */
static float kth_ceiling(const float *normaliser, const float *maxima, const float *totals, int64_t beam,
                         int64_t chunks, int64_t k) {
    float best[k];
    int64_t count = 0;
    for (int64_t row = 0; row < beam; row++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            float ceiling = totals[row] + (maxima[row * chunks + chunk] - normaliser[row]);
            if (count == k && !(ceiling > best[k - 1])) continue;
            int64_t rank = count < k ? count++ : k - 1;
            for (; rank > 0 && ceiling > best[rank - 1]; rank--) best[rank] = best[rank - 1];
            best[rank] = ceiling;
        }
    return count == k ? best[k - 1] : -INFINITY;
}

/* The k best of each sentence's beam x vocab continuations: [sentences, k] values, rows of the sentence and tokens. */
void candidates(const void *logits, const float *normaliser, const float *maxima, const float *totals,
                int64_t sentences, int64_t beam, int64_t vocab, int64_t k, float *values, int64_t *parents,
                int64_t *tokens, int bf16) {
    int64_t chunks = (vocab + CHUNK - 1) / CHUNK;
    int64_t count = 0;
    float least = -INFINITY;
    for (int64_t row = 0; row < sentences * beam; row++) {
        if (row % beam == 0) {
            count = 0;
            least = kth_ceiling(normaliser + row, maxima + row * chunks, totals + row, beam, chunks, k);
        }
        int64_t place = row / beam * k;
        float *best = values + place, total = totals[row], norm = normaliser[row];
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            /* What is found later has a higher row or token, so it must be better to take a place. */
            float ceiling = total + (maxima[row * chunks + chunk] - norm);
            if (ceiling < least || (count == k && !(ceiling > best[k - 1]))) continue;
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

/* To going, from and with [slots, width] the totals, rows and tokens of the first `width` of each slot's k
 * continuations that do not end, in their order; where there are fewer, those that end fill up. To ending
 * [slots, width] which of the first `width` end. Returns 1 if any does, plus 2 if a slot has nothing left though it had
 * something (`before`, its totals so far [slots, width]), plus 4 if a row goes on elsewhere than where it stands. */
int part(const float *totals, const int64_t *parents, const int64_t *tokens, const float *before, int64_t slots,
         int64_t k, int64_t width, int64_t eos, float *going, int64_t *from, int64_t *with, uint8_t *ending) {
    int found = 0;
    for (int64_t slot = 0; slot < slots; slot++) {
        int64_t count = 0;
        for (int64_t pass = 0; pass < 2; pass++) /* those that end only fill up */
            for (int64_t i = slot * k; i < (slot + 1) * k; i++) {
                int ends = tokens[i] == eos;
                if (pass == 0 && i - slot * k < width) {
                    ending[slot * width + i - slot * k] = ends && totals[i] > -INFINITY;
                    found |= ends && totals[i] > -INFINITY;
                }
                if (ends != pass || count == width) continue;
                int64_t place = slot * width + count++;
                going[place] = totals[i];
                from[place] = parents[i];
                with[place] = tokens[i];
            }
        if (going[slot * width] == -INFINITY && before[slot * width] > -INFINITY) found |= 2;
        for (int64_t i = 0; i < width; i++) found |= from[slot * width + i] == i ? 0 : 4;
    }
    return found;
}

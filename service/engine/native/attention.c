/* Attention of rows that each see their own sequence.

   Keys and values stand in a cache of slots [slots, kv_heads, dim], cut into blocks of `block_tokens`. */

#define LANES 8 /* heads are as narrow as 8 */
#include "attention.h"
#include "vectors.h"

#define LINE 16 /* floats that come from memory together */

void dylora_write_cache(const float *key, long key_row, long key_head, const float *value, long value_row, long value_head,
                        const long *slots, long rows, long kv_heads, long dim, long value_dim, float *keys, float *values) {
    for (long row = 0; row < rows; row++)
        for (long head = 0; head < kv_heads; head++) {
            memcpy(keys + (slots[row] * kv_heads + head) * dim, key + row * key_row + head * key_head, dim * sizeof(float));
            memcpy(values + (slots[row] * kv_heads + head) * value_dim, value + row * value_row + head * value_head,
                   value_dim * sizeof(float));
        }
}

#define QUERIES 4 /* query heads that are attended together */

/* The sums of several vectors, in the order of `sum_of`, with half of its shuffles. */
static inline vec4 sums_of(vec a, vec b, vec c, vec d) {
    typedef int ivec4 __attribute__((vector_size(16)));
    union { vec whole; vec4 half[2]; } w[4] = {{a}, {b}, {c}, {d}};
    vec4 h[4];
    UNROLLED for (int i = 0; i < 4; i++) h[i] = w[i].half[0] + w[i].half[1];
    vec4 ab = __builtin_shuffle(h[0], h[1], (ivec4){0, 4, 1, 5}) + __builtin_shuffle(h[0], h[1], (ivec4){2, 6, 3, 7});
    vec4 cd = __builtin_shuffle(h[2], h[3], (ivec4){0, 4, 1, 5}) + __builtin_shuffle(h[2], h[3], (ivec4){2, 6, 3, 7});
    return __builtin_shuffle(ab, cd, (ivec4){0, 1, 4, 5}) + __builtin_shuffle(ab, cd, (ivec4){2, 3, 6, 7});
}

/* Of each query head the products with a key, to places `stride` apart. */
#define SCORES(COUNT)                                                                                                    \
    static void scores_##COUNT(const float *q, long q_head, const float *k, long dim, float *out, long stride) {         \
        vec sum[4] = {};                                                                                                 \
        for (long d = 0; d < dim; d += LANES) {                                                                          \
            vec key = load(k + d);                                                                                       \
            UNROLLED for (int g = 0; g < COUNT; g++) sum[g] += load(q + g * q_head + d) * key;                           \
        }                                                                                                                \
        vec4 all_sums = sums_of(sum[0], sum[1], sum[2], sum[3]);                                                         \
        UNROLLED for (int g = 0; g < COUNT; g++) out[g * stride] = all_sums[g];                                          \
    }
SCORES(1) SCORES(2) SCORES(3) SCORES(4)
typedef void scores(const float *, long, const float *, long, float *, long);
static scores *const scores_of[] = {0, scores_1, scores_2, scores_3, scores_4};

/* out[g] = sum over positions of weight[g][position] * value[position], two vectors of the value's dimensions at a time. */
#define BLENDS(COUNT)                                                                                                    \
    static void blend_##COUNT(const float *weights, long stride, const float *const *value, long length, long dim,       \
                              float *out, long out_head) {                                                               \
        for (long d = 0; d < dim; d += 2 * LANES) {                                                                      \
            long other = d + LANES < dim ? LANES : 0; /* of a last single vector, both compute the same */               \
            vec sum[COUNT][2];                                                                                           \
            UNROLLED for (int g = 0; g < COUNT; g++) sum[g][0] = sum[g][1] = all(0);                                     \
            for (long at = 0; at < length; at++) {                                                                       \
                vec v0 = load(value[at] + d), v1 = load(value[at] + d + other);                                          \
                UNROLLED for (int g = 0; g < COUNT; g++) {                                                               \
                    vec weight = all(weights[g * stride + at]);                                                          \
                    sum[g][0] += weight * v0;                                                                            \
                    sum[g][1] += weight * v1;                                                                            \
                }                                                                                                        \
            }                                                                                                            \
            UNROLLED for (int g = 0; g < COUNT; g++) {                                                                   \
                store(out + g * out_head + d, sum[g][0]);                                                                \
                store(out + g * out_head + d + other, sum[g][1]);                                                        \
            }                                                                                                            \
        }                                                                                                                \
    }
BLENDS(1) BLENDS(2) BLENDS(3) BLENDS(4)
typedef void blends(const float *, long, const float *const *, long, long, float *, long);
static blends *const blend_of[] = {0, blend_1, blend_2, blend_3, blend_4};

static void softmax(float *values, long length) {
    float highest = highest_of(values, length);
    for (long i = length; i % LANES; i++) values[i] = -INFINITY;
    vec total = all(0);
    for (long i = 0; i < length; i += LANES) {
        vec e = exp_of(load(values + i) - highest);
        store(values + i, e);
        if (i + LANES > length) /* what pads the last vector is no position */
            for (long j = length - i; j < LANES; j++) e[j] = 0;
        total += e;
    }
    float share = 1 / sum_of(total);
    for (long i = 0; i < length; i++) values[i] *= share;
}

void dylora_attend_together(const struct attention *a) {
    const struct seen *seen = &a->seen;
    long group = a->heads / a->kv_heads, longest = 0, items = seen->rows * a->kv_heads;
    for (long row = 0; row < seen->rows; row++) longest = seen->ends[row] > longest ? seen->ends[row] : longest;
    long stride = (longest + LANES) / LANES * LANES, at_once = items < 64 ? 1 : 4;
#pragma omp for schedule(dynamic, at_once) nowait
    for (long item = 0; item < items; item++) {
        long row = item / a->kv_heads, head = item % a->kv_heads, own = seen->query_rows[row], end = seen->ends[row];
        long begin = a->window && end > a->window ? end - a->window : 0, length = end - begin;
        float *weights = scratch((size_t)stride * (QUERIES + 2));
        const float **value = (const float **)(weights + stride * QUERIES);
        for (long first = 0; first < group; first += QUERIES) {
            long count = at_most(QUERIES, group - first), q_head = head * group + first;
            const float *q = a->query + own * a->query_row + q_head * a->query_head;
            /* Counted along: a division for each position would cost half as much as all else of it. */
            long block = begin / seen->block_tokens, inside = begin % seen->block_tokens;
            for (long at = 0; at < length; at++, inside++) {
                if (inside == seen->block_tokens) block++, inside = 0;
                long slot = seen->tables[row * seen->table_width + block] * seen->block_tokens + inside;
                const float *key = a->keys + (slot * a->kv_heads + head) * a->dim;
                value[at] = a->values + (slot * a->kv_heads + head) * a->value_dim;
                /* From memory, as each step reads what no cache holds; the values while there is work left to do. */
                for (long d = 0; d < a->value_dim; d += LINE) __builtin_prefetch(value[at] + d);
                scores_of[count](q, a->query_head, key, a->dim, weights + at, stride);
            }
            for (long g = 0; g < count; g++) {
                float *scores = weights + g * stride;
                for (long at = 0; at < length; at++)
                    scores[at] = a->softcap ? a->softcap * tanhf(scores[at] * (a->scale / a->softcap)) : scores[at] * a->scale;
                softmax(scores, length);
            }
            float *to = a->out + (own * a->heads + q_head) * a->value_dim;
            blend_of[count](weights, stride, value, length, a->value_dim, to, a->value_dim);
        }
    }
}

void dylora_attend(const struct attention *a, int threads) {
#pragma omp parallel num_threads(threads)
    dylora_attend_together(a);
}

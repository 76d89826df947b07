/* Attention of single rows that each see their own sequence.

   Keys and values stand in a cache of slots [slots, kv_heads, dim], cut into blocks of `block_tokens`. */

#undef LANES
#define LANES 8 /* heads are as narrow as 8 */
#include "attention.h"
#include "vectors.h"

#define LINE 16     /* floats that come from memory together */
#define SOON 8      /* positions: how far ahead of its use a key is asked of memory */
#define MANY_ROWS 8 /* from which on a thread takes all heads of a row */

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

/* out[g] = sum over positions of weight[g][position] * value[position][from ..], two vectors of dimensions at a time. */
#define BLENDS(COUNT)                                                                                                    \
    static void blend_##COUNT(const float *weights, long stride, const float *const *value, long from, long length,      \
                              long dim, float *out, long out_head) {                                                     \
        for (long d = 0; d < dim; d += 2 * LANES) {                                                                      \
            long other = d + LANES < dim ? LANES : 0; /* of a last single vector, both compute the same */               \
            vec sum[COUNT][2];                                                                                           \
            UNROLLED for (int g = 0; g < COUNT; g++) sum[g][0] = sum[g][1] = all(0);                                     \
            for (long at = 0; at < length; at++) {                                                                       \
                vec v0 = load(value[at] + from + d), v1 = load(value[at] + from + d + other);                            \
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
typedef void blends(const float *, long, const float *const *, long, long, long, float *, long);
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

/* One row's key/value heads from `first` to `end`. */
static void attend_row(const struct attention *a, long number, long first, long end, long stride) {
    const struct seen *seen = &a->seen;
    const long *table = seen->tables + number * seen->table_width;
    long group = a->heads / a->kv_heads, own = seen->query_rows[number], ends = seen->ends[number];
    long begin = a->window && ends > a->window ? ends - a->window : 0, length = ends - begin;
    float *weights = scratch((size_t)stride * ((end - first) * group + 4)); /* [heads, stride] */
    const float **value = (const float **)(weights + stride * (end - first) * group), **key = value + stride;
    const float *query = a->query + own * a->query_row;
    /* Counted along: a division for each position would cost half as much as all else of it. */
    long block = begin / seen->block_tokens, inside = begin % seen->block_tokens;
    for (long at = 0; at < length; at++, inside++) {
        if (inside == seen->block_tokens) block++, inside = 0;
        long place = (table[block] * seen->block_tokens + inside) * a->kv_heads + first;
        key[at] = a->keys + place * a->dim;
        value[at] = a->values + place * a->value_dim;
    }
    for (long at = 0; at < length; at++) {
        /* From memory, as each step reads what no cache holds: the keys soon, the values while there is work left to do. */
        const float *soon = key[at_most(at + SOON, length - 1)];
        for (long d = 0; d < (end - first) * a->dim; d += LINE) __builtin_prefetch(soon + d);
        for (long d = 0; d < (end - first) * a->value_dim; d += LINE) __builtin_prefetch(value[at] + d);
        for (long head = first; head < end; head++)
            for (long g = 0; g < group; g += QUERIES)
                scores_of[at_most(QUERIES, group - g)](query + (head * group + g) * a->query_head, a->query_head,
                                                       key[at] + (head - first) * a->dim, a->dim,
                                                       weights + ((head - first) * group + g) * stride + at, stride);
    }
    for (long h = 0; h < (end - first) * group; h++) {
        float *scores = weights + h * stride;
        for (long at = 0; at < length; at++)
            scores[at] = a->softcap ? a->softcap * tanhf(scores[at] * (a->scale / a->softcap)) : scores[at] * a->scale;
        softmax(scores, length);
    }
    for (long head = first; head < end; head++)
        for (long g = 0; g < group; g += QUERIES)
            blend_of[at_most(QUERIES, group - g)](weights + ((head - first) * group + g) * stride, stride, value,
                                                  (head - first) * a->value_dim, length, a->value_dim,
                                                  a->out + (own * a->heads + head * group + g) * a->value_dim, a->value_dim);
}

void dylora_attend_together(const struct attention *a) {
    const struct seen *seen = &a->seen;
    if (seen->pieces) dylora_attend_chunks(a);
    long longest = 0;
    for (long row = 0; row < seen->rows; row++) longest = most_of(longest, seen->ends[seen->pieces + row]);
    long stride = (longest + LANES) / LANES * LANES;
    /* Heads of a position stand together in memory, so whoever has rows enough for all threads takes them together. */
    long parts = seen->rows < MANY_ROWS ? a->kv_heads : 1, heads = a->kv_heads / parts;
#pragma omp for schedule(dynamic, 1) nowait
    for (long item = 0; item < seen->rows * parts; item++) {
        long first = item % parts * heads;
        attend_row(a, seen->pieces + item / parts, first, first + heads, stride);
    }
}

void dylora_attend(const struct attention *a, int threads) {
#pragma omp parallel num_threads(threads)
    dylora_attend_together(a);
}

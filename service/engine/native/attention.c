/* Attention of single rows that each see their own sequence.

   Keys and values stand in a cache of slots [slots, kv_heads, dim], cut into blocks of `block_tokens`. The positions of a row
   are taken in parts, by different threads where rows are few, and those in spans, so short that the values are still near when
   they are weighted. The softmax goes along (Milakov and Gimelshein, arXiv 1805.02867). Parts and spans follow from the row's
   own length, so its numbers do not depend on the rows beside it, nor on the threads. */

#undef LANES
#define LANES 8 /* heads are as narrow as 8 */
#include "attention.h"
#include "vectors.h"

#define LINE 16               /* floats that come from memory together */
#define SOON 8                /* positions: how far ahead of its use a key is asked of memory */
#define SPAN_BYTES (64 << 10) /* of keys and values: a share of the cache that each processor has of its own */
#define LEAST_SPAN 16         /* positions */
#define PART_SPANS 8

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

/* out[g] = out[g] * shrunk[g] + sum over positions of weight[g][position] * value[position][from ..], two vectors of dimensions
   at a time. */
#define BLENDS(COUNT)                                                                                                    \
    static void blend_##COUNT(const float *weights, long stride, const float *const *value, long from, long length,      \
                              const float *shrunk, long dim, float *out, long out_head) {                                \
        for (long d = 0; d < dim; d += 2 * LANES) {                                                                      \
            long other = d + LANES < dim ? LANES : 0; /* of a last single vector, both compute the same */               \
            vec sum[COUNT][2];                                                                                           \
            UNROLLED for (int g = 0; g < COUNT; g++) {                                                                   \
                sum[g][0] = load(out + g * out_head + d) * shrunk[g];                                                    \
                sum[g][1] = load(out + g * out_head + d + other) * shrunk[g];                                            \
            }                                                                                                            \
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
typedef void blends(const float *, long, const float *const *, long, long, const float *, long, float *, long);
static blends *const blend_of[] = {0, blend_1, blend_2, blend_3, blend_4};

/* What a query head has found so far: its highest score, and the sum of e^(score - highest). */
struct found {
    float highest, total;
};

/* A span's scores become weights; by how much what was found before shrinks. */
static float weigh(float *scores, long length, struct found *found) {
    float before = found->highest, highest = highest_of(scores, length);
    if (highest < before) highest = before;
    for (long i = length; i % LANES; i++) scores[i] = -INFINITY;
    vec sum = all(0);
    for (long i = 0; i < length; i += LANES) {
        vec e = exp_of(load(scores + i) - highest);
        store(scores + i, e);
        if (i + LANES > length) /* what pads the last vector is no position */
            for (long j = length - i; j < LANES; j++) e[j] = 0;
        sum += e;
    }
    float shrunk = expf(before - highest);
    found->highest = highest;
    found->total = found->total * shrunk + sum_of(sum);
    return shrunk;
}

/* Positions that a row sees, and how they are taken. */
struct course {
    long begin, length, span, parts, part; /* the last a part's, but for a shorter last one */
};

static struct course course_of(const struct attention *a, long number) {
    long end = a->seen.ends[number], position = a->kv_heads * (a->dim + a->value_dim) * sizeof(float);
    long begin = a->window && end > a->window ? end - a->window : 0;
    long span = most_of(SPAN_BYTES / position / LANES * LANES, LEAST_SPAN), spans = shares(end - begin, span);
    long parts = shares(spans, PART_SPANS);
    return (struct course){begin, end - begin, span, parts, shares(spans, parts) * span};
}

/* Of each row the number of its first part, counted over all rows, and at last how many there are; firsts [rows + 1]. */
static void number_parts(const struct attention *a, long *firsts) {
    firsts[0] = 0;
    for (long row = 0; row < a->seen.rows; row++) firsts[row + 1] = firsts[row] + course_of(a, a->seen.pieces + row).parts;
}

/* Floats of what a part finds: of each query head its sums, and `found`. */
static long part_size(const struct attention *a) { return a->heads * (a->value_dim + 2); }

float *dylora_room_for_parts(const struct attention *a) {
    static __thread struct held shared;
    long firsts[a->seen.rows + 1];
    number_parts(a, firsts);
    return room_in(&shared, firsts[a->seen.rows] * part_size(a));
}

/* One part of a row by its key/value heads from `first` to `end`: sums [heads, value_dim] of values weighted by
   e^(score - highest). */
static void attend_part(const struct attention *a, long number, const struct course *course, long part, long first, long end,
                        float *sums, struct found *found) {
    const struct seen *seen = &a->seen;
    const long *table = seen->blocks + seen->starts[number];
    long group = a->heads / a->kv_heads, queries = (end - first) * group, span = course->span;
    long from = part * course->part, length = at_most(course->part, course->length - from);
    float *weights = scratch((size_t)span * queries + 4 * length); /* [queries, span], and two pointers for each position */
    const float **key = (const float **)(weights + span * queries), **value = key + length;
    const float *query = a->query + seen->query_rows[number] * a->query_row + first * group * a->query_head;
    float shrunk[queries];
    for (long h = 0; h < queries; h++) found[h] = (struct found){-INFINITY, 0};
    memset(sums, 0, queries * a->value_dim * sizeof(float));
    /* Counted along: a division for each position would cost half as much as all else of it. */
    long block = (course->begin + from) / seen->block_tokens, inside = (course->begin + from) % seen->block_tokens;
    for (long at = 0; at < length; at++, inside++) {
        if (inside == seen->block_tokens) block++, inside = 0;
        long place = (table[block] * seen->block_tokens + inside) * a->kv_heads + first;
        key[at] = a->keys + place * a->dim;
        value[at] = a->values + place * a->value_dim;
    }
    for (long done = 0; done < length; done += span, key += span, value += span) {
        long count = at_most(span, length - done);
        for (long at = 0; at < count; at++) {
            /* From memory, as each step reads what no cache holds: the keys soon, the values while there is work left to do. */
            const float *soon = key[at_most(at + SOON, length - done - 1)];
            for (long d = 0; d < (end - first) * a->dim; d += LINE) __builtin_prefetch(soon + d);
            for (long d = 0; d < (end - first) * a->value_dim; d += LINE) __builtin_prefetch(value[at] + d);
            for (long head = 0; head < end - first; head++)
                for (long g = 0; g < group; g += QUERIES)
                    scores_of[at_most(QUERIES, group - g)](query + (head * group + g) * a->query_head, a->query_head,
                                                           key[at] + head * a->dim, a->dim,
                                                           weights + (head * group + g) * span + at, span);
        }
        for (long h = 0; h < queries; h++) {
            float *scores = weights + h * span;
            for (long at = 0; at < count; at++)
                scores[at] = a->softcap ? a->softcap * tanhf(scores[at] * (a->scale / a->softcap)) : scores[at] * a->scale;
            shrunk[h] = weigh(scores, count, found + h);
        }
        for (long head = 0; head < end - first; head++)
            for (long g = 0; g < group; g += QUERIES) {
                long h = head * group + g;
                blend_of[at_most(QUERIES, group - g)](weights + h * span, span, value, head * a->value_dim, count, shrunk + h,
                                                      a->value_dim, sums + h * a->value_dim, a->value_dim);
            }
    }
}

/* out[d] = out[d] * kept + more[d] * added */
static void add_shares(float *out, float kept, const float *more, float added, long dim) {
    for (long d = 0; d < dim; d += LANES) store(out + d, load(out + d) * kept + load(more + d) * added);
}

/* Sums of weighted values become means. */
static void divide(float *sums, float total, long dim) {
    for (long d = 0; d < dim; d += LANES) store(sums + d, load(sums + d) * (1 / total));
}

/* The parts of a row, in their order, become its `out`. */
static void join_parts(const struct attention *a, const float *found_by, long parts, float *out) {
    for (long h = 0; h < a->heads; h++) {
        struct found all_found = {-INFINITY, 0};
        float *sums = out + h * a->value_dim;
        memset(sums, 0, a->value_dim * sizeof(float));
        for (long part = 0; part < parts; part++) {
            const float *place = found_by + part * part_size(a);
            const struct found *found = (const struct found *)(place + a->heads * a->value_dim) + h;
            float highest = found->highest > all_found.highest ? found->highest : all_found.highest;
            float kept = expf(all_found.highest - highest), added = expf(found->highest - highest);
            add_shares(sums, kept, place + h * a->value_dim, added, a->value_dim);
            all_found = (struct found){highest, all_found.total * kept + found->total * added};
        }
        divide(sums, all_found.total, a->value_dim);
    }
}

void dylora_attend_together(const struct attention *a, float *parts, struct barrier *barrier) {
    const struct seen *seen = &a->seen;
    if (seen->pieces) dylora_attend_chunks(a);
    long firsts[seen->rows + 1], row = 0;
    number_parts(a, firsts);
    long all_parts = firsts[seen->rows], group = a->heads / a->kv_heads, row_size = a->heads * a->value_dim;
    /* Heads of a position stand together in memory, so with parts enough for all threads each takes them together. */
    long splits = all_parts < 2 * omp_get_num_threads() ? a->kv_heads : 1, heads = a->kv_heads / splits;
#pragma omp for schedule(monotonic : dynamic, 1) nowait
    for (long item = 0; item < all_parts * splits; item++) {
        long part = item / splits, first = item % splits * heads;
        while (firsts[row + 1] <= part) row++;
        struct course course = course_of(a, seen->pieces + row);
        struct found own[heads * group], *found = own;
        float *sums = a->out + seen->query_rows[seen->pieces + row] * row_size;
        if (course.parts > 1) {
            sums = parts + part * part_size(a);
            found = (struct found *)(sums + row_size) + first * group;
        }
        sums += first * group * a->value_dim;
        attend_part(a, seen->pieces + row, &course, part - firsts[row], first, first + heads, sums, found);
        if (course.parts == 1)
            for (long h = 0; h < heads * group; h++) divide(sums + h * a->value_dim, found[h].total, a->value_dim);
    }
    if (all_parts == seen->rows) return;
    wait_for_all(barrier);
#pragma omp for schedule(static) nowait
    for (long joined = 0; joined < seen->rows; joined++) {
        long count = firsts[joined + 1] - firsts[joined];
        float *out = a->out + seen->query_rows[seen->pieces + joined] * row_size;
        if (count > 1) join_parts(a, parts + firsts[joined] * part_size(a), count, out);
    }
}

void dylora_attend(const struct attention *a, int threads) {
    float *parts = dylora_room_for_parts(a);
    struct barrier barrier = {};
#pragma omp parallel num_threads(threads)
    dylora_attend_together(a, parts, &barrier);
}

/* The products of a step on a CPU, in single precision. Built by build.py for the processor that it runs on, called by kernels.py.

   Why not a library's: with 2 to 32 rows, MKL's and oneDNN's products took 1.1 to 2.4 times as long (see kernels.py), and
   none has a product in which rows use different adapters and ranks.

   Every result is a sum in an order that depends on the shapes of weights alone: a row's numbers are the same to the last
   bit whatever other rows run beside it, and with any number of threads. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#define PANEL 16      /* outputs computed together: two vectors */
#define MOST_ROWS 6   /* 6 x 2 accumulators and 3 operands fill the 16 vector registers of AVX2 */
#define DEPTH 256     /* inputs of a panel taken together: 16 KiB, half of a level 1 cache */
#define UNROLLED _Pragma("GCC unroll 8")

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *at) { return *(const vec *)at; }
static inline void store(float *at, vec value) { *(vec *)at = value; }
static inline vec all(float v) { return (vec){v, v, v, v, v, v, v, v}; }

static inline vec choose(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

static inline float sum_of(vec v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

static inline long at_most(long a, long b) { return a < b ? a : b; }

/* Memory that a thread keeps: fresh memory would cost a page fault for every 4 KiB. */
static float *scratch(size_t floats) {
    static __thread float *held;
    static __thread size_t size;
    if (size < floats) {
        free(held);
        size = floats;
        if (posix_memalign((void **)&held, 64, size * sizeof(float))) abort();
    }
    return held;
}

/* ---- tiles: `rows` x PANEL outputs -------------------------------------------------------------------------------------

   to[i][j] = from[i][j] + sum over k of x[k * x_stride + i] * w[k * w_stride + j];  from = 0: zeros.
   `ahead`, if given, is read into the cache: one line every four k. */

typedef void tile(const float *x, long x_stride, const float *w, long w_stride, long depth, const float *const *from,
                  float *const *to, long column, const float *ahead);

#define TILE(ROWS)                                                                                                       \
    static void tile_##ROWS(const float *x, long x_stride, const float *w, long w_stride, long depth,                    \
                            const float *const *from, float *const *to, long column, const float *ahead) {               \
        vec sum[ROWS][2];                                                                                                \
        UNROLLED for (int i = 0; i < ROWS; i++) {                                                                        \
            sum[i][0] = from ? load(from[i] + column) : all(0);                                                          \
            sum[i][1] = from ? load(from[i] + column + LANES) : all(0);                                                  \
        }                                                                                                                \
        for (long k = 0; k < depth; k++) {                                                                               \
            vec w0 = load(w + k * w_stride), w1 = load(w + k * w_stride + LANES);                                        \
            if (ahead && !(k & 3)) __builtin_prefetch(ahead + 4 * k, 0, 2);                                              \
            UNROLLED for (int i = 0; i < ROWS; i++) {                                                                    \
                vec value = all(x[k * x_stride + i]);                                                                    \
                sum[i][0] += value * w0;                                                                                 \
                sum[i][1] += value * w1;                                                                                 \
            }                                                                                                            \
        }                                                                                                                \
        UNROLLED for (int i = 0; i < ROWS; i++) {                                                                        \
            store(to[i] + column, sum[i][0]);                                                                            \
            store(to[i] + column + LANES, sum[i][1]);                                                                    \
        }                                                                                                                \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
static tile *const tiles[] = {0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};

/* ---- the base's product ------------------------------------------------------------------------------------------------

   y = x w^T + bias; x [rows, in], y [rows, out], w in panels [out / PANEL, in, PANEL], bias [out] or 0. */

void dylora_linear(const float *x, const float *w, const float *bias, float *y, long rows, long in, long out, int threads) {
    long groups = (rows + MOST_ROWS - 1) / MOST_ROWS; /* of rows, as equal as can be */
    float *turned = rows == 1 ? 0 : scratch((size_t)rows * in);
#pragma omp parallel num_threads(threads)
    {
        if (turned) /* each group as [in, rows of it], so that a tile reads one stream */
#pragma omp for schedule(static)
            for (long g = 0; g < groups; g++) {
                long first = rows * g / groups, count = rows * (g + 1) / groups - first;
                for (long i = 0; i < count; i++)
                    for (long k = 0; k < in; k++) turned[first * in + k * count + i] = x[(first + i) * in + k];
            }
#pragma omp for schedule(static)
        for (long panel = 0; panel < out / PANEL; panel++)
            for (long k = 0; k < in; k += DEPTH) {
                long depth = at_most(DEPTH, in - k);
                const float *block = w + (panel * in + k) * PANEL;
                for (long g = 0; g < groups; g++) {
                    long first = rows * g / groups, count = rows * (g + 1) / groups - first;
                    const float *from[MOST_ROWS];
                    float *to[MOST_ROWS];
                    for (long i = 0; i < count; i++) {
                        to[i] = y + (first + i) * out;
                        from[i] = k ? to[i] : bias;
                    }
                    /* The next block is fetched from memory by quarters while this one is multiplied from the cache. */
                    const float *ahead = groups > 1 && g < 4 ? block + depth * PANEL + g * depth * 4 : 0;
                    tiles[count](turned ? turned + first * in + k * count : x + k, count, block, PANEL, depth,
                                 k || bias ? from : 0, to, panel * PANEL, ahead);
                }
            }
    }
}

/* ---- the adapters' product ---------------------------------------------------------------------------------------------

   y[row] += scale * B[:, :rank] A[:rank] x[row], each row with its own adapter, rank and scale.

   Rows stand in blocks of up to BLOCK_ROWS that share an adapter, which is thus read once for all of them. Of the bank's A
   [columns, in] and B [out / PANEL, columns, PANEL] a block uses `ranks[block]` columns from `starts[block]` on; a row of
   it whose own rank is lower gets zeros beyond. */

#define BLOCK_ROWS 4

#define DOTS(ROWS)                                                                                                       \
    static void dots_##ROWS(const float *const *x, const float *a0, const float *a1, long in, float (*out)[2]) {         \
        vec sum[ROWS][2];                                                                                                \
        UNROLLED for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = all(0);                                          \
        long k = 0;                                                                                                      \
        for (; k + LANES <= in; k += LANES) {                                                                            \
            vec v0 = load(a0 + k), v1 = load(a1 + k);                                                                    \
            UNROLLED for (int i = 0; i < ROWS; i++) {                                                                    \
                vec value = load(x[i] + k);                                                                              \
                sum[i][0] += value * v0;                                                                                 \
                sum[i][1] += value * v1;                                                                                 \
            }                                                                                                            \
        }                                                                                                                \
        UNROLLED for (int i = 0; i < ROWS; i++) {                                                                        \
            out[i][0] = sum_of(sum[i][0]);                                                                               \
            out[i][1] = sum_of(sum[i][1]);                                                                               \
            for (long rest = k; rest < in; rest++) {                                                                     \
                out[i][0] += x[i][rest] * a0[rest];                                                                      \
                out[i][1] += x[i][rest] * a1[rest];                                                                      \
            }                                                                                                            \
        }                                                                                                                \
    }
DOTS(1) DOTS(2) DOTS(3) DOTS(4)
typedef void dots(const float *const *, const float *, const float *, long, float (*)[2]);
static dots *const dots_of[] = {0, dots_1, dots_2, dots_3, dots_4};

void dylora_add_lora(const float *x, float *y, const float *a, const float *b, long in, long out, long columns, long blocks,
                     const long *counts, const long *starts, const long *ranks, const long *rows, const long *row_ranks,
                     const float *scales, int threads) {
    long most = 0;
    for (long block = 0; block < blocks; block++) most = ranks[block] > most ? ranks[block] : most;
    float *low = scratch((size_t)blocks * most * BLOCK_ROWS); /* per block [its rank, its rows] */
    long pairs = (most + 1) / 2;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 8)
        for (long item = 0; item < blocks * pairs; item++) {
            long block = item / pairs, c = item % pairs * 2, count = counts[block];
            if (c >= ranks[block]) continue;
            const float *from[BLOCK_ROWS];
            for (long i = 0; i < count; i++) from[i] = x + rows[block * BLOCK_ROWS + i] * in;
            const float *first = a + (starts[block] + c) * in;
            float found[BLOCK_ROWS][2];
            dots_of[count](from, first, c + 1 < ranks[block] ? first + in : first, in, found);
            for (long j = 0; j < 2 && c + j < ranks[block]; j++)
                for (long i = 0; i < count; i++) {
                    long at = block * BLOCK_ROWS + i;
                    low[block * most * BLOCK_ROWS + (c + j) * count + i] = c + j < row_ranks[at] ? found[i][j] * scales[at] : 0;
                }
        }
#pragma omp for schedule(static)
        for (long panel = 0; panel < out / PANEL; panel++)
            for (long block = 0; block < blocks; block++) {
                float *to[BLOCK_ROWS];
                for (long i = 0; i < counts[block]; i++) to[i] = y + rows[block * BLOCK_ROWS + i] * out;
                tiles[counts[block]](low + block * most * BLOCK_ROWS, counts[block], b + (panel * columns + starts[block]) * PANEL,
                                     PANEL, ranks[block], (const float *const *)to, to, panel * PANEL, 0);
            }
    }
}

/* ---- merging -----------------------------------------------------------------------------------------------------------

   merged = w + scale * B[:, :rank] A[:rank], for the panels from `first` to `end`; a [rank, in], b [out, b_stride]. */

void dylora_merge(const float *w, const float *a, const float *b, long b_stride, float scale, long rank, long in, long first,
                  long end, float *merged) {
    float turned[rank * PANEL];
    for (long panel = first; panel < end; panel++) {
        for (long j = 0; j < PANEL; j++)
            for (long r = 0; r < rank; r++) turned[r * PANEL + j] = scale * b[(panel * PANEL + j) * b_stride + r];
        for (long k = 0; k < in; k += MOST_ROWS) {
            long count = at_most(MOST_ROWS, in - k);
            const float *from[MOST_ROWS];
            float *to[MOST_ROWS];
            for (long i = 0; i < count; i++) {
                from[i] = w + (panel * in + k + i) * PANEL;
                to[i] = merged + (panel * in + k + i) * PANEL;
            }
            tiles[count](a + k, in, turned, PANEL, rank, from, to, 0, 0);
        }
    }
}

/* ---- attention ---------------------------------------------------------------------------------------------------------

   Keys and values stand in a cache of slots [slots, kv_heads, dim], cut into blocks of `block_tokens`. */

void dylora_write_cache(const float *key, long key_row, long key_head, const float *value, long value_row, long value_head,
                        const long *slots, long rows, long kv_heads, long dim, long value_dim, float *keys, float *values) {
    for (long row = 0; row < rows; row++)
        for (long head = 0; head < kv_heads; head++) {
            memcpy(keys + (slots[row] * kv_heads + head) * dim, key + row * key_row + head * key_head, dim * sizeof(float));
            memcpy(values + (slots[row] * kv_heads + head) * value_dim, value + row * value_row + head * value_head,
                   value_dim * sizeof(float));
        }
}

/* e^x by Cephes' expf: reduction by powers of two and a polynomial; relative error 2e-7. */
static inline vec exp_of(vec x) {
    x = choose(x < all(-87), all(-87), x); /* below, results would not be normal numbers */
    vec t = x * 1.44269504088896341f;
    ivec n = __builtin_convertvector(t + choose(t < all(0), all(-0.5f), all(0.5f)), ivec);
    vec power = __builtin_convertvector(n, vec);
    vec f = x - power * 0.693359375f + power * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    return (p * f * f + f + 1.0f) * (vec)((n + 127) << 23);
}

#define QUERIES 4 /* query heads that are attended together */

#define SCORES(COUNT)                                                                                                    \
    static void scores_##COUNT(const float *q, long q_head, const float *k, long dim, float *out, long stride) {         \
        vec sum[COUNT];                                                                                                  \
        UNROLLED for (int g = 0; g < COUNT; g++) sum[g] = all(0);                                                        \
        for (long d = 0; d < dim; d += LANES) {                                                                          \
            vec key = load(k + d);                                                                                       \
            UNROLLED for (int g = 0; g < COUNT; g++) sum[g] += load(q + g * q_head + d) * key;                           \
        }                                                                                                                \
        UNROLLED for (int g = 0; g < COUNT; g++) out[g * stride] = sum_of(sum[g]);                                       \
    }
SCORES(1) SCORES(2) SCORES(3) SCORES(4)
typedef void scores(const float *, long, const float *, long, float *, long);
static scores *const scores_of[] = {0, scores_1, scores_2, scores_3, scores_4};

/* out[g] = sum over positions of weight[g][position] * value[position], one vector of the value's dimensions at a time. */
#define BLENDS(COUNT)                                                                                                    \
    static void blend_##COUNT(const float *weights, long stride, const float *const *value, long length, long dim,       \
                              float *out, long out_head) {                                                               \
        for (long d = 0; d < dim; d += LANES) {                                                                          \
            vec sum[COUNT];                                                                                              \
            UNROLLED for (int g = 0; g < COUNT; g++) sum[g] = all(0);                                                    \
            for (long at = 0; at < length; at++) {                                                                       \
                vec v = load(value[at] + d);                                                                             \
                UNROLLED for (int g = 0; g < COUNT; g++) sum[g] += weights[g * stride + at] * v;                         \
            }                                                                                                            \
            UNROLLED for (int g = 0; g < COUNT; g++) store(out + g * out_head + d, sum[g]);                              \
        }                                                                                                                \
    }
BLENDS(1) BLENDS(2) BLENDS(3) BLENDS(4)
typedef void blends(const float *, long, const float *const *, long, long, float *, long);
static blends *const blend_of[] = {0, blend_1, blend_2, blend_3, blend_4};

static float highest_of(const float *values, long length) {
    vec found = all(-INFINITY);
    long i = 0;
    for (; i + LANES <= length; i += LANES) found = larger(load(values + i), found);
    float highest = -INFINITY;
    for (int j = 0; j < LANES; j++) highest = found[j] > highest ? found[j] : highest;
    for (; i < length; i++) highest = values[i] > highest ? values[i] : highest;
    return highest;
}

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

/* Rows that each see `ends[row]` positions of their own sequence, or the last `window` of them (0: all).

   query: row i, head h at query + query_rows[i] * query_row + h * query_head; out [.., heads, value_dim] at the same rows.
   tables [rows, table_width]: the blocks of each row's sequence. */
void dylora_attend(const float *query, long query_row, long query_head, const float *keys, const float *values, float *out,
                   long rows, const long *query_rows, const long *ends, const long *tables, long table_width, long heads,
                   long kv_heads, long dim, long value_dim, long block_tokens, long window, float scale, float softcap,
                   int threads) {
    long group = heads / kv_heads, longest = 0;
    for (long row = 0; row < rows; row++) longest = ends[row] > longest ? ends[row] : longest;
    long stride = (longest + LANES) / LANES * LANES;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (long item = 0; item < rows * kv_heads; item++) {
        long row = item / kv_heads, head = item % kv_heads;
        long begin = window && ends[row] > window ? ends[row] - window : 0, length = ends[row] - begin;
        float *weights = scratch((size_t)stride * (QUERIES + 2));
        const float **value = (const float **)(weights + stride * QUERIES);
        for (long first = 0; first < group; first += QUERIES) {
            long count = at_most(QUERIES, group - first), q_head = head * group + first;
            const float *q = query + query_rows[row] * query_row + q_head * query_head;
            for (long at = 0; at < length; at++) {
                long position = begin + at;
                long slot = tables[row * table_width + position / block_tokens] * block_tokens + position % block_tokens;
                value[at] = values + (slot * kv_heads + head) * value_dim;
                scores_of[count](q, query_head, keys + (slot * kv_heads + head) * dim, dim, weights + at, stride);
            }
            for (long g = 0; g < count; g++) {
                float *own = weights + g * stride;
                for (long at = 0; at < length; at++) own[at] = softcap ? softcap * tanhf(own[at] * (scale / softcap)) : own[at] * scale;
                softmax(own, length);
            }
            blend_of[count](weights, stride, value, length, value_dim, out + (query_rows[row] * heads + q_head) * value_dim, value_dim);
        }
    }
}

/* ---- sampling ----------------------------------------------------------------------------------------------------------

   Of each row of logits [rows, length] the place of the first maximum, and log(sum(e^logit)). A row with a NaN gives some
   place inside it, and NaN. */

void dylora_argmax(const float *logits, long rows, long length, long *ids, float *normalisers, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; row++) {
        const float *values = logits + row * length;
        float highest = highest_of(values, length);
        long best = 0;
        while (best < length - 1 && !(values[best] == highest)) best++;
        vec total = all(0);
        long i = 0;
        for (; i + LANES <= length; i += LANES) total += exp_of(load(values + i) - highest);
        float sum = sum_of(total);
        for (; i < length; i++) sum += expf(values[i] - highest);
        ids[row] = best;
        normalisers[row] = highest + logf(sum);
    }
}

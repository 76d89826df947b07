/* Attention of a prompt's rows: pieces of consecutive rows of one sequence.

   Keys and values of BLOCK positions at a time are packed as the weights of a product are, and serve all queries of a piece:
   its rows times the query heads that share a head of keys. The softmax goes along from block to block (Milakov and
   Gimelshein, arXiv 1805.02867). Blocks begin at multiples of BLOCK, so a row's numbers do not depend on the chunk that it
   came in. */

#include "attention.h"
#include "tiles.h"
#include "turn.h"

TILES(tiles, store)

#define BLOCK 128 /* positions */
#define SOON 16   /* positions: how far ahead of its use a key or value is asked of memory */
#define LINE 16   /* floats that come from memory together */
#define TILE_WIDTH (PANELS * PANEL)

static inline long round_up(long length, long unit) { return shares(length, unit) * unit; }

/* A piece's memory, and what its queries have found so far. */
struct piece {
    long queries, wide;          /* floats of a sum: the values' dimensions, in whole tiles */
    float *turned;               /* of each tile of queries [dim, its queries] */
    float *sums;                 /* [queries, wide], of values weighted by e^(score - highest) */
    float *highest, *totals;     /* [queries]: of the scores, and of the weights */
    float *keys, *values;        /* a block's, in panels: [BLOCK / PANEL, dim, PANEL] and [wide / PANEL, positions, PANEL] */
    float *scores, *weights;     /* of a tile: [MOST_ROWS, BLOCK] and [BLOCK, its queries] */
    float *nothing;              /* [dim], zeros */
};

static struct piece room_for(const struct attention *a, long queries) {
    long wide = round_up(a->value_dim, TILE_WIDTH);
    struct piece p = {queries, wide};
    long lengths[] = {queries * a->dim, queries * wide, queries, queries, BLOCK * a->dim, BLOCK * wide,
                      MOST_ROWS * BLOCK, MOST_ROWS * BLOCK, a->dim}, total = 0;
    float **places[] = {&p.turned, &p.sums, &p.highest, &p.totals, &p.keys, &p.values, &p.scores, &p.weights, &p.nothing};
    for (int i = 0; i < 9; i++) total += round_up(lengths[i], PANEL);
    float *at = scratch(total);
    for (int i = 0; i < 9; i++) *places[i] = at, at += round_up(lengths[i], PANEL);
    memset(p.sums, 0, queries * wide * sizeof(float));
    memset(p.totals, 0, queries * sizeof(float));
    memset(p.nothing, 0, a->dim * sizeof(float));
    for (long i = 0; i < queries; i++) p.highest[i] = -INFINITY;
    return p;
}

/* Bring rows near, into the second cache: the first waits for too few lines at a time, with shares of a head far apart. */
static void ask_for(const float *const *rows, long first, long end, long length) {
    for (long i = first; i < end; i++)
        for (long d = 0; d < length; d += LINE) __builtin_prefetch(rows[i] + d, 0, 2);
}

/* `count` positions from `first` on, and zeros up to a whole number of tiles. */
static void pack_block(const struct attention *a, const struct piece *p, const long *table, long head, long first, long count) {
    const float *key[BLOCK], *value[BLOCK];
    long tokens = a->seen.block_tokens, block = first / tokens, inside = first % tokens;
    for (long at = 0; at < count; at++, inside++) {
        if (inside == tokens) block++, inside = 0;
        long place = (table[block] * tokens + inside) * a->kv_heads + head;
        key[at] = a->keys + place * a->dim;
        value[at] = a->values + place * a->value_dim;
    }
    for (long at = count; at < round_up(count, TILE_WIDTH); at++) key[at] = p->nothing;
    for (long at = 0; at < round_up(count, TILE_WIDTH); at += PANEL) {
        ask_for(key, at + SOON, at_most(at + SOON + PANEL, count), a->dim);
        turn_rows(key + at, PANEL, 0, a->dim, p->keys + at * a->dim);
    }
    for (long at = 0; at < count; at++) {
        ask_for(value, at + SOON, at_most(at + SOON + 1, count), a->value_dim);
        for (long d = 0; d < p->wide; d += PANEL) {
            float *to = p->values + d * count + at * PANEL;
            long known = at_most(PANEL, a->value_dim - d);
            if (known == PANEL) memcpy(to, value[at] + d, PANEL * sizeof(float));
            else
                for (long j = 0; j < PANEL; j++) to[j] = j < known ? value[at][d + j] : 0;
        }
    }
}

/* One query's scores of a block become weights, of which those outside of `low` to `high` are 0. */
static void weigh(const struct attention *a, const struct piece *p, long query, float *scores, long low, long high, long length) {
    if (high <= low) {
        memset(scores, 0, length * sizeof(float));
        return;
    }
    if (a->softcap)
        for (long i = 0; i < length; i++) scores[i] = a->softcap * tanhf(scores[i] / a->softcap);
    for (long i = 0; i < low; i++) scores[i] = -INFINITY;
    for (long i = high; i < length; i++) scores[i] = -INFINITY;
    float before = p->highest[query], highest = highest_of(scores, length);
    if (highest < before) highest = before;
    vec sum = all(0);
    for (long i = 0; i < length; i += LANES) {
        vec score = load(scores + i), weight = exp_of(score - highest);
        weight = choose(score == all(-INFINITY), all(0), weight); /* of which e^-87 is what `exp_of` makes */
        store(scores + i, weight);
        sum += weight;
    }
    float shrunk = expf(before - highest), *sums = p->sums + query * p->wide;
    p->highest[query] = highest;
    p->totals[query] = p->totals[query] * shrunk + sum_of(sum);
    if (shrunk != 1)
        for (long d = 0; d < p->wide; d += LANES) store(sums + d, load(sums + d) * shrunk);
}

/* One head of keys and values, and the query heads that share it. */
static void attend_piece(const struct attention *a, long number, long head) {
    const struct seen *seen = &a->seen;
    const long *table = seen->blocks + seen->starts[number];
    long group = a->heads / a->kv_heads, rows = seen->lengths[number], end = seen->ends[number];
    struct piece p = room_for(a, rows * group);
    const float *query[p.queries];
    for (long i = 0; i < p.queries; i++)
        query[i] = a->query + (seen->query_rows[number] + i / group) * a->query_row + (head * group + i % group) * a->query_head;
    for (long first = 0; first < p.queries; first += MOST_ROWS)
        turn_rows(query + first, at_most(MOST_ROWS, p.queries - first), 0, a->dim, p.turned + first * a->dim);
    for (long i = 0; i < p.queries * a->dim; i++) p.turned[i] *= a->scale;

    long first_end = end - rows + 1; /* of what its first row sees */
    long begin = a->window && first_end > a->window ? first_end - a->window : 0;
    for (long block = begin / BLOCK * BLOCK; block < end; block += BLOCK) {
        long count = at_most(BLOCK, end - block), length = round_up(count, TILE_WIDTH);
        pack_block(a, &p, table, head, block, count);
        for (long first = 0; first < p.queries; first += MOST_ROWS) {
            long together = at_most(MOST_ROWS, p.queries - first);
            float *scores[MOST_ROWS], *sums[MOST_ROWS];
            for (long i = 0; i < together; i++) scores[i] = p.scores + i * BLOCK, sums[i] = p.sums + (first + i) * p.wide;
            for (long at = 0; at < length; at += TILE_WIDTH)
                tiles[together](p.turned + first * a->dim, together, p.keys + at * a->dim, apart(0, PANEL * a->dim), a->dim, 0,
                                scores, at, LANES, 0, 0);
            for (long i = 0; i < together; i++) {
                long sees = first_end + (first + i) / group, low = a->window ? sees - a->window - block : 0;
                weigh(a, &p, first + i, scores[i], low > 0 ? low : 0, at_most(count, sees - block), length);
            }
            turn_rows((const float *const *)scores, together, 0, count, p.weights);
            for (long d = 0; d < p.wide; d += TILE_WIDTH)
                tiles[together](p.weights, together, p.values + d * count, apart(0, PANEL * count), count,
                                (const float *const *)sums, sums, d, LANES, 0, 0);
        }
    }
    for (long i = 0; i < p.queries; i++) {
        float *out = a->out + ((seen->query_rows[number] + i / group) * a->heads + head * group + i % group) * a->value_dim;
        for (long d = 0; d < a->value_dim; d++) out[d] = p.sums[i * p.wide + d] / p.totals[i];
    }
}

void dylora_attend_chunks(const struct attention *a) {
#pragma omp for schedule(dynamic, 1) nowait
    for (long item = 0; item < a->seen.pieces * a->kv_heads; item++) attend_piece(a, item / a->kv_heads, item % a->kv_heads);
}

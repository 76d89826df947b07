/* The products of a step on a CPU, in single precision: the base's, and each row's own adapter's on top of it.

   Why not a library's: with 2 to 32 rows, MKL's and oneDNN's products took 1.1 to 2.4 times as long on AVX2, and
   none has a product in which rows use different adapters and ranks.

   Every result is a sum in an order that depends on the shapes of weights alone: a row's numbers are the same to the last
   bit whatever other rows run beside it, and with any number of threads. */

#ifndef DYLORA_PRODUCTS_H
#define DYLORA_PRODUCTS_H

#include "barrier.h"
#include "tiles.h"
#include "turn.h"

TILES(tiles, store)

#define DEPTH (256 / PANELS) /* inputs of a tile taken together: their weights are 16 KiB, a third of a level 1 cache */
#define BLOCK_ROWS 4
#define SOON 32 /* inputs: how far ahead of its use a weight is asked of memory, 2 KiB */
#define LINE 64 /* bytes that come from memory together: a panel of one input */
#define FEW 20  /* most rows whose products are hardly slower than memory */
#define MANY 64 /* most rows of which a tile stays in a level 1 cache until adapters are added to it */
#define NEAR 128 /* most columns of B that stay there beside it, of all blocks together: 16 KiB of two panels */
#define CHUNK 8 /* most panels between the base's product and the adapters' on top of it */

/* One of several products of the same rows, as when query, key and value are computed of one x. */
struct part {
    const float *w;    /* in panels; 0: `y` holds the product already, and only the adapters' is added */
    const float *bias; /* [out] or 0 */
    const float *add;  /* [rows, out], what the product is added to; 0: the bias, if any */
    float *y;          /* [rows, out] */
    const float *a;    /* [columns, in] of all adapters; 0: no adapter of this step changes it */
    const float *b;    /* of each adapter [out / PANEL, its width, PANEL], one after the other */
    long out;
};

/* The rows of a step that have adapters, in blocks of up to BLOCK_ROWS that share one, which is thus read once for all of
   them. A block uses the first `ranks[block]` of the `widths[block]` columns of its adapter, which begin at
   `starts[block]`; a row of it whose own rank is lower gets zeros beyond. */
struct lora {
    long blocks;
    const long *counts, *starts, *widths, *ranks; /* [blocks] */
    const long *rows, *row_ranks;                 /* [blocks, BLOCK_ROWS] */
    const float *scales;                          /* [blocks, BLOCK_ROWS] */
};

/* ---- x ------------------------------------------------------------------------------------------------------------------ */

static inline long group_start(long rows, long groups, long g) { return rows * g / groups; }

/* Each group of rows as [in, rows of it], so that a tile reads one stream. */
static void turn(const float *x, long rows, long in, long groups, float *turned) {
#pragma omp for collapse(2) schedule(static) nowait
    for (long g = 0; g < groups; g++)
        for (long from = 0; from < in; from += DEPTH) {
            long first = group_start(rows, groups, g), count = group_start(rows, groups, g + 1) - first;
            const float *read[MOST_ROWS];
            for (long i = 0; i < count; i++) read[i] = x + (first + i) * in;
            turn_rows(read, count, from, at_most(in, from + DEPTH), turned + first * in);
        }
}

/* ---- the base's product ------------------------------------------------------------------------------------------------- */

/* Asks memory for the columns of B that outputs of one tile's width need, from `panel` on: the share `turn` of `turns`, since a
   processor waits once it has asked for some 20 lines. */
static void ask_for(const struct part *p, const struct lora *l, long panel, long turn, long turns) {
    for (long block = 0; block < l->blocks; block++) {
        long width = l->widths[block] * PANEL, other = apart(panel + 1 == p->out / PANEL, width);
        const float *b = p->b + l->starts[block] * p->out + panel * width;
        for (long column = turn; column < l->ranks[block]; column += turns) {
            __builtin_prefetch(b + column * PANEL, 0, 3);
            if (PANELS == 2) __builtin_prefetch(b + other + column * PANEL, 0, 3);
        }
    }
}

/* Outputs of one tile's width, from `panel` on, of all rows; of a single row those of one panel. What adapters add to them, if
   any `follow`, is on its way from memory meanwhile. */
static void multiply(const struct part *p, const float *x, int is_turned, long rows, long in, long groups, long panel,
                     const struct lora *follow) {
    int is_single = rows == 1 || panel + 1 == p->out / PANEL;
    long other = apart(is_single, in * PANEL), step = apart(is_single, LANES);
    for (long k = 0; k < in; k += DEPTH) {
        long depth = at_most(DEPTH, in - k);
        const float *block = p->w + (panel * in + k) * PANEL;
        const float *next = k + depth < in ? block + depth * PANEL : p->w + (panel + PANELS) * in * PANEL;
        for (long g = 0; g < groups; g++) {
            long first = group_start(rows, groups, g), count = group_start(rows, groups, g + 1) - first;
            const float *from[MOST_ROWS];
            float *to[MOST_ROWS];
            for (long i = 0; i < count; i++) {
                to[i] = p->y + (first + i) * p->out;
                from[i] = k ? to[i] : p->add ? p->add + (first + i) * p->out : p->bias;
            }
            /* Groups of rows take turns at a block: while they do, the next comes from memory, an equal share with each, so that
               memory never rests. One group alone is faster than memory, and asks for what it needs soon. A single row leaves
               that to the processor. */
            long pace = (LINE + groups - 1) / groups;
            const float *ahead = rows == 1 ? 0 : groups > 1 ? next + depth * g / groups * PANEL : block + SOON * PANEL;
            const float *read = is_turned ? x + first * in + k * count : x + k;
            if (follow) ask_for(p, follow, panel, k / DEPTH * groups + g, shares(in, DEPTH) * groups);
            tiles[count](read, count, block, other, depth, k || p->add || p->bias ? from : 0, to, panel * PANEL, step, ahead, pace);
        }
    }
}

/* ---- the adapters' product ---------------------------------------------------------------------------------------------- */

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

/* low = scale * x A^T for every block, [its rank, its rows], `most` columns apart. */
static void shrink(const struct part *p, const struct lora *l, const float *x, long in, long most, float *low) {
    long pairs = (most + 1) / 2;
#pragma omp for schedule(dynamic, 4) nowait
    for (long item = 0; item < l->blocks * pairs; item++) {
        long block = item / pairs, c = item % pairs * 2, count = l->counts[block];
        if (c >= l->ranks[block]) continue;
        const float *from[BLOCK_ROWS];
        for (long i = 0; i < count; i++) from[i] = x + l->rows[block * BLOCK_ROWS + i] * in;
        const float *first = p->a + (l->starts[block] + c) * in;
        float found[BLOCK_ROWS][2];
        dots_of[count](from, first, c + 1 < l->ranks[block] ? first + in : first, in, found);
        for (long j = 0; j < 2 && c + j < l->ranks[block]; j++)
            for (long i = 0; i < count; i++) {
                long at = block * BLOCK_ROWS + i;
                float value = c + j < l->row_ranks[at] ? found[i][j] * l->scales[at] : 0;
                low[(block * most + c + j) * BLOCK_ROWS + i] = value;
            }
    }
}

/* y += low B, of the panels from `first` to `end`: what the base's product has just left in the cache. */
static void expand(const struct part *p, const struct lora *l, const float *low, long most, long first, long end) {
    for (long block = 0; block < l->blocks; block++) {
        long width = l->widths[block] * PANEL;
        const float *b = p->b + l->starts[block] * p->out;
        float *to[BLOCK_ROWS];
        for (long i = 0; i < l->counts[block]; i++) to[i] = p->y + l->rows[block * BLOCK_ROWS + i] * p->out;
        for (long panel = first; panel < end; panel += PANELS) {
            int is_single = panel + 1 == end;
            tiles[l->counts[block]](low + block * most * BLOCK_ROWS, BLOCK_ROWS, b + panel * width, apart(is_single, width),
                                    l->ranks[block], (const float *const *)to, to, panel * PANEL, apart(is_single, LANES), 0, 0);
        }
    }
}

/* ---- both --------------------------------------------------------------------------------------------------------------- */

/* A step's products of one x, and their memory. */
struct products {
    long rows, in, groups, count, most, columns, low_size; /* groups of rows; parts; the highest rank; the sum of all blocks' */
    const struct part *parts;
    const struct lora *lora; /* 0: the base alone */
    int is_turned;
    float *turned, *low;
};

static struct products products_of(long rows, long in, const struct part *parts, long count, const struct lora *lora) {
    struct products p = {rows, in, (rows + MOST_ROWS - 1) / MOST_ROWS, count, 0, 0, 0, parts, lora && lora->blocks ? lora : 0};
    for (long block = 0; p.lora && block < lora->blocks; block++) {
        p.most = most_of(p.most, lora->ranks[block]);
        p.columns += lora->ranks[block];
    }
    p.low_size = p.lora ? lora->blocks * p.most * BLOCK_ROWS : 0;
    p.is_turned = rows > 1 && parts[0].w;
    return p;
}

/* Floats of memory that they need. */
static size_t room_of(const struct products *p) { return (size_t)(p->is_turned ? p->rows * p->in : 0) + p->count * p->low_size; }

/* Panels that a thread takes at a time: as many for each thread, whole tiles, about CHUNK. */
static long chunk_of(long panels, long threads) {
    long tiles = shares(shares(panels, PANELS), threads);
    return shares(tiles, shares(tiles * PANELS, CHUNK)) * PANELS;
}

/* y = add + bias + x w^T + (scale * x A^T) B for each part; x [rows, in]. To be called by every thread of a parallel region,
   whose other threads may still compute when it returns. */
static void multiply_all(const struct products *p, const float *x, struct barrier *barrier) {
    if (p->is_turned) turn(x, p->rows, p->in, p->groups, p->turned);
    for (long i = 0; p->lora && i < p->count; i++)
        if (p->parts[i].a) shrink(p->parts + i, p->lora, x, p->in, p->most, p->low + i * p->low_size);
    if (p->is_turned || p->lora) wait_for_all(barrier);
    const float *read = p->is_turned ? p->turned : x;
    /* A single row waits for memory, which gives most to one who reads on and on: two panels are two places. */
    long together = p->rows == 1 ? 1 : PANELS;
    /* Few rows are faster than memory, which then serves one long read after the other best: an adapter's columns of a whole
       chunk. More leave it time, in which the columns for a tile come near, if they are not too many, before the tile is done. */
    int is_asked = p->rows > FEW && p->rows <= MANY && p->columns <= NEAR;
    for (long i = 0; i < p->count; i++) {
        const struct part *part = p->parts + i;
        const struct lora *own = part->a ? p->lora : 0;
        long panels = part->out / PANEL, chunk = chunk_of(panels, omp_get_num_threads()), span = is_asked ? PANELS : chunk;
        /* Who comes takes: memory is never as fast for one thread as for another, and all wait for the last. */
#pragma omp for schedule(monotonic : dynamic, 1) nowait
        for (long first = 0; first < panels; first += chunk) {
            long end = at_most(first + chunk, panels);
            for (long from = first; from < end; from += span) {
                long to = at_most(from + span, end);
                for (long panel = from; part->w && panel < to; panel += together)
                    multiply(part, read, p->is_turned, p->rows, p->in, p->groups, panel, is_asked ? own : 0);
                if (own) expand(part, own, p->low + i * p->low_size, p->most, from, to);
            }
        }
    }
}

#endif

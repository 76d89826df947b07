/* Tiles: `rows` x TWO vectors of outputs, kept in registers while their inputs stream past.

   A packed weight stands in panels of PANEL outputs, [out / PANEL, in, PANEL]. A tile takes the two halves of one panel where
   a vector has 8 lanes, and two panels where it has 16. */

#ifndef DYLORA_TILES_H
#define DYLORA_TILES_H

#include "vectors.h"

#define PANEL 16
#define PANELS (2 * LANES / PANEL) /* that a tile takes */
#if LANES == 16
#define MOST_ROWS 12 /* 12 x 2 accumulators and 3 operands, of 32 vector registers */
#else
#define MOST_ROWS 6 /* 6 x 2 accumulators and 3 operands fill 16 vector registers */
#endif

/* How far apart the two vectors of a tile stand: in one panel, or in two that are `distance` apart. Of a last single panel both
   compute the same. */
static inline long apart(int is_single, long distance) { return PANELS == 1 ? LANES : is_single ? 0 : distance; }

/* to[i][column + v * step + j] = from[i][the same place] + sum over k of x[k * x_stride + i] * w[v * other + k * PANEL + j]

   for the vectors v = 0, 1; from = 0: zeros. Into the cache comes, if `ahead` is given, what stands there: `pace` bytes for each
   input, and where a tile takes two panels, as many as far apart as those at `w`. */
typedef void tile(const float *x, long x_stride, const float *w, long other, long depth, const float *const *from,
                  float *const *to, long column, long step, const float *ahead, long pace);

#define TILE(NAME, ROWS, STORE)                                                                                          \
    static void NAME##ROWS(const float *x, long x_stride, const float *w, long other, long depth, const float *const *from,\
                           float *const *to, long column, long step, const float *ahead, long pace) {                    \
        vec sum[ROWS][2];                                                                                                \
        UNROLLED for (int i = 0; i < ROWS; i++) {                                                                        \
            sum[i][0] = from ? load(from[i] + column) : all(0);                                                          \
            sum[i][1] = from ? load(from[i] + column + step) : all(0);                                                   \
        }                                                                                                                \
        for (long k = 0; k < depth; k++) {                                                                               \
            vec w0 = load(w + k * PANEL), w1 = load(w + other + k * PANEL);                                              \
            if (ahead) {                                                                                                 \
                __builtin_prefetch((const char *)ahead + k * pace, 0, 3);                                                \
                if (PANELS == 2) __builtin_prefetch((const char *)(ahead + other) + k * pace, 0, 3);                     \
            }                                                                                                            \
            UNROLLED for (int i = 0; i < ROWS; i++) {                                                                    \
                vec value = all(x[k * x_stride + i]);                                                                    \
                if (ROWS > 1) {                                                                                          \
                    add_product(&sum[i][0], value, w0);                                                                  \
                    add_product(&sum[i][1], value, w1);                                                                  \
                } else { /* a weight that is used once need not be loaded before */                                      \
                    sum[i][0] += value * w0;                                                                             \
                    sum[i][1] += value * w1;                                                                             \
                }                                                                                                        \
            }                                                                                                            \
        }                                                                                                                \
        UNROLLED for (int i = 0; i < ROWS; i++) {                                                                        \
            STORE(to[i] + column, sum[i][0]);                                                                            \
            STORE(to[i] + column + step, sum[i][1]);                                                                     \
        }                                                                                                                \
    }

/* Tiles of every number of rows, as an array by that number. */
#if LANES == 16
#define TILES(NAME, STORE)                                                                                               \
    TILE(NAME, 1, STORE) TILE(NAME, 2, STORE) TILE(NAME, 3, STORE) TILE(NAME, 4, STORE) TILE(NAME, 5, STORE)             \
    TILE(NAME, 6, STORE) TILE(NAME, 7, STORE) TILE(NAME, 8, STORE) TILE(NAME, 9, STORE) TILE(NAME, 10, STORE)            \
    TILE(NAME, 11, STORE) TILE(NAME, 12, STORE)                                                                          \
    static tile *const NAME[] = {0,       NAME##1, NAME##2, NAME##3, NAME##4,  NAME##5, NAME##6,                         \
                                 NAME##7, NAME##8, NAME##9, NAME##10, NAME##11, NAME##12};
#else
#define TILES(NAME, STORE)                                                                                               \
    TILE(NAME, 1, STORE) TILE(NAME, 2, STORE) TILE(NAME, 3, STORE) TILE(NAME, 4, STORE) TILE(NAME, 5, STORE)             \
    TILE(NAME, 6, STORE)                                                                                                 \
    static tile *const NAME[] = {0, NAME##1, NAME##2, NAME##3, NAME##4, NAME##5, NAME##6};
#endif

#endif

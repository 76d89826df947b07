/* Rows as columns. */

#ifndef DYLORA_TURN_H
#define DYLORA_TURN_H

#include "vectors.h"

typedef int ivec4 __attribute__((vector_size(16)));
typedef float vec4u __attribute__((vector_size(16), aligned(4), may_alias));
typedef float vec2u __attribute__((vector_size(8), aligned(4), may_alias));

/* Four columns of four rows as rows: to[k * stride + i] = rows[i][k], for k from `first` to `first` + 3. */
static inline void turn_square(const float *const *rows, long first, float *to, long stride) {
    vec4 a = *(const vec4u *)(rows[0] + first), b = *(const vec4u *)(rows[1] + first);
    vec4 c = *(const vec4u *)(rows[2] + first), d = *(const vec4u *)(rows[3] + first);
    vec4 ab0 = __builtin_shuffle(a, b, (ivec4){0, 4, 1, 5}), ab2 = __builtin_shuffle(a, b, (ivec4){2, 6, 3, 7});
    vec4 cd0 = __builtin_shuffle(c, d, (ivec4){0, 4, 1, 5}), cd2 = __builtin_shuffle(c, d, (ivec4){2, 6, 3, 7});
    to += first * stride;
    *(vec4u *)to = __builtin_shuffle(ab0, cd0, (ivec4){0, 1, 4, 5});
    *(vec4u *)(to + stride) = __builtin_shuffle(ab0, cd0, (ivec4){2, 3, 6, 7});
    *(vec4u *)(to + 2 * stride) = __builtin_shuffle(ab2, cd2, (ivec4){0, 1, 4, 5});
    *(vec4u *)(to + 3 * stride) = __builtin_shuffle(ab2, cd2, (ivec4){2, 3, 6, 7});
}

/* The same of two rows. */
static inline void turn_pair(const float *const *rows, long first, float *to, long stride) {
    vec4 a = *(const vec4u *)(rows[0] + first), b = *(const vec4u *)(rows[1] + first);
    union { vec4 whole; vec2u half[2]; } low = {__builtin_shuffle(a, b, (ivec4){0, 4, 1, 5})};
    union { vec4 whole; vec2u half[2]; } high = {__builtin_shuffle(a, b, (ivec4){2, 6, 3, 7})};
    to += first * stride;
    *(vec2u *)to = low.half[0];
    *(vec2u *)(to + stride) = low.half[1];
    *(vec2u *)(to + 2 * stride) = high.half[0];
    *(vec2u *)(to + 3 * stride) = high.half[1];
}

/* to[k * count + i] = rows[i][k], for `count` rows and k from `from` to `end`. */
static inline void turn_rows(const float *const *rows, long count, long from, long end, float *to) {
    long squares = from + (end - from) / 4 * 4;
    for (long i = 0; i < count;) {
        long wide = i + 4 <= count ? 4 : i + 2 <= count ? 2 : 1, k = from;
        if (wide == 4)
            for (; k < squares; k += 4) turn_square(rows + i, k, to + i, count);
        if (wide == 2)
            for (; k < squares; k += 4) turn_pair(rows + i, k, to + i, count);
        for (; k < end; k++)
            for (long j = 0; j < wide; j++) to[k * count + i + j] = rows[i + j][k];
        i += wide;
    }
}

#endif

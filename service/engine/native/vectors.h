/* Vectors of floats as wide as the processor has them, through the compiler's own vector types: one source for AVX2, AVX-512
   and Neon. A file that includes this may set LANES itself. */

#ifndef DYLORA_VECTORS_H
#define DYLORA_VECTORS_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef LANES
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#endif

#define UNROLLED _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *at) { return *(const vec *)at; }
static inline void store(float *at, vec value) { *(vec *)at = value; }
static inline vec all(float v) { return v - (vec){}; } /* not +, which would turn -0 into 0 and so cost an addition */

/* sum += a * b, rounded once, in the register that holds the sum: left to itself gcc moves the accumulators of a loop about, and
   in tiles of five rows the moves took as long as a sixth row. */
static inline void add_product(vec *sum, vec a, vec b) {
#if defined(__AVX512F__) || (defined(__FMA__) && LANES == 8)
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(*sum) : "v"(a), "v"(b));
#else
    *sum += a * b;
#endif
}

static inline vec choose(ivec which, vec yes, vec no) { return (vec)((which & (ivec)yes) | (~which & (ivec)no)); }
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

static inline float sum_of(vec v) {
#if LANES == 16
    union { vec whole; vec8 half[2]; } w = {v};
    union { vec8 whole; vec4 half[2]; } h = {w.half[0] + w.half[1]};
#else
    union { vec whole; vec4 half[2]; } h = {v};
#endif
    vec4 q = h.half[0] + h.half[1];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

static inline long at_most(long a, long b) { return a < b ? a : b; }
static inline long most_of(long a, long b) { return a > b ? a : b; }
static inline long shares(long a, long b) { return (a + b - 1) / b; } /* of b each that make up a */

/* Memory that is kept: fresh memory would cost a page fault for every 4 KiB. */
struct held {
    float *at;
    size_t size;
};

static inline float *room_in(struct held *held, size_t floats) {
    if (held->size < floats) {
        free(held->at);
        held->size = floats;
        if (posix_memalign((void **)&held->at, 64, floats * sizeof(float))) abort();
    }
    return held->at;
}

/* A thread's own. */
static inline float *scratch(size_t floats) {
    static __thread struct held own;
    return room_in(&own, floats);
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

static inline float highest_of(const float *values, long length) {
    vec found = all(-INFINITY);
    long i = 0;
    for (; i + LANES <= length; i += LANES) found = larger(load(values + i), found);
    float highest = -INFINITY;
    for (int j = 0; j < LANES; j++) highest = found[j] > highest ? found[j] : highest;
    for (; i < length; i++) highest = values[i] > highest ? values[i] : highest;
    return highest;
}

#endif

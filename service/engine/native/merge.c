/* Merging an adapter into a packed weight. */

#include "tiles.h"

#ifdef __AVX__
#include <immintrin.h>
#endif

/* A store past the caches: merged weights are more than they hold, and a line that is to be overwritten whole need not be
   read first. `at` is aligned to the vector. */
static inline void stream(float *at, vec value) {
#if LANES == 16 && defined __AVX512F__
    _mm512_stream_ps(at, (__m512)value);
#elif LANES == 8 && defined __AVX__
    _mm256_stream_ps(at, (__m256)value);
#else
    store(at, value);
#endif
}

TILES(streamed, stream)

#define SOON 32 /* inputs: how far ahead of its use a weight is asked of memory, 2 KiB */
#define ROWS 6  /* inputs of a tile: so few that the processor reads the next ones while it sums these */

/* merged = w + scale * B[:, :rank] A[:rank], for the panels from `first` to `end`; a [rank, in], b [out, b_stride].
   `merged` is aligned to 64 bytes. */
void dylora_merge(const float *w, const float *a, const float *b, long b_stride, float scale, long rank, long in, long first,
                  long end, float *merged) {
    float turned[PANELS * PANEL * rank]; /* of each panel [rank, PANEL] */
    for (long panel = first; panel < end; panel += PANELS) {
        long count = at_most(PANELS, end - panel), is_single = count < PANELS;
        for (long v = 0; v < count; v++)
            for (long j = 0; j < PANEL; j++)
                for (long r = 0; r < rank; r++)
                    turned[(v * rank + r) * PANEL + j] = scale * b[((panel + v) * PANEL + j) * b_stride + r];
        for (long k = 0; k < in; k += ROWS) {
            long rows = at_most(ROWS, in - k);
            const float *from[ROWS];
            float *to[ROWS];
            for (long i = 0; i < rows; i++) {
                from[i] = w + (panel * in + k + i) * PANEL;
                to[i] = merged + (panel * in + k + i) * PANEL;
                for (long v = 0; v < count; v++) __builtin_prefetch(from[i] + (v * in + SOON) * PANEL);
            }
            streamed[rows](a + k, in, turned, apart(is_single, rank * PANEL), rank, from, to, 0, apart(is_single, in * PANEL), 0, 0);
        }
    }
#ifdef __AVX__
    _mm_sfence(); /* before another thread is told of them */
#endif
}

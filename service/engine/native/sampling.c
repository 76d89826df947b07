/* Greedy sampling. */

#include "vectors.h"

/* Of each row of logits [rows, length] the place of the first maximum, and log(sum(e^logit)). A row with a NaN gives some
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

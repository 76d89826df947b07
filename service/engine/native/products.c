/* The products of one input, on their own. */

#include "products.h"

void dylora_products(const float *x, long rows, long in, const struct part *parts, long count, const struct lora *lora,
                     int threads) {
    struct products p = products_of(rows, in, parts, count, lora);
    p.turned = scratch(room_of(&p));
    p.low = p.turned + (p.is_turned ? rows * in : 0);
    struct barrier barrier = {};
#pragma omp parallel num_threads(threads)
    multiply_all(&p, x, &barrier);
}

/* A block of Llama's kind, but for its attention:

     query, key, value = rope(norm(x) W)      before attention
     x += attention W                         after it
     x += (silu(norm(x) W_gate) * (norm(x) W_up)) W_down

   One parallel region each: left to a compiler of graphs, what stands between the products took a fifth to a third of a step. */

#include "products.h"

struct block {
    long hidden, inner, heads, kv_heads, dim;
    const float *norms[4];      /* of the input, of the attention's output, of a query head and of a key head or 0 */
    const struct part *inputs;  /* query, key, value */
    const struct part *output;
    const struct part *doors;   /* gate, up */
    const struct part *down;
};

/* y = weight * x / sqrt(mean(x^2) + epsilon) */
static void normalise(const float *x, const float *weight, long length, float epsilon, float *y) {
    vec squares = all(0);
    long i = 0;
    for (; i + LANES <= length; i += LANES) squares += load(x + i) * load(x + i);
    float sum = sum_of(squares);
    for (; i < length; i++) sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / length + epsilon);
    for (i = 0; i < length; i++) y[i] = weight[i] * (x[i] * scale);
}

/* Rotary embedding of a head; cos and sin [dim], whose halves are alike. */
static void rotate(float *head, const float *cos, const float *sin, long dim) {
    for (long i = 0, half = dim / 2; i < half; i++) {
        float low = head[i], high = head[i + half];
        head[i] = low * cos[i] - high * sin[i];
        head[i + half] = high * cos[i + half] + low * sin[i + half];
    }
}

/* gate = silu(gate) * up */
static void open_gates(float *gate, const float *up, long length) {
    for (long i = 0; i < length; i += LANES) { /* lengths are multiples of PANEL */
        vec g = load(gate + i), minus = choose(g < all(-88), all(88), -g);
        store(gate + i, g / (1 + exp_of(minus)) * load(up + i));
    }
}

/* x [rows, hidden] to query [rows, heads, dim]; keys and values go to `slots` of the layer's cache [slots, kv_heads, dim].
   cos, sin [rows, dim]. */
void dylora_before_attention(const struct block *b, const float *x, long rows, const float *cos, const float *sin, float epsilon,
                             const struct lora *lora, const long *slots, float *query, float *keys, float *values, int threads) {
    long width = b->kv_heads * b->dim;
    struct part parts[3] = {b->inputs[0], b->inputs[1], b->inputs[2]};
    struct products p = products_of(rows, b->hidden, parts, 3, lora);
    float *normed = scratch(room_of(&p) + rows * (b->hidden + 2 * width)), *key = normed + rows * b->hidden;
    float *value = key + rows * width;
    p.turned = value + rows * width;
    p.low = p.turned + (p.is_turned ? rows * b->hidden : 0);
    parts[0].y = query, parts[1].y = key, parts[2].y = value;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++)
            normalise(x + row * b->hidden, b->norms[0], b->hidden, epsilon, normed + row * b->hidden);
        multiply_all(&p, normed);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++)
            for (long head = 0; head < b->heads + b->kv_heads; head++) {
                int is_key = head >= b->heads;
                float *at = is_key ? key + row * width + (head - b->heads) * b->dim : query + (row * b->heads + head) * b->dim;
                if (b->norms[2 + is_key]) normalise(at, b->norms[2 + is_key], b->dim, epsilon, at);
                rotate(at, cos + row * b->dim, sin + row * b->dim, b->dim);
                if (head == b->heads + b->kv_heads - 1) {
                    memcpy(keys + slots[row] * width, key + row * width, width * sizeof(float));
                    memcpy(values + slots[row] * width, value + row * width, width * sizeof(float));
                }
            }
    }
}

/* x [rows, hidden] and the attention's output [rows, heads, dim] to y [rows, hidden]. */
void dylora_after_attention(const struct block *b, const float *x, const float *attended, long rows, float epsilon,
                            const struct lora *lora, float *y, int threads) {
    struct part output = *b->output, doors[2] = {b->doors[0], b->doors[1]}, down = *b->down;
    struct products steps[3] = {products_of(rows, b->heads * b->dim, &output, 1, lora),
                                products_of(rows, b->hidden, doors, 2, lora), products_of(rows, b->inner, &down, 1, lora)};
    size_t room = 0;
    for (int i = 0; i < 3; i++) room = room_of(steps + i) > room ? room_of(steps + i) : room;
    float *normed = scratch(room + rows * (b->hidden + 2 * b->inner)), *gate = normed + rows * b->hidden;
    float *up = gate + rows * b->inner;
    for (int i = 0; i < 3; i++) {
        steps[i].turned = up + rows * b->inner;
        steps[i].low = steps[i].turned + (steps[i].is_turned ? rows * steps[i].in : 0);
    }
    output.add = x, output.y = y, doors[0].y = gate, doors[1].y = up, down.add = y, down.y = y;
#pragma omp parallel num_threads(threads)
    {
        multiply_all(steps, attended);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++)
            normalise(y + row * b->hidden, b->norms[1], b->hidden, epsilon, normed + row * b->hidden);
        multiply_all(steps + 1, normed);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) open_gates(gate + row * b->inner, up + row * b->inner, b->inner);
        multiply_all(steps + 2, gate);
    }
}

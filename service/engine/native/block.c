/* Blocks of Llama's kind:

     query, key, value = rope(norm(x) W)      before attention
     x += attention W                         after it
     x += (silu(norm(x) W_gate) * (norm(x) W_up)) W_down

   All of a step in one parallel region: left to a compiler of graphs, what stands between the products took a fifth to a third
   of a step. */

#include "attention.h"
#include "products.h"

struct block {
    long hidden, inner, heads, kv_heads, dim;
    float *keys, *values;       /* of its part of the cache, [slots, kv_heads, dim] */
    long window;                /* positions that a row sees, its own included; 0: all */
    double scale, epsilon;      /* of scores, and of norms */
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

/* What a step's blocks have in common. */
struct step {
    long rows;
    const float *cos, *sin; /* [positions, dim] */
    const long *positions;  /* [rows] */
    const struct lora *lora;
    const long *slots; /* [rows], where keys and values go */
};

/* What the threads share: memory of one block, which the next overwrites, and where they wait for each other. */
struct room {
    struct barrier *barrier;
    float *normed, *key, *value, *query, *attended, *gate, *up, *products;
};

static struct room room_for(const struct block *b, const struct step *s, struct barrier *barrier) {
    long width = b->kv_heads * b->dim, heads = b->heads * b->dim;
    struct part none[3] = {b->inputs[0], b->inputs[1], b->inputs[2]};
    long in = most_of(most_of(b->hidden, b->inner), heads);
    struct products largest = products_of(s->rows, in, none, 3, s->lora);
    long lengths[] = {b->hidden, width, width, heads, heads, b->inner, b->inner}, total = 0;
    for (int i = 0; i < 7; i++) total += s->rows * lengths[i];
    float *at = scratch(total + room_of(&largest));
    struct room room = {barrier};
    float **places[] = {&room.normed, &room.key, &room.value, &room.query, &room.attended, &room.gate, &room.up};
    for (int i = 0; i < 7; i++) *places[i] = at, at += s->rows * lengths[i];
    room.products = at;
    return room;
}

static void multiply_in(const struct room *room, const struct step *s, const float *x, long in, const struct part *parts, long count) {
    struct products p = products_of(s->rows, in, parts, count, s->lora);
    p.turned = room->products;
    p.low = p.turned + (p.is_turned ? s->rows * in : 0);
    multiply_all(&p, x, room->barrier);
}

static void normalise_all(const struct block *b, const struct step *s, const float *x, const float *weight, float *to) {
#pragma omp for schedule(static) nowait
    for (long row = 0; row < s->rows; row++)
        normalise(x + row * b->hidden, weight, b->hidden, b->epsilon, to + row * b->hidden);
}

/* x [rows, hidden] to the room's query [rows, heads, dim]; keys and values go to the cache. By every thread, as what follows. */
static void before_attention(const struct block *b, const struct step *s, const struct room *room, const float *x) {
    long width = b->kv_heads * b->dim;
    struct part parts[3] = {b->inputs[0], b->inputs[1], b->inputs[2]};
    parts[0].y = room->query, parts[1].y = room->key, parts[2].y = room->value;
    normalise_all(b, s, x, b->norms[0], room->normed);
    wait_for_all(room->barrier);
    multiply_in(room, s, room->normed, b->hidden, parts, 3);
    wait_for_all(room->barrier);
#pragma omp for schedule(static) nowait
    for (long row = 0; row < s->rows; row++) {
        for (long head = 0; head < b->heads + b->kv_heads; head++) {
            int is_key = head >= b->heads;
            float *at = is_key ? room->key + row * width + (head - b->heads) * b->dim : room->query + (row * b->heads + head) * b->dim;
            if (b->norms[2 + is_key]) normalise(at, b->norms[2 + is_key], b->dim, b->epsilon, at);
            rotate(at, s->cos + s->positions[row] * b->dim, s->sin + s->positions[row] * b->dim, b->dim);
        }
        memcpy(b->keys + s->slots[row] * width, room->key + row * width, width * sizeof(float));
        memcpy(b->values + s->slots[row] * width, room->value + row * width, width * sizeof(float));
    }
}

/* x [rows, hidden], of the room's attention [rows, heads, dim], to what the block makes of it. */
static void after_attention(const struct block *b, const struct step *s, const struct room *room, float *x) {
    struct part output = *b->output, doors[2] = {b->doors[0], b->doors[1]}, down = *b->down;
    output.add = output.y = x, doors[0].y = room->gate, doors[1].y = room->up, down.add = down.y = x;
    multiply_in(room, s, room->attended, b->heads * b->dim, &output, 1);
    wait_for_all(room->barrier);
    normalise_all(b, s, x, b->norms[1], room->normed);
    wait_for_all(room->barrier);
    multiply_in(room, s, room->normed, b->hidden, doors, 2);
    wait_for_all(room->barrier);
#pragma omp for schedule(static) nowait
    for (long row = 0; row < s->rows; row++) open_gates(room->gate + row * b->inner, room->up + row * b->inner, b->inner);
    wait_for_all(room->barrier);
    multiply_in(room, s, room->gate, b->inner, &down, 1);
}

static struct attention attention_of(const struct block *b, const struct room *room, const struct seen *seen) {
    return (struct attention){room->query, b->heads * b->dim, b->dim, b->keys, b->values, room->attended, b->heads,
                              b->kv_heads, b->dim, b->dim, b->window, b->scale, 0, *seen};
}

/* All blocks, one after the other, and the norm that ends them; x [rows, hidden] is overwritten with the result. */
void dylora_blocks(
    const struct block *const *blocks, long count, const struct step *s, const struct seen *seen, const float *norm, float *x, int threads) {
    struct barrier barrier = {};
    struct room room = room_for(blocks[0], s, &barrier);
    float *parts = 0;
    for (long i = 0; i < count; i++) { /* one that sees further than the others needs more */
        struct attention attention = attention_of(blocks[i], &room, seen);
        parts = dylora_room_for_parts(&attention);
    }
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < count; i++) {
        const struct block *b = blocks[i];
        struct attention attention = attention_of(b, &room, seen);
        before_attention(b, s, &room, x);
        wait_for_all(&barrier);
        dylora_attend_together(&attention, parts, &barrier);
        wait_for_all(&barrier);
        after_attention(b, s, &room, x);
        wait_for_all(&barrier);
        if (i + 1 == count) normalise_all(b, s, x, norm, x);
    }
}

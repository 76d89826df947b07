/* Attention of rows that each see their own sequence. */

#ifndef DYLORA_ATTENTION_H
#define DYLORA_ATTENTION_H

#include "barrier.h"

/* What rows see of their own sequences: first those of prompts, in pieces of consecutive rows of one sequence, then single rows.
   The last row of each sees the first `ends` positions, which stand in the blocks from `starts` on, the row before it one less. */
struct seen {
    long pieces, rows;
    const long *query_rows, *lengths, *ends; /* [pieces + rows]: the first row, how many, and positions */
    const long *starts, *blocks;             /* [pieces + rows]: the first of each in all blocks */
    long block_tokens;
};

/* One layer's. Head h of a row of the query at query + row * query_row + h * query_head; out [.., heads, value_dim] at the same
   rows. Of what a row sees the last `window` positions count; 0: all. */
struct attention {
    const float *query;
    long query_row, query_head;
    const float *keys, *values; /* [slots, kv_heads, dim], in blocks of `block_tokens` slots */
    float *out;
    long heads, kv_heads, dim, value_dim, window;
    float scale, softcap;
    struct seen seen;
};

/* Memory for what parts of rows find, which all threads share; the calling thread's, and good until it asks for more. */
float *dylora_room_for_parts(const struct attention *a);

/* To be called by every thread of a parallel region, whose other threads may still compute when it returns. */
void dylora_attend_together(const struct attention *a, float *parts, struct barrier *barrier);
void dylora_attend_chunks(const struct attention *a); /* the part of it that is of prompts */

#endif

/* Attention of rows that each see their own sequence. */

#ifndef DYLORA_ATTENTION_H
#define DYLORA_ATTENTION_H

/* What rows see: `ends[row]` positions each, which stand in the blocks of `tables[row]`. */
struct seen {
    long rows;
    const long *query_rows, *ends; /* [rows] */
    const long *tables;            /* [rows, table_width] */
    long table_width, block_tokens;
};

/* One layer's. Row i, head h of the query at query + query_rows[i] * query_row + h * query_head; out [.., heads, value_dim] at
   the same rows. Of what a row sees the last `window` positions count; 0: all. */
struct attention {
    const float *query;
    long query_row, query_head;
    const float *keys, *values; /* [slots, kv_heads, dim], in blocks of `block_tokens` slots */
    float *out;
    long heads, kv_heads, dim, value_dim, window;
    float scale, softcap;
    struct seen seen;
};

/* To be called by every thread of a parallel region, whose other threads may still compute when it returns. */
void dylora_attend_together(const struct attention *a);

#endif

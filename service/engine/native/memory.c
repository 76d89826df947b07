/* Memory for weights. */

#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

/* Ask for pages of 2 MiB, before the memory is touched: products read it from end to end, and with pages of 4 KiB the
   processor spends a quarter of the time on looking up addresses. A refusal changes nothing. */
void dylora_use_huge_pages(void *memory, long size) {
#ifdef MADV_HUGEPAGE
    uintptr_t page = 1 << 21, at = (uintptr_t)memory, first = (at + page - 1) / page * page, end = (at + size) / page * page;
    if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)size;
#endif
}

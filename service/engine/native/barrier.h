/* Where the threads of a parallel region wait for each other.

   Why not OpenMP's: once a process has more threads in the teams of all its callers than processors, as with one that loaded the
   model and the engine's, GNU's puts who waits to sleep nearly at once. A step has a hundred barriers, most of them after work of
   a few microseconds, and waking took 40 of them each. */

#ifndef DYLORA_BARRIER_H
#define DYLORA_BARRIER_H

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

#define SPINS 4000 /* looks, some 50 microseconds, 200 where a pause is long, before a thread whose company is late leaves its processor to others */

/* Of one region, whose threads all begin with zeros. */
struct barrier {
    atomic_int arrived, round;
};

static inline void pause_a_little(void) {
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

/* Returns once all threads of the region have called it; what they wrote before can be read after. */
static inline void wait_for_all(struct barrier *barrier) {
    int round = atomic_load_explicit(&barrier->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) + 1 == omp_get_num_threads()) {
        atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier->round, round + 1, memory_order_release);
        return;
    }
    for (long looks = 0; atomic_load_explicit(&barrier->round, memory_order_acquire) == round; looks++) {
        if (looks < SPINS) pause_a_little();
        else sched_yield();
    }
}

#endif

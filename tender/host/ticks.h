/*
 * The counter of this machine that costs least to read: the TSC, or the virtual counter of Arm. It
 * is for struct activity, where a system call or the vDSO for each exit would cost too much.
 */
#pragma once

#include <stdatomic.h>

#include "abi/stats.h"

static inline uint64_t ticks(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t value;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(value));
    return value;
#else
    return 0;
#endif
}

/* Without an atomic addition: only one thread writes. */
static inline void add_ticks(struct activity *activity, uint64_t more)
{
    const int64_t before = atomic_load_explicit(&activity->guest_ticks, memory_order_relaxed);
    atomic_store_explicit(&activity->guest_ticks, (int64_t)((uint64_t)before + more),
                          memory_order_relaxed);
}

/* The guest is entered; `activity` may be NULL. */
static inline void guest_enter(struct activity *activity)
{
    if (activity)
        add_ticks(activity, -ticks());
}

static inline void count_exit(struct activity *activity)
{
    if (!activity)
        return;
    const uint64_t exits = atomic_load_explicit(&activity->exits, memory_order_relaxed);
    atomic_store_explicit(&activity->exits, exits + 1, memory_order_relaxed);
}

/* The guest has been left. */
static inline void guest_exit(struct activity *activity)
{
    if (activity)
        add_ticks(activity, ticks());
    count_exit(activity);
}

/*
 * The wall clock and waiting; the monotonic clock is the architecture's.
 * The rule: a deadline belongs to the monotonic clock, and the tender is told only what is left of
 * it.
 */
#include "runtime.h"

solo5_time_t solo5_clock_wall(void)
{
    struct hvt_walltime block = {0};

    cpu_hypercall(HVT_HYPERCALL_WALLTIME, &block);
    return block.nsecs;
}

void solo5_yield(solo5_time_t deadline, solo5_handle_set_t *ready_set)
{
    solo5_time_t now = solo5_clock_monotonic();
    struct hvt_poll block = {.timeout_nsecs = deadline > now ? deadline - now : 0};

    cpu_hypercall(HVT_HYPERCALL_POLL, &block);
    if (ready_set != NULL)
        *ready_set = block.ready_set;
}

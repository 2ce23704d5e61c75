/*
 * The monotonic clock: the CPU's counter, in nanoseconds since start.
 * The rule: always scaled from the start in one exact step, so that no rounding error can pile up.
 */
#include "runtime.h"

#define NANOSECONDS UINT64_C(1000000000)

static uint64_t start_cycles, cycles_per_second;

void hvt_clock_init(uint64_t frequency)
{
    if (frequency == 0 || frequency > UINT64_MAX / NANOSECONDS)
        hvt_abort("the tender passed no possible frequency of the CPU's counter");
    cycles_per_second = frequency;
    start_cycles = cpu_cycles();
}

/* Whole seconds and the rest, because a product of 128 bits takes a function of libgcc. */
solo5_time_t solo5_clock_monotonic(void)
{
    uint64_t cycles = cpu_cycles() - start_cycles;
    uint64_t seconds = cycles / cycles_per_second, rest = cycles % cycles_per_second;

    return seconds * NANOSECONDS + rest * NANOSECONDS / cycles_per_second;
}

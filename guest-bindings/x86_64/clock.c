/*
 * The monotonic clock: the time stamp counter, in nanoseconds since start.
 * The rule: always scaled from the start in one exact step, so that no rounding error can pile up.
 */
#include "runtime.h"

static uint64_t start_cycles, cycles_per_second;

void hvt_clock_init(uint64_t frequency)
{
    if (frequency == 0)
        hvt_abort("the tender passed no frequency of the time stamp counter");
    cycles_per_second = frequency;
    start_cycles = cpu_cycles();
}

/*
 * value * by / per with a product of 128 bits. Said in instructions because in C it takes a
 * function of libgcc. The quotient fits 64 bits for the 584 years after start.
 */
static uint64_t scale(uint64_t value, uint64_t by, uint64_t per)
{
    uint64_t low = value, high = by;

    __asm__("mulq %1\n\tdivq %2" : "+a"(low), "+d"(high) : "r"(per) : "cc");
    return low;
}

solo5_time_t solo5_clock_monotonic(void)
{
    return scale(cpu_cycles() - start_cycles, 1000000000, cycles_per_second);
}

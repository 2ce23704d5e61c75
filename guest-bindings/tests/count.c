/*
 * A line for each of LIMIT steps of STEP milliseconds, and what a test may want to compare: count
 * LIMIT STEP. Its clock never goes back, and never leaps.
 */
#include "check.h"

#define MS UINT64_C(1000000)
#define LEAP (2000 * MS)

static uint64_t random_number(void)
{
#if defined(__x86_64__)
    uint64_t value;
    uint8_t is_there;
    __asm__ volatile("rdrand %0; setc %1" : "=r"(value), "=qm"(is_there) : : "cc");
    return is_there ? value : 0;
#else
    return 0;
#endif
}

int solo5_app_main(const struct solo5_start_info *info)
{
    const uint64_t limit = number_at(word_at(info->cmdline, 0), 100);
    const uint64_t step = number_at(word_at(info->cmdline, 1), 5);
    solo5_time_t last = solo5_clock_monotonic();

    for (uint64_t i = 0; i < limit; i++) {
        printf("count %lu random %lx\n", (unsigned long)i, (unsigned long)random_number());
        solo5_yield(last + step * MS, NULL);
        const solo5_time_t now = solo5_clock_monotonic();
        EXPECT(now >= last && now - last < LEAP);
        last = now;
    }
    return verdict();
}

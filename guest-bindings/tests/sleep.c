/* Sleeps the milliseconds that the command line says (default: 100), and tells how many it was. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    uint64_t wanted_ns = number_at(info->cmdline, 100) * 1000000;
    solo5_time_t begin = solo5_clock_monotonic();

    solo5_yield(begin + wanted_ns, NULL);
    solo5_time_t slept_ns = solo5_clock_monotonic() - begin;
    printf("slept %lu ns\n", slept_ns);
    EXPECT(slept_ns >= wanted_ns);
    return verdict();
}

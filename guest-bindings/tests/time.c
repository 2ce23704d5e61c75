/* Both clocks and the wait: one second, asked for and got. */
#include "check.h"

#define SECOND UINT64_C(1000000000)
#define YEAR_2020 (UINT64_C(1577836800) * SECOND)
#define YEAR_2100 (UINT64_C(4102444800) * SECOND)

static void check_clocks(void)
{
    solo5_time_t before = solo5_clock_monotonic();
    solo5_time_t wall = solo5_clock_wall();

    for (int i = 0; i < 100; i++) {
        solo5_time_t now = solo5_clock_monotonic();
        EXPECT(now >= before);
        before = now;
    }
    EXPECT(wall > YEAR_2020 && wall < YEAR_2100);
}

/* A deadline that has passed is no reason to wait, however long ago it was. */
static void check_past_deadlines(void)
{
    solo5_handle_set_t ready = ~UINT64_C(0);
    solo5_time_t begin = solo5_clock_monotonic();

    solo5_yield(0, &ready);
    solo5_yield(begin, NULL);
    EXPECT(ready == 0);
    EXPECT(solo5_clock_monotonic() - begin < SECOND / 4);
}

static void check_second(void)
{
    solo5_time_t begin = solo5_clock_monotonic(), wall_begin = solo5_clock_wall();

    solo5_yield(begin + SECOND, NULL);
    solo5_time_t slept = solo5_clock_monotonic() - begin;
    solo5_time_t wall_slept = solo5_clock_wall() - wall_begin;
    printf("slept %lu ns, %lu ns by the wall clock\n", slept, wall_slept);
    EXPECT(slept >= SECOND);
    EXPECT(slept < SECOND + SECOND / 2);
    EXPECT(wall_slept > SECOND - SECOND / 10 && wall_slept < SECOND + SECOND / 2);
}

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    check_clocks();
    check_past_deadlines();
    check_second();
    return verdict();
}

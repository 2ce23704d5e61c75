/* For a debugger: a variable that changes, calls, each kind of hypercall, and then what its
 * command line asks for. */
#include "check.h"

static volatile int counter;

static __attribute__((noinline)) void add_up(int by)
{
    counter += by;
}

static __attribute__((noinline)) void hypercalls(void)
{
    solo5_console_write("hello\n", 6);
    solo5_clock_wall();
    solo5_yield(0, NULL);
}

int solo5_app_main(const struct solo5_start_info *info)
{
    for (int i = 1; i <= 4; i++)
        add_up(i);
    hypercalls();
    if (info->cmdline[0] == 'a')
        solo5_abort();
    if (info->cmdline[0] == 'f')
        *(volatile char *)solo5_app_main = 0;
    return counter;
}

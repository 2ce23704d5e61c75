/* Says that it is there, and then computes for ever: only a signal or a limit can end it. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    puts("looping");
    for (;;)
        __asm__ volatile(""); /* or a compiler may take it that the loop ends */
}

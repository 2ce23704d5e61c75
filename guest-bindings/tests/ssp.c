/* Overruns an array on the stack: the stack protector must notice it and abort. */
#include "check.h"

__attribute__((noinline)) static void overrun(volatile size_t length)
{
    char small[8];
    volatile char *at = small;

    for (size_t i = 0; i < length; i++)
        at[i] = 'A';
}

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    overrun(64);
    return survived();
}

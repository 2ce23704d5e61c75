/* Halts the CPU with interrupts off, from which nothing wakes it: the tender must end it. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    __asm__ volatile("cli\n\thlt");
    return survived();
}

/* Halts the CPU with interrupts off, from which nothing wakes it: the tender must end it. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
#if defined(__x86_64__)
    __asm__ volatile("cli\n\thlt");
#else
    __asm__ volatile("msr daifset, #15\n\twfi");
#endif
    return survived();
}

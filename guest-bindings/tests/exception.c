/*
 * Raises a CPU exception, the one that the command line names: ud2 (default), div, int3, gp, or
 * stack (a page fault while the stack pointer leads nowhere). Each must be reported and end in an
 * abort.
 */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    if (is_word(info->cmdline, "div"))
        __asm__ volatile("xorl %%ecx, %%ecx\n\tdivl %%ecx" : : : "eax", "ecx", "edx");
    else if (is_word(info->cmdline, "int3"))
        __asm__ volatile("int3");
    else if (is_word(info->cmdline, "gp"))
        __asm__ volatile("movq %0, %%rax\n\tmovq (%%rax), %%rax"
                         :
                         : "i"(0x8000000000000000)
                         : "rax");
    else if (is_word(info->cmdline, "stack"))
        __asm__ volatile("movq $0x800, %rsp\n\tpushq $0");
    else
        __asm__ volatile("ud2");
    return survived();
}

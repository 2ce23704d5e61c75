/*
 * Raises a CPU exception, the one that the command line names. Each must be reported and end in an
 * abort.
 *   x86_64   ud2 (default), div, int3, gp, or stack (the stack pointer leads nowhere)
 *   aarch64  udf (default), brk, svc, jump (to address 0), or stack
 */
#include "check.h"

#if defined(__x86_64__)
static void raise(const char *which)
{
    if (is_word(which, "div"))
        __asm__ volatile("xorl %%ecx, %%ecx\n\tdivl %%ecx" : : : "eax", "ecx", "edx");
    else if (is_word(which, "int3"))
        __asm__ volatile("int3");
    else if (is_word(which, "gp"))
        __asm__ volatile("movq %0, %%rax\n\tmovq (%%rax), %%rax"
                         :
                         : "i"(0x8000000000000000)
                         : "rax");
    else if (is_word(which, "stack"))
        __asm__ volatile("movq $0x800, %rsp\n\tpushq $0");
    else
        __asm__ volatile("ud2");
}
#else
static void raise(const char *which)
{
    if (is_word(which, "brk"))
        __asm__ volatile("brk #1");
    else if (is_word(which, "svc"))
        __asm__ volatile("svc #1");
    else if (is_word(which, "jump"))
        __asm__ volatile("blr xzr" : : : "x30");
    else if (is_word(which, "stack"))
        __asm__ volatile("mov x0, #0x800\n\tmov sp, x0\n\tstr x0, [sp, #-16]!" : : : "x0");
    else
        __asm__ volatile("udf #1");
}
#endif

int solo5_app_main(const struct solo5_start_info *info)
{
    raise(info->cmdline);
    return survived();
}

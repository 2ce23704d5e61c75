/*
 * Leaves marks in memory and registers and aborts, for a core file in which to find them. With the
 * word `trap` it ends by an exception, whose cookie carries the registers.
 */
#include "check.h"

volatile uint64_t core_marker[2] = {0xc0deface00000001, 0xc0deface00000002};

__attribute__((noinline)) static void trap(void)
{
#if defined(__x86_64__)
    __asm__ volatile("movq $0x11111111, %%rax\n\t"
                     "movq $0x22222222, %%rbx\n\t"
                     "movq $0x33333333, %%r12\n\t"
                     ".globl trap_here\n"
                     "trap_here:\n\t"
                     "ud2"
                     :
                     :
                     : "rax", "rbx", "r12");
#else
    __asm__ volatile("mov x0, #0x11110000\n\t"
                     "mov x1, #0x22220000\n\t"
                     "mov x28, #0x33330000\n\t"
                     ".globl trap_here\n"
                     "trap_here:\n\t"
                     "udf #0"
                     :
                     :
                     : "x0", "x1", "x28");
#endif
}

int solo5_app_main(const struct solo5_start_info *info)
{
    volatile uint64_t *heap = (volatile uint64_t *)info->heap_start;

    heap[0] = 0xc0deface00000003;
    printf("core_marker 0x%lx heap 0x%lx\n", (uintptr_t)core_marker, info->heap_start);
    if (is_word(info->cmdline, "trap"))
        trap();
    solo5_abort();
}

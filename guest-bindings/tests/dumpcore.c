/*
 * Leaves marks in memory and registers and aborts, for a core file in which to find them. With the
 * word `trap` it ends by an exception, whose cookie carries the registers.
 */
#include "check.h"

volatile uint64_t core_marker[2] = {0xc0deface00000001, 0xc0deface00000002};

int solo5_app_main(const struct solo5_start_info *info)
{
    volatile uint64_t *heap = (volatile uint64_t *)info->heap_start;

    heap[0] = 0xc0deface00000003;
    printf("core_marker 0x%lx heap 0x%lx\n", (uintptr_t)core_marker, info->heap_start);
    if (is_word(info->cmdline, "trap"))
        __asm__ volatile("movq $0x11111111, %%rax\n\t"
                         "movq $0x22222222, %%rbx\n\t"
                         "movq $0x33333333, %%r12\n\t"
                         ".globl trap_here\n"
                         "trap_here:\n\t"
                         "ud2"
                         :
                         :
                         : "rax", "rbx", "r12");
    solo5_abort();
}

/*
 * Makes a hypercall whose argument block is not in guest memory: behind its end (default), high
 * (near 4 GiB), or partly (its first 4 bytes are in). A second word gives the hypercall's number
 * (default: 2). The tender must end it.
 */
#include "check.h"
#include "raw.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    uint32_t mem_size = (uint32_t)(info->heap_start + info->heap_size);
    uint32_t number = (uint32_t)number_at(word_at(info->cmdline, 1), HVT_HYPERCALL_PUTS);
    uint32_t gpa = mem_size;

    if (is_word(info->cmdline, "high"))
        gpa = 0xfffffff8;
    else if (is_word(info->cmdline, "partly"))
        gpa = mem_size - 4;
    raw_hypercall_at(number, gpa);
    return survived();
}

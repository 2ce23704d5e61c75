/*
 * Gives the console text whose address + length wraps around 2^64 to something small; with the word
 * `high` it is the address that is near 2^64. The tender must end it.
 */
#include "check.h"
#include "raw.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    struct hvt_puts block = {.data_gpa = info->heap_start,
                             .len = (uint64_t)0 - info->heap_start + 16};

    if (is_word(info->cmdline, "high"))
        block = (struct hvt_puts){.data_gpa = (uint64_t)0 - 8, .len = 16};
    raw_hypercall(HVT_HYPERCALL_PUTS, &block);
    return survived();
}

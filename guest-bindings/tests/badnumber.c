/* Makes a hypercall that does not exist, by the number on the command line (default: 9): the tender
 * must end it. */
#include "check.h"
#include "raw.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    static uint64_t block[8];

    raw_hypercall((uint32_t)number_at(info->cmdline, 9), block);
    return survived();
}

/* Writes to an I/O port that is no hypercall: the tender must end it. */
#include "check.h"
#include "raw.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    raw_out32((uint16_t)number_at(info->cmdline, 0x400), 0);
    return survived();
}

/* Makes a hypercall with an OUT of 1 byte, or of 2 with the word 2: the tender must end it. */
#include "check.h"
#include "raw.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    const uint16_t port = HVT_HYPERCALL_PIO_BASE + HVT_HYPERCALL_PUTS;

    if (is_word(info->cmdline, "2"))
        raw_out16(port, 0);
    else
        raw_out8(port, 0);
    return survived();
}

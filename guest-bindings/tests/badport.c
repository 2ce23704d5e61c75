/* Writes to a place that is near those of the hypercalls and is none: an I/O port or, on aarch64, an
 * address. The tender must end it. */
#include "check.h"
#include "raw.h"

#if defined(__x86_64__)
#define NO_HYPERCALL 0x400
#else
#define NO_HYPERCALL (HVT_HYPERCALL_MMIO_BASE + 0x400)
#endif

int solo5_app_main(const struct solo5_start_info *info)
{
    raw_write32((raw_door)number_at(info->cmdline, NO_HYPERCALL), 0);
    return survived();
}

/* Reads from a hypercall's port: the tender must end it. */
#include "check.h"
#include "raw.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    printf("the port holds %u\n", raw_in32(HVT_HYPERCALL_PIO_BASE + HVT_HYPERCALL_WALLTIME));
    return survived();
}

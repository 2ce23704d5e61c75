/* Reads where a hypercall is made: the tender must end it. */
#include "check.h"
#include "raw.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    printf("there stands %u\n", raw_read32(raw_door_of(HVT_HYPERCALL_WALLTIME)));
    return survived();
}

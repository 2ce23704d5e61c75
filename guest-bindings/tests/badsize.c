/* Makes a hypercall with a write of 1 byte, or of 2 with the word 2: the tender must end it. */
#include "check.h"
#include "raw.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    const raw_door door = raw_door_of(HVT_HYPERCALL_PUTS);

    if (is_word(info->cmdline, "2"))
        raw_write16(door, 0);
    else
        raw_write8(door, 0);
    return survived();
}

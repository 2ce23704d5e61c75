/* Writes to its own code: the tender must end it with a host/guest translation fault. */
#include "check.h"

static volatile uint8_t *volatile code = (volatile uint8_t *)(uintptr_t)solo5_app_main;

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    *code = 0xcc;
    return survived();
}

/* Uses a thread-local variable without a block for it: it must abort. */
#include "check.h"

static _Thread_local volatile uint32_t nowhere;

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    nowhere = 1;
    printf("stored %u\n", nowhere);
    return survived();
}

/* Writes numbered lines to the console for ever. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    for (uint64_t i = 0;; i++)
        printf("flood %lu\n", i);
}

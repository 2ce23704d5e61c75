/* Reads address 0, where no page is: it must abort. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    volatile const uint8_t *volatile nothing = NULL; /* volatile, or the compiler sees through it */

    printf("address 0 holds %u\n", *nothing);
    return survived();
}

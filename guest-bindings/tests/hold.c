/* Has the block device "storage" attached, says so, and never ends by itself. */
#include <solo5.h>
#include <stdio.h>

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    puts("held");
    for (;;)
        ;
}

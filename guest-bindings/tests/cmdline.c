/* Prints its command line between < and >. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    printf("<%s>\n", info->cmdline);
    return verdict();
}

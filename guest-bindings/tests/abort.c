/* Aborts: status 255. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    solo5_abort();
}

/* Ends with the status that the command line says (default: 0), from below the main function. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    solo5_exit((int)number_at(info->cmdline, 0));
}

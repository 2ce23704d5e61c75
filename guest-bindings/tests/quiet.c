/* With --solo5:quiet as the first word, nothing but this is printed, and the word is not the
 * guest's to see. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    EXPECT(strncmp(info->cmdline, "--solo5:", 8) != 0);
    printf("<%s>\n", info->cmdline);
    return verdict();
}

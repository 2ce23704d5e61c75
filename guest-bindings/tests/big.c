/* More than the least memory there is. */
#include <solo5.h>

static volatile char big[3 << 20] = {1};

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    return big[5];
}

/* Floating point with SSE. To be built with --fp; a KVM in software may not be able to run it. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    volatile double one = 1, seven = 7;
    volatile float quarter = 0.25f;
    double sum = 0;

    for (int i = 0; i < 7; i++)
        sum += one / seven;
    EXPECT(sum > 0.999999999 && sum < 1.000000001);
    EXPECT(quarter * 8 == 2);
    EXPECT((int)(seven * 1000) == 7000);
    return verdict();
}

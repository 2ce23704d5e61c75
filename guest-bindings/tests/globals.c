/* Initialised, zero and constant data are what the source says, and variables can be changed. */
#include "check.h"

static volatile uint64_t number = 0x0123456789abcdef;
static volatile char text[] = "initialised";
static volatile uint8_t empty[3 * 4096];
static const volatile uint32_t table[] = {2, 3, 5, 7, 11};
static const char *const volatile pointers[] = {"zero", "one"};

static bool all_zero(void)
{
    for (size_t i = 0; i < sizeof empty; i += 8)
        if (*(volatile uint64_t *)&empty[i] != 0)
            return false;
    return true;
}

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    EXPECT(number == 0x0123456789abcdef);
    EXPECT(text[0] == 'i' && text[10] == 'd' && text[11] == '\0');
    EXPECT(all_zero());
    EXPECT(table[0] == 2 && table[4] == 11);
    EXPECT(strcmp(pointers[1], "one") == 0);
    number = 1;
    empty[sizeof empty - 1] = 2;
    EXPECT(number == 1 && empty[sizeof empty - 1] == 2);
    return verdict();
}

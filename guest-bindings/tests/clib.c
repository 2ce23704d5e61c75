/* The C library's functions that the runtime brings. */
#include "check.h"

static bool prints(const char *wanted, const char *format, ...)
{
    char text[64];
    va_list args;

    va_start(args, format);
    int length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (strcmp(text, wanted) == 0 && (size_t)length == strlen(wanted))
        return true;
    printf("got <%s> for <%s>\n", text, wanted);
    return false;
}

static void check_numbers(void)
{
    EXPECT(prints("0 -1 42", "%d %d %i", 0, -1, 42));
    EXPECT(prints("-2147483648 4294967295", "%d %u", INT32_MIN, UINT32_MAX));
    EXPECT(prints("-9223372036854775808", "%ld", INT64_MIN));
    EXPECT(prints("18446744073709551615", "%llu", (unsigned long long)UINT64_MAX));
    EXPECT(prints("ff FF 0xff", "%x %X %p", 255, 255, (void *)255));
    EXPECT(prints("-1 255 -1", "%hhd %hhu %hd", -1, 255, -1));
    EXPECT(prints("   42|42   |00042|-0042", "%5d|%-5d|%05d|%05d", 42, 42, 42, -42));
    EXPECT(prints("  007|007|", "%5.3d|%.3d|%.0d", 7, 7, 0));
    EXPECT(prints("12 34", "%zu %jd", (size_t)12, (intmax_t)34));
    EXPECT(prints("   7", "%*d", 4, 7));
}

static void check_texts(void)
{
    char small[4];

    EXPECT(prints("a bc %", "%c %s %%", 'a', "bc"));
    EXPECT(prints("  abc|abc  |ab", "%5s|%-5s|%.2s", "abc", "abc", "abc"));
    EXPECT(prints("(null)", "%s", (char *)NULL));
    EXPECT(prints("%y is not known", "%y is not known"));
    EXPECT(snprintf(small, sizeof small, "%s", "cut off") == 7 && strcmp(small, "cut") == 0);
    EXPECT(snprintf(NULL, 0, "%d", 12345) == 5);
}

static void check_strings(void)
{
    char text[16] = "0123456789";

    EXPECT(strlen("abc") == 3 && strnlen("abc", 2) == 2 && strnlen("abc", 9) == 3);
    EXPECT(strcmp("a", "b") < 0 && strcmp("b", "a") > 0 && strcmp("\x80", "a") > 0);
    EXPECT(strncmp("abx", "aby", 2) == 0 && strncmp("abx", "aby", 3) < 0);
    EXPECT(strchr(text, '4') == text + 4 && strchr(text, 'x') == NULL);
    EXPECT(strchr(text, '\0') == text + 10);
    EXPECT(strcmp(strcpy(text, "short"), "short") == 0);
    memset(text, 'x', sizeof text);
    strncpy(text, "ab", 4);
    EXPECT(memcmp(text, "ab\0\0xx", 6) == 0);
}

static void check_memory(void)
{
    char text[16] = "0123456789";

    memmove(text + 2, text, 8);
    EXPECT(memcmp(text, "0101234567", 10) == 0);
    memmove(text, text + 2, 8);
    EXPECT(memcmp(text, "0123456767", 10) == 0);
    memcpy(text, "ab", 2);
    EXPECT(memchr(text, '2', 10) == text + 2 && memchr(text, '9', 10) == NULL);
    EXPECT(memcmp("\x01", "\xff", 1) < 0 && memcmp("a", "b", 0) == 0);
    memset(text, 0, sizeof text);
    EXPECT(text[0] == 0 && text[15] == 0);
}

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    check_numbers();
    check_texts();
    check_strings();
    check_memory();
    return verdict();
}

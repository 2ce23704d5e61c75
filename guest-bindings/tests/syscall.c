/*
 * For Solo5's spt target: makes the system calls that the command line has, each as its number and
 * up to five arguments, with commas between, and prints what each returns. `b` is the address of a
 * page of zeros. The disk "storage" is attached, so there is a descriptor to try.
 */
#include "check.h"

static uint8_t page[4096];

static long system_call(const long *words)
{
#if defined(__x86_64__)
    register long r10 __asm__("r10") = words[4];
    register long r8 __asm__("r8") = words[5];
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(words[0]), "D"(words[1]), "S"(words[2]), "d"(words[3]), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
#else
    return words[0];
#endif
}

/* The next number of the text, which may be negative; moves `text` behind it and its comma. */
static long next(const char **text)
{
    const bool negative = **text == '-';
    long value = 0;

    if (**text == 'b') {
        value = (long)(uintptr_t)page;
        ++*text;
    }
    for (*text += negative; **text >= '0' && **text <= '9'; ++*text)
        value = value * 10 + (**text - '0');
    if (**text == ',')
        ++*text;
    return negative ? -value : value;
}

int solo5_app_main(const struct solo5_start_info *info)
{
    const char *text = info->cmdline;

    while (*text) {
        long words[6] = {0};
        for (unsigned i = 0; *text && *text != ' '; i++)
            words[i < 6 ? i : 5] = next(&text);
        while (*text == ' ')
            text++;
        printf("result %ld\n", system_call(words));
    }
    return verdict();
}

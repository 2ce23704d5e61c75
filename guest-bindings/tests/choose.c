/*
 * Chooses how to copy by what CPUID shows, as a C library does, and then copies every 10 ms until
 * somebody ends it.
 */
#include "check.h"

#if defined(__x86_64__)

static uint8_t source[32], target[32];

static void copy_by_byte(void)
{
    for (unsigned i = 0; i < sizeof source; i++)
        ((volatile uint8_t *)target)[i] = source[i];
}

static void copy_by_avx2(void)
{
    __asm__ volatile("vmovdqu source, %%ymm0; vpaddb %%ymm0, %%ymm0, %%ymm1\n"
                     "vpsubb %%ymm0, %%ymm1, %%ymm1; vmovdqu %%ymm1, target; vzeroupper"
                     : : : "memory");
}

static bool has_avx2(void)
{
    uint32_t a = 1, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (!(c & 1u << 27)) /* OSXSAVE */
        return false;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    if ((a & 6) != 6)
        return false;
    a = 7, c = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return b & 1u << 5;
}

int solo5_app_main(const struct solo5_start_info *info)
{
    void (*copy)(void) = has_avx2() ? copy_by_avx2 : copy_by_byte;

    (void)info;
    for (uint8_t value = 1;; value++) {
        memset(source, value, sizeof source);
        copy();
        if (memcmp(source, target, sizeof source) != 0)
            return SOLO5_EXIT_FAILURE;
        printf("copied by %s\n", copy == copy_by_avx2 ? "avx2" : "byte");
        solo5_yield(solo5_clock_monotonic() + 10000000, NULL);
    }
}

#endif

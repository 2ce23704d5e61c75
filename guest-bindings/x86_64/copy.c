/*
 * Copying and filling by the CPU's string instructions: short, quick on hardware, and one
 * instruction each for a CPU in software. The rule: weak, as in string.c.
 */
#include <stdint.h>
#include <string.h>

#define WEAK __attribute__((weak))

WEAK void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
    void *at = to;

    __asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(n) : : "memory");
    return to;
}

/* Backwards, where going forwards would overwrite what is still to be read. */
WEAK void *memmove(void *to, const void *from, size_t n)
{
    if ((uintptr_t)to - (uintptr_t)from >= n)
        return memcpy(to, from, n);

    char *last_to = (char *)to + n - 1;
    const char *last_from = (const char *)from + n - 1;
    __asm__ volatile("std\n\trep movsb\n\tcld"
                     : "+D"(last_to), "+S"(last_from), "+c"(n)
                     :
                     : "memory", "cc");
    return to;
}

WEAK void *memset(void *to, int byte, size_t n)
{
    void *at = to;

    __asm__ volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(byte) : "memory");
    return to;
}

/*
 * Copying and filling by words of 8 bytes at any address, which the CPU allows in normal memory.
 * The rule: weak, as in string.c.
 */
#include <stdint.h>
#include <string.h>

#define WEAK __attribute__((weak))

typedef uint64_t __attribute__((may_alias, aligned(1))) word;

WEAK void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
    char *at = to;
    const char *source = from;

    for (; n >= 2 * sizeof(word); n -= 2 * sizeof(word)) {
        word first = ((const word *)source)[0], second = ((const word *)source)[1];
        ((word *)at)[0] = first;
        ((word *)at)[1] = second;
        source += 2 * sizeof(word);
        at += 2 * sizeof(word);
    }
    for (; n > 0; n--)
        *at++ = *source++;
    return to;
}

/* Backwards, where going forwards would overwrite what is still to be read. */
static void *copy_backwards(void *to, const void *from, size_t n)
{
    char *at = (char *)to + n;
    const char *source = (const char *)from + n;

    for (; n >= sizeof(word); n -= sizeof(word)) {
        source -= sizeof(word);
        at -= sizeof(word);
        *(word *)at = *(const word *)source;
    }
    for (; n > 0; n--)
        *--at = *--source;
    return to;
}

WEAK void *memmove(void *to, const void *from, size_t n)
{
    if ((uintptr_t)to - (uintptr_t)from < n)
        return copy_backwards(to, from, n);

    char *at = to;
    const char *source = from;
    for (; n >= sizeof(word); n -= sizeof(word)) {
        *(word *)at = *(const word *)source;
        source += sizeof(word);
        at += sizeof(word);
    }
    for (; n > 0; n--)
        *at++ = *source++;
    return to;
}

WEAK void *memset(void *to, int byte, size_t n)
{
    char *at = to;
    word pattern = (unsigned char)byte * UINT64_C(0x0101010101010101);

    for (; n >= sizeof(word); n -= sizeof(word)) {
        *(word *)at = pattern;
        at += sizeof(word);
    }
    for (; n > 0; n--)
        *at++ = (char)byte;
    return to;
}

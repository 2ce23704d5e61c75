/* The heap: as large as told, writable from first to last page, and zero below the stack. */
#include "check.h"

enum { PAGE = 4096, STACK_ROOM = 64 * 1024 };

/* Another value goes in and out again: the last page holds the stack. */
static void touch(uintptr_t at)
{
    volatile uint64_t *word = (volatile uint64_t *)at;
    uint64_t kept = *word;

    *word = ~kept;
    EXPECT(*word == ~kept);
    *word = kept;
}

/* The first and the last word of each page: every byte would take a slow CPU too long. */
static bool is_zero(uintptr_t from, uintptr_t to)
{
    for (uintptr_t page = from; page + PAGE <= to; page += PAGE)
        if (*(volatile uint64_t *)page != 0 || *(volatile uint64_t *)(page + PAGE - 8) != 0)
            return false;
    return true;
}

int solo5_app_main(const struct solo5_start_info *info)
{
    uintptr_t end = info->heap_start + info->heap_size;

    printf("mem_size %lu heap_start 0x%lx heap_size %zu\n", end, info->heap_start, info->heap_size);
    EXPECT(end % (2 << 20) == 0);
    EXPECT(info->heap_start % PAGE == 0);
    EXPECT(is_zero(info->heap_start, end - STACK_ROOM));
    touch(info->heap_start);
    touch(end - STACK_ROOM);
    touch(end - PAGE);
    return verdict();
}

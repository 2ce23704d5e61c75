/*
 * Writes a block to each page of 4096 bytes of "storage" until that is refused, and prints how many
 * pages it wrote. What was written must stay, and can be written again.
 */
#include "check.h"

enum { PAGE = 4096 };

static uint8_t out[PAGE], in[PAGE];

static void fill(uint64_t page, size_t size)
{
    for (size_t i = 0; i < size; i++)
        out[i] = (uint8_t)(page * 31 + i);
}

int solo5_app_main(const struct solo5_start_info *unused)
{
    solo5_handle_t disk;
    struct solo5_block_info info;
    solo5_off_t at = 0;

    (void)unused;
    if (solo5_block_acquire("storage", &disk, &info) != SOLO5_R_OK || info.block_size > PAGE)
        return SOLO5_EXIT_FAILURE;
    for (; at < info.capacity; at += PAGE) {
        fill(at / PAGE, info.block_size);
        if (solo5_block_write(disk, at, out, info.block_size) != SOLO5_R_OK)
            break;
    }
    printf("%lu pages\n", (unsigned long)(at / PAGE));
    for (solo5_off_t page = 0; page < at / PAGE; page += at / PAGE / 16 + 1) {
        fill(page, info.block_size);
        EXPECT(solo5_block_read(disk, page * PAGE, in, info.block_size) == SOLO5_R_OK);
        EXPECT(memcmp(in, out, info.block_size) == 0);
        EXPECT(solo5_block_write(disk, page * PAGE, out, info.block_size) == SOLO5_R_OK);
    }
    return verdict();
}

/*
 * Says that it is ready, waits until the second block of "storage" begins with something, and then counts
 * in the first.
 */
#include "check.h"

static uint8_t block[4096];

int solo5_app_main(const struct solo5_start_info *unused)
{
    solo5_handle_t disk;
    struct solo5_block_info info;

    (void)unused;
    if (solo5_block_acquire("storage", &disk, &info) != SOLO5_R_OK || info.block_size > sizeof block)
        return SOLO5_EXIT_FAILURE;
    puts("ready");
    do {
        solo5_yield(solo5_clock_monotonic() + 5000000, NULL);
        EXPECT(solo5_block_read(disk, info.block_size, block, info.block_size) == SOLO5_R_OK);
    } while (block[0] == 0 && failed_expectations == 0);
    EXPECT(solo5_block_read(disk, 0, block, info.block_size) == SOLO5_R_OK);
    block[0]++;
    EXPECT(solo5_block_write(disk, 0, block, info.block_size) == SOLO5_R_OK);
    printf("visit %u\n", block[0]);
    return verdict();
}

/* The disk "ro" can be read and not written, and stays as it is. */
#include "check.h"

static uint8_t before[4096], after[4096];

int solo5_app_main(const struct solo5_start_info *start)
{
    (void)start;
    struct solo5_block_info info;
    solo5_handle_t disk;

    if (solo5_block_acquire("ro", &disk, &info) != SOLO5_R_OK)
        return survived();
    EXPECT(solo5_block_read(disk, 0, before, info.block_size) == SOLO5_R_OK);
    memcpy(after, before, sizeof after);
    after[0] ^= 0xff;
    EXPECT(solo5_block_write(disk, 0, after, info.block_size) != SOLO5_R_OK);
    EXPECT(solo5_block_read(disk, 0, after, info.block_size) == SOLO5_R_OK);
    EXPECT(memcmp(before, after, info.block_size) == 0);
    return verdict();
}

/* Writes every block of "storage", reads every one back, and tries what lies outside. */
#include "check.h"

static uint64_t out[4096 / 8], in[4096 / 8];

/* Each word says which block it belongs to, so that a block at the wrong place can't pass for the
 * right one. */
static void fill(uint64_t block, size_t size)
{
    for (size_t i = 0; i < size / 8; i++)
        out[i] = block << 16 ^ i ^ 0x5eed00000000;
}

static bool same(size_t size)
{
    for (size_t i = 0; i < size / 8; i++)
        if (in[i] != out[i])
            return false;
    return true;
}

static void write_all(solo5_handle_t disk, const struct solo5_block_info *info)
{
    for (solo5_off_t at = 0; at < info->capacity; at += info->block_size) {
        fill(at, info->block_size);
        EXPECT(solo5_block_write(disk, at, (uint8_t *)out, info->block_size) == SOLO5_R_OK);
    }
}

static void read_all(solo5_handle_t disk, const struct solo5_block_info *info)
{
    for (solo5_off_t at = 0; at < info->capacity; at += info->block_size) {
        fill(at, info->block_size);
        EXPECT(solo5_block_read(disk, at, (uint8_t *)in, info->block_size) == SOLO5_R_OK);
        EXPECT(same(info->block_size));
    }
}

static void try_mistakes(solo5_handle_t disk, const struct solo5_block_info *info)
{
    const size_t size = info->block_size;
    const solo5_off_t offsets[] = {info->capacity, info->capacity + size, 1, size - 1,
                                   (solo5_off_t)0 - size};

    for (size_t i = 0; i < sizeof offsets / sizeof offsets[0]; i++) {
        EXPECT(solo5_block_write(disk, offsets[i], (uint8_t *)out, size) != SOLO5_R_OK);
        EXPECT(solo5_block_read(disk, offsets[i], (uint8_t *)in, size) != SOLO5_R_OK);
    }
    EXPECT(solo5_block_write(disk, 0, (uint8_t *)out, size - 1) != SOLO5_R_OK);
    EXPECT(solo5_block_read(disk, 0, (uint8_t *)in, 0) != SOLO5_R_OK);
    EXPECT(solo5_block_read(disk + 1, 0, (uint8_t *)in, size) != SOLO5_R_OK);
}

int solo5_app_main(const struct solo5_start_info *start)
{
    (void)start;
    struct solo5_block_info info;
    solo5_handle_t disk, again;

    EXPECT(solo5_block_acquire("nothing", &disk, &info) != SOLO5_R_OK);
    if (solo5_block_acquire("storage", &disk, &info) != SOLO5_R_OK || info.block_size > sizeof in) {
        puts("FAILURE: no storage, or its blocks are too large for this guest");
        return SOLO5_EXIT_FAILURE;
    }
    EXPECT(solo5_block_acquire("storage", &again, &info) != SOLO5_R_OK);
    printf("storage: %lu bytes in blocks of %lu\n", info.capacity, info.block_size);
    write_all(disk, &info);
    try_mistakes(disk, &info);
    read_all(disk, &info);
    return verdict();
}

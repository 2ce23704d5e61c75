/*
 * Reads the device "storage" block by block, over and over for the milliseconds that the command
 * line says, and tells how many bytes it got in how many nanoseconds.
 */
#include <solo5.h>
#include <stdio.h>

static uint8_t block[1 << 15]; /* the largest block that there is */

static uint64_t number(const char *text)
{
    uint64_t value = 0;
    while (*text >= '0' && *text <= '9')
        value = value * 10 + (uint64_t)(*text++ - '0');
    return value;
}

int solo5_app_main(const struct solo5_start_info *start)
{
    struct solo5_block_info info;
    solo5_handle_t disk;
    solo5_off_t at = 0;
    uint64_t bytes = 0, limit_ns = number(start->cmdline) * 1000000;

    if (solo5_block_acquire("storage", &disk, &info) != SOLO5_R_OK ||
        info.block_size > sizeof block)
        return SOLO5_EXIT_FAILURE;
    solo5_time_t begin = solo5_clock_monotonic(), now = begin;
    for (; now - begin < limit_ns; now = solo5_clock_monotonic()) {
        if (solo5_block_read(disk, at, block, info.block_size) != SOLO5_R_OK)
            return SOLO5_EXIT_FAILURE;
        bytes += info.block_size;
        at += info.block_size;
        at = at < info.capacity ? at : 0;
    }
    printf("read %lu bytes in %lu ns\n", bytes, now - begin);
    return SOLO5_EXIT_SUCCESS;
}

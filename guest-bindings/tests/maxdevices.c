/* As many devices as a manifest can declare: each is written and read under its own handle. */
#include "check.h"

enum { DEVICES = 63 };

static solo5_handle_t handles[DEVICES];
static uint64_t buffer[4096 / 8];

static bool acquire(unsigned i)
{
    struct solo5_block_info info;
    char name[12];

    snprintf(name, sizeof name, "storage%u", i);
    return solo5_block_acquire(name, &handles[i], &info) == SOLO5_R_OK && info.block_size == 512;
}

static bool write_own(unsigned i)
{
    buffer[0] = 0xd1500000 + i;
    return solo5_block_write(handles[i], 0, (uint8_t *)buffer, 512) == SOLO5_R_OK;
}

static bool read_own(unsigned i)
{
    buffer[0] = 0;
    return solo5_block_read(handles[i], 0, (uint8_t *)buffer, 512) == SOLO5_R_OK &&
           buffer[0] == 0xd1500000 + i;
}

int solo5_app_main(const struct solo5_start_info *info)
{
    (void)info;
    for (unsigned i = 0; i < DEVICES; i++) {
        EXPECT(acquire(i));
        EXPECT(write_own(i));
    }
    for (unsigned i = 0; i < DEVICES; i++) /* after all writes: no two may be the same disk */
        EXPECT(read_own(i));
    printf("%d devices, the last has handle %lu\n", DEVICES, handles[DEVICES - 1]);
    return verdict();
}

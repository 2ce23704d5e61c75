/* Block I/O that is not on the disk, or not all of it: each call must come back with EINVAL. */
#include "check.h"
#include "raw.h"

static uint8_t buffer[4096];

static void check(uint64_t handle, uint64_t offset, uint64_t len)
{
    printf("offset 0x%lx length 0x%lx\n", offset, len);
    EXPECT(raw_block_io(HVT_HYPERCALL_BLOCK_READ, handle, offset, buffer, len) == HVT_R_EINVAL);
    EXPECT(raw_block_io(HVT_HYPERCALL_BLOCK_WRITE, handle, offset, buffer, len) == HVT_R_EINVAL);
}

int solo5_app_main(const struct solo5_start_info *start)
{
    (void)start;
    struct solo5_block_info info;
    solo5_handle_t disk;

    if (solo5_block_acquire("storage", &disk, &info) != SOLO5_R_OK)
        return survived();
    const uint64_t size = info.block_size, capacity = info.capacity;
    check(disk, capacity, size);
    check(disk, capacity + size, size);
    check(disk, capacity - size, 2 * size);
    check(disk, (uint64_t)0 - size, size);
    check(disk, (uint64_t)0 - size, 2 * size);
    check(disk, UINT64_C(1) << 63, size);
    EXPECT(raw_block_io(HVT_HYPERCALL_BLOCK_READ, disk, capacity - size, buffer, size) == HVT_R_OK);
    return verdict();
}

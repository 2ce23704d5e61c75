/*
 * Block devices.
 * The rule: one whole block per call, as in Solo5; what reaches the tender has been checked here,
 * so that a guest's mistake is a result code without an exit.
 */
#include "runtime.h"

solo5_result_t solo5_block_acquire(const char *name, solo5_handle_t *handle,
                                   struct solo5_block_info *info)
{
    const struct mft_entry *device = hvt_device_acquire(name, MFT_DEV_BLOCK_BASIC, handle);

    if (device == NULL)
        return SOLO5_R_EINVAL;
    info->capacity = device->u.block_basic.capacity;
    info->block_size = device->u.block_basic.block_size;
    return SOLO5_R_OK;
}

static bool is_one_block(solo5_handle_t handle, solo5_off_t offset, size_t size)
{
    const struct mft_entry *device = hvt_device(handle, MFT_DEV_BLOCK_BASIC);

    if (device == NULL)
        return false;
    const struct mft_block_basic *block = &device->u.block_basic;
    return size == block->block_size && offset % block->block_size == 0 &&
           offset < block->capacity && size <= block->capacity - offset;
}

static solo5_result_t transfer(uint32_t hypercall, solo5_handle_t handle, solo5_off_t offset,
                               const uint8_t *buf, size_t size)
{
    struct hvt_block_io block = {
        .handle = handle, .offset = offset, .data_gpa = (uintptr_t)buf, .len = size};

    if (!is_one_block(handle, offset, size))
        return SOLO5_R_EINVAL;
    cpu_hypercall(hypercall, &block);
    return (solo5_result_t)block.ret;
}

solo5_result_t solo5_block_write(solo5_handle_t handle, solo5_off_t offset, const uint8_t *buf,
                                 size_t size)
{
    return transfer(HVT_HYPERCALL_BLOCK_WRITE, handle, offset, buf, size);
}

solo5_result_t solo5_block_read(solo5_handle_t handle, solo5_off_t offset, uint8_t *buf,
                                size_t size)
{
    return transfer(HVT_HYPERCALL_BLOCK_READ, handle, offset, buf, size);
}

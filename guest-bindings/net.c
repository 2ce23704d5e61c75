/*
 * Network devices: by the ring where the tender offers one, else by hypercall.
 * The rule: the largest frame is the device's MTU + the ethernet header; a read has room for it, a
 * write fits it.
 */
#include "runtime.h"

#include <string.h>

solo5_result_t solo5_net_acquire(const char *name, solo5_handle_t *handle,
                                 struct solo5_net_info *info)
{
    const struct mft_entry *device = hvt_device_acquire(name, MFT_DEV_NET_BASIC, handle);

    if (device == NULL)
        return SOLO5_R_EINVAL;
    memcpy(info->mac_address, device->u.net_basic.mac, SOLO5_NET_ALEN);
    info->mtu = device->u.net_basic.mtu;
    return SOLO5_R_OK;
}

static size_t largest_frame(const struct mft_entry *device)
{
    return (size_t)device->u.net_basic.mtu + SOLO5_NET_HLEN;
}

solo5_result_t solo5_net_write(solo5_handle_t handle, const uint8_t *buf, size_t size)
{
    const struct mft_entry *device = hvt_device(handle, MFT_DEV_NET_BASIC);
    struct hvt_net_io block = {.handle = handle, .data_gpa = (uintptr_t)buf, .len = size};

    if (device == NULL || size > largest_frame(device))
        return SOLO5_R_EINVAL;
    if (hvt_ring_write(handle, buf, size))
        return SOLO5_R_OK; /* it is on its way */
    cpu_hypercall(HVT_HYPERCALL_NET_WRITE, &block);
    return (solo5_result_t)block.ret;
}

solo5_result_t solo5_net_read(solo5_handle_t handle, uint8_t *buf, size_t size, size_t *read_size)
{
    const struct mft_entry *device = hvt_device(handle, MFT_DEV_NET_BASIC);
    struct hvt_net_io block = {.handle = handle, .data_gpa = (uintptr_t)buf, .len = size};

    if (device == NULL || size < largest_frame(device))
        return SOLO5_R_EINVAL;
    if (!hvt_ring_read(handle, buf, size, &block))
        cpu_hypercall(HVT_HYPERCALL_NET_READ, &block);
    *read_size = block.len;
    return (solo5_result_t)block.ret;
}

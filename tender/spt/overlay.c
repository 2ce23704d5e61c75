/*
 * A disk whose writes stay in memory: the guest's descriptor of it does not exist, so its calls
 * raise SIGSYS and are answered here.
 *
 * A block is in the file until it is written to, and in the memory's file from then on, whose
 * length is sealed: that, and the filter, hold whatever the guest does to the plan.
 */
#include "code.h"

#define EINVAL 22
#define ENOSPC 28

static long transfer(struct spt_overlay *disk, int is_write, uint64_t buffer, uint64_t offset)
{
    uint32_t *slot = (uint32_t *)disk->slots + offset / disk->block_size;

    if (!*slot && !is_write)
        return call(__NR_pread64, disk->image_fd, (long)buffer, disk->block_size, (long)offset, 0);
    if (!*slot) {
        if (disk->used >= disk->blocks)
            return -ENOSPC;
        *slot = ++disk->used;
    }
    const uint64_t at = (uint64_t)(*slot - 1) * disk->block_size;
    return call(is_write ? __NR_pwrite64 : __NR_pread64, disk->memory_fd, (long)buffer,
                disk->block_size, (long)at, 0);
}

int overlay_answer(struct spt_plan *plan, const siginfo_t *info, struct sigcontext *cpu)
{
    const int is_write = info->si_syscall == __NR_pwrite64;
    const uint64_t offset = cpu->r10;

    if (!is_write && info->si_syscall != __NR_pread64)
        return 0;
    for (uint32_t i = 0; i < plan->overlay_count && i < SPT_OVERLAYS; i++) {
        struct spt_overlay *disk = &plan->overlays[i];
        if ((int32_t)cpu->rdi != disk->fd)
            continue;
        if (cpu->rdx != disk->block_size || offset % disk->block_size ||
            offset >= disk->capacity)
            cpu->rax = (uint64_t)-EINVAL;
        else
            cpu->rax = (uint64_t)transfer(disk, is_write, cpu->rsi, offset);
        return 1;
    }
    return 0;
}

/*
 * The system calls of an spt guest, in the place of hvt's hypercalls.
 * The rule: no call but those that every tender for spt allows (docs/threat-model.md), with the
 * arguments that it allows; a device is its descriptor in the manifest.
 */
#include "runtime.h"

enum { /* asm/unistd_64.h */
    CALL_READ = 0,
    CALL_WRITE = 1,
    CALL_PREAD64 = 17,
    CALL_PWRITE64 = 18,
    CALL_ARCH_PRCTL = 158,
    CALL_CLOCK_GETTIME = 228,
    CALL_EXIT_GROUP = 231,
    CALL_EPOLL_PWAIT = 281,
    CALL_TIMERFD_SETTIME = 286,
};
enum { WALL = 0, MONOTONIC = 1, ABSOLUTE = 1, SET_FS = 0x1002, EINTR = 4, EAGAIN = 11 };

#define NANOSECONDS UINT64_C(1000000000)

struct timespec {
    int64_t seconds, nanoseconds;
};

struct epoll_event {
    uint32_t events;
    uint64_t data;
} __attribute__((packed));

static int epollfd, timerfd;

static long call(long number, long a, long b, long c, long d, long e)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

static uint64_t clock(int which)
{
    struct timespec now;

    call(CALL_CLOCK_GETTIME, which, (long)&now, 0, 0, 0);
    return (uint64_t)now.seconds * NANOSECONDS + (uint64_t)now.nanoseconds;
}

uint64_t cpu_cycles(void)
{
    return clock(MONOTONIC);
}

void cpu_set_thread_pointer(uint64_t value)
{
    call(CALL_ARCH_PRCTL, SET_FS, (long)value, 0, 0, 0);
}

void hvt_cpu_init(void) /* an exception is a signal, which the tender's handler reports */
{
}

static void console_write(const struct hvt_puts *block)
{
    for (uint64_t done = 0; done < block->len;) {
        long count = call(CALL_WRITE, SPT_CONSOLE_FD, (long)(block->data_gpa + done),
                          (long)(block->len - done), 0, 0);
        if (count <= 0 && count != -EINTR)
            return;
        done += count > 0 ? (uint64_t)count : 0;
    }
}

static int device_fd(uint64_t handle, uint32_t type)
{
    return (int)hvt_device(handle, type)->host_private; /* the caller has looked for it */
}

static void block_io(long number, struct hvt_block_io *block)
{
    int fd = device_fd(block->handle, MFT_DEV_BLOCK_BASIC);
    long count = call(number, fd, (long)block->data_gpa, (long)block->len, (long)block->offset, 0);

    block->ret = count == (long)block->len ? SOLO5_R_OK : SOLO5_R_EUNSPEC;
}

static void net_io(long number, struct hvt_net_io *block)
{
    int fd = device_fd(block->handle, MFT_DEV_NET_BASIC);
    long count = call(number, fd, (long)block->data_gpa, (long)block->len, 0, 0);

    block->ret = count >= 0 ? SOLO5_R_OK : SOLO5_R_EUNSPEC;
    if (count == -EAGAIN || count == 0) /* 0: no frame is empty, so the peer has gone */
        block->ret = SOLO5_R_AGAIN;
    block->len = count > 0 ? (uint64_t)count : 0;
}

static void poll(struct hvt_poll *block)
{
    struct epoll_event events[MFT_MAX_ENTRIES + 1];
    const uint64_t wake = clock(MONOTONIC) + block->timeout_nsecs;
    const struct timespec until[2] = {
        {0, 0},
        {(int64_t)(wake / NANOSECONDS), (int64_t)(wake % NANOSECONDS | 1)}, /* 0 would disarm it */
    };
    long count;

    call(CALL_TIMERFD_SETTIME, timerfd, ABSOLUTE, (long)until, 0, 0);
    do
        count = call(CALL_EPOLL_PWAIT, epollfd, (long)events, MFT_MAX_ENTRIES + 1, -1, 0);
    while (count == -EINTR);
    block->ready_set = 0;
    for (long i = 0; i < count; i++)
        if (events[i].data != SPT_TIMER_DATA)
            block->ready_set |= UINT64_C(1) << events[i].data;
    block->ret = block->ready_set != 0;
}

void hvt_spt_call(uint32_t number, void *block)
{
    switch (number) {
    case HVT_HYPERCALL_WALLTIME:
        ((struct hvt_walltime *)block)->nsecs = clock(WALL);
        break;
    case HVT_HYPERCALL_PUTS:
        console_write(block);
        break;
    case HVT_HYPERCALL_POLL:
        poll(block);
        break;
    case HVT_HYPERCALL_BLOCK_WRITE:
        block_io(CALL_PWRITE64, block);
        break;
    case HVT_HYPERCALL_BLOCK_READ:
        block_io(CALL_PREAD64, block);
        break;
    case HVT_HYPERCALL_NET_WRITE:
        net_io(CALL_WRITE, block);
        break;
    case HVT_HYPERCALL_NET_READ:
        net_io(CALL_READ, block);
        break;
    case HVT_HYPERCALL_HALT:
        call(CALL_EXIT_GROUP, ((struct hvt_halt *)block)->exit_status, 0, 0, 0, 0);
    }
}

_Noreturn void hvt_spt_start(const struct spt_boot_info *boot);

__attribute__((no_stack_protector)) void hvt_spt_start(const struct spt_boot_info *boot)
{
    const struct hvt_boot_info as_hvt = {
        .mem_size = boot->mem_size,
        .kernel_end = boot->kernel_end,
        .cpu_cycle_freq = NANOSECONDS,
        .cmdline_gpa = boot->cmdline,
        .mft_gpa = boot->manifest,
    };

    epollfd = boot->epollfd;
    timerfd = boot->timerfd;
    hvt_start(&as_hvt);
}

/* Host calls that Python's os module lacks. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <limits.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "host.h"
#include "tender/cpu/tsc.h"
#include "tender/host/ticks.h"

_Static_assert(sizeof(struct pollset) == 580, "struct pollset");
_Static_assert(offsetof(struct pollset, handles) == 516, "struct pollset");

int host_protect(void *address, size_t length, int writable, int readable)
{
    int prot = (writable ? PROT_WRITE : 0) | (readable ? PROT_READ : 0);
    return mprotect(address, length, prot);
}

/* The kernel restarts ppoll(2) with what was left of its timeout before a stop, but poll(2) with the
 * time at which it was to end: that waits for the whole milliseconds, and ppoll() for the rest. */
int host_poll(struct pollset *set, uint64_t deadline_ns)
{
    for (;;) {
        struct timespec now = {0};
        if (deadline_ns)
            clock_gettime(CLOCK_MONOTONIC, &now);
        uint64_t now_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
        uint64_t left_ns = deadline_ns > now_ns ? deadline_ns - now_ns : 0;
        uint64_t left_ms = left_ns / 1000000u;
        if (!left_ms) {
            const struct timespec rest = {.tv_nsec = (long)left_ns};
            return ppoll(set->fds, set->count, &rest, NULL);
        }
        int count = poll(set->fds, set->count, left_ms < INT_MAX ? (int)left_ms : INT_MAX);
        if (count)
            return count;
    }
}

int host_events(int fd, int events, int timeout_ms)
{
    struct pollfd one = {.fd = fd, .events = (short)events};
    int count = poll(&one, 1, timeout_ms);
    return count > 0 ? one.revents : count;
}

/* os.preadv() takes preadv or preadv2, depending on the system: a filter needs one of them. */
ssize_t host_pread(int fd, void *data, size_t length, uint64_t offset)
{
    return pread(fd, data, length, (off_t)offset);
}

ssize_t host_pwrite(int fd, const void *data, size_t length, uint64_t offset)
{
    return pwrite(fd, data, length, (off_t)offset);
}

ssize_t host_write(int fd, const void *data, size_t length)
{
    return write(fd, data, length);
}

int host_accept(int fd)
{
    return accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
}

int host_bytes_waiting(int fd)
{
    int bytes = 0;
    return ioctl(fd, FIONREAD, &bytes) ? -1 : bytes;
}

int host_end_with_parent(void)
{
    return prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
}

void *host_map(int fd, uint64_t offset, size_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    return at == MAP_FAILED ? NULL : at;
}

int host_map_private(void *at, size_t size, int fd, uint64_t offset)
{
    const int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    return mmap(at, size, PROT_READ | PROT_WRITE, flags, fd, (off_t)offset) == MAP_FAILED ? -1 : 0;
}

int host_unmap(void *address, size_t size) { return munmap(address, size); }

uint64_t host_ticks(void) { return ticks(); }

uint64_t host_ticks_hz(void)
{
#if defined(__x86_64__)
    return (uint64_t)tsc_hz();
#elif defined(__aarch64__)
    uint64_t hz;
    __asm__ volatile("mrs %0, cntfrq_el0" : "=r"(hz));
    return hz;
#else
    return 0;
#endif
}

/* Host calls that Python's os module lacks: one system call each. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "host.h"

_Static_assert(sizeof(struct counters) == 32, "struct counters");
_Static_assert(offsetof(struct counters, drops) == 24, "struct counters");
_Static_assert(sizeof(struct pollset) == 580, "struct pollset");
_Static_assert(offsetof(struct pollset, handles) == 516, "struct pollset");

int host_protect(void *address, size_t length, int writable, int readable)
{
    int prot = (writable ? PROT_WRITE : 0) | (readable ? PROT_READ : 0);
    return mprotect(address, length, prot);
}

int host_poll(struct pollset *set, uint64_t timeout_ns)
{
    struct timespec limit = {
        .tv_sec = (time_t)(timeout_ns / 1000000000u),
        .tv_nsec = (long)(timeout_ns % 1000000000u),
    };
    return ppoll(set->fds, set->count, &limit, NULL);
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

int host_end_with_parent(void)
{
    return prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
}

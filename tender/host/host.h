/*
 * Host calls that Python's os module lacks, and what Python and the engine share of a device.
 * Declarations only: cffi reads this file, too.
 */
#pragma once

#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/types.h>

#include "abi/stats.h"

#define POLLSET_MAX 64

/* The descriptors that POLL waits for. */
struct pollset {
    uint32_t count;
    struct pollfd fds[POLLSET_MAX];
    uint8_t handles[POLLSET_MAX]; /* of fds[n] */
};

/* Each returns what the system call returns: -1 and errno for an error, EINTR among them. */
int host_protect(void *address, size_t length, int writable, int readable);
ssize_t host_pread(int fd, void *data, size_t length, uint64_t offset);
ssize_t host_pwrite(int fd, const void *data, size_t length, uint64_t offset);
ssize_t host_write(int fd, const void *data, size_t length);

/* Wait for one of the descriptors until `deadline_ns` of CLOCK_MONOTONIC, 0: not at all. Returns what
 * poll(2) returns. A stop of the process (SIGSTOP, a debugger, a freezer) does not move the end. */
int host_poll(struct pollset *set, uint64_t deadline_ns);

/* Which of `events` (and POLLERR ...) a descriptor has, after at most `timeout_ms`; -1 and errno. */
int host_events(int fd, int events, int timeout_ms);

/* A connection that waits at a socket, not blocking; -1 and errno. */
int host_accept(int fd);

/* Map `size` bytes of a file from `offset` on, shared and writable; NULL and errno. */
void *host_map(int fd, uint64_t offset, size_t size);

/* Map a file in the place of what is mapped at `at`; what is written there stays here. 0 or -1. */
int host_map_private(void *at, size_t size, int fd, uint64_t offset);
int host_unmap(void *address, size_t size);

/* The counter of struct activity, and its frequency in Hz; 0: this machine has none. */
uint64_t host_ticks(void);
uint64_t host_ticks_hz(void);

/* How many bytes a socket holds that can be read. */
int host_bytes_waiting(int fd);

/* The kernel ends this process with its parent's thread; a change of credentials undoes that. */
int host_end_with_parent(void);

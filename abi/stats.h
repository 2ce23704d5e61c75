/*
 * The counters page: a file of a running tender, which others read. Its header is written once,
 * before lockdown, and is not mapped; the counters are in pages of their own, which the tender has
 * mapped. Declarations only: cffi reads this file, too.
 */
#pragma once

#include <stdint.h>

#define STATS_MAGIC 0x54535450 /* "PTST" in memory */
#define STATS_VERSION 2
#define STATS_DEVICES 64
#define STATS_NAME_SIZE 72 /* bytes, NUL included */

#define STATS_STARTING 0
#define STATS_RUNNING 1

struct stats_device {
    uint32_t type; /* MFT_DEV_* */
    char name[STATS_NAME_SIZE];
};

struct stats_header {
    uint32_t magic;
    uint32_t version;
    uint32_t offset; /* of the struct stats, in the file */
    uint32_t device_count;
    uint64_t mem_bytes;  /* of the guest */
    uint64_t started_ns; /* by CLOCK_BOOTTIME */
    char cpu[8];         /* kvm, native, soft, spt */
    struct stats_device devices[STATS_DEVICES];
};

/* What a device has done. The vCPU's thread and the ring's count in it, any thread may read it. */
struct counters {
    _Atomic uint64_t calls;
    _Atomic uint64_t bytes;
    _Atomic uint64_t errors; /* of the host */
    _Atomic uint64_t drops;  /* frames or output that the host did not take */
    _Atomic uint64_t delays; /* operations that have waited for their rate limit */
};

/* What a vCPU has done. Its thread writes it. */
struct activity {
    _Atomic uint64_t exits;
    /* Of host_ticks(), in the guest. While it is there, what was spent before, less the time of
     * the entry: then this is negative, and with the time of now added it is what it says. */
    _Atomic int64_t guest_ticks;
};

struct stats {
    struct activity activity;
    struct counters console;
    struct counters poll;
    _Atomic uint32_t state; /* STATS_* */
    uint32_t reserved;
    struct counters devices[STATS_DEVICES][2]; /* block: all, none; net: received, sent */
};

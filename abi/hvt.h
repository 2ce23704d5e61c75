/*
 * What guest and tender exchange: boot info and the argument block of each hypercall.
 * Declarations only: cffi reads this file, too. abi.h checks the layouts.
 * Every uint64_t named *_gpa is a guest-physical address.
 */
#pragma once

#include <stdint.h>

#define HVT_GUEST_MIN_BASE 0x100000

/* x86_64: a hypercall is a 4-byte OUT to this port + its number, the value is the block's GPA. */
#define HVT_HYPERCALL_PIO_BASE 0x500
/* aarch64: a 4-byte store to this address + (number << 3). */
#define HVT_HYPERCALL_MMIO_BASE 0x100000000

#define HVT_HYPERCALL_WALLTIME 1
#define HVT_HYPERCALL_PUTS 2
#define HVT_HYPERCALL_POLL 3
#define HVT_HYPERCALL_BLOCK_WRITE 4
#define HVT_HYPERCALL_BLOCK_READ 5
#define HVT_HYPERCALL_NET_WRITE 6
#define HVT_HYPERCALL_NET_READ 7
#define HVT_HYPERCALL_HALT 8

#define HVT_R_OK 0
#define HVT_R_AGAIN 1
#define HVT_R_EINVAL 2
#define HVT_R_EUNSPEC 3

#define HVT_CMDLINE_SIZE 8192
#define HVT_HALT_COOKIE_SIZE 512
#define HVT_EXIT_ABORT 255

struct hvt_boot_info {
    uint64_t mem_size;
    uint64_t kernel_end;
    uint64_t cpu_cycle_freq;
    uint64_t cmdline_gpa;
    uint64_t mft_gpa;
    uint32_t host_features;
    uint32_t guest_features;
    uint64_t net_ring_gpa;
};

struct hvt_walltime {
    uint64_t nsecs; /* out */
};

struct hvt_puts {
    uint64_t data_gpa;
    uint64_t len;
};

struct hvt_poll {
    uint64_t timeout_nsecs;
    uint64_t ready_set; /* out: bit n is handle n */
    int32_t ret;        /* out: number of ready handles */
};

struct hvt_block_io {
    uint64_t handle;
    uint64_t offset;
    uint64_t data_gpa;
    uint64_t len;
    int32_t ret; /* out */
};

struct hvt_net_io {
    uint64_t handle;
    uint64_t data_gpa;
    uint64_t len; /* NET_READ: in the buffer's size, out the frame's */
    int32_t ret;  /* out */
};

struct hvt_halt {
    uint64_t cookie_gpa;
    int32_t exit_status;
};

/* x86_64: what the cookie of HALT points at when a trap handler halts. */
struct hvt_x86_trap {
    uint64_t cr2;
    uint64_t error_code;
    uint64_t rip;
    uint64_t cs;
    uint64_t rflags;
    uint64_t rsp;
    uint64_t ss;
};

/*
 * aarch64: the same. The layout is ours: guests built with Solo5 0.12 pass no cookie on this
 * machine. The registers of the exception first, then those of the code that it struck.
 */
struct hvt_aarch64_trap {
    uint64_t far;
    uint64_t esr;
    uint64_t elr;
    uint64_t spsr;
    uint64_t sp;
    uint64_t x[31];
};

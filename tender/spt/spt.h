/*
 * How the tender's process becomes an spt guest: the plan for the code that does it.
 *
 * Declarations only: cffi reads this file, too, and code.c is built with it.
 */
#pragma once

#include <stdint.h>

/* All that stays mapped beside guest memory is one region: code, the plan, and what it points to. */
#define SPT_CODE_SIZE 0x2000
#define SPT_PLAN 0x2000 /* offset in the region */

#define SPT_RANGES 65 /* as many as an image has segments, and the heap */
#define SPT_OVERLAYS 64
#define SPT_PROGRAM_MAX 32
#define SPT_MESSAGE_MAX 128 /* bytes */

struct spt_range {
    uint64_t start;
    uint64_t end;
    uint64_t prot; /* PROT_*, of the guest */
};

struct spt_overlay {
    int32_t fd;        /* what the guest has for it; no descriptor is open there */
    int32_t image_fd;  /* for reading */
    int32_t memory_fd; /* room for `blocks` blocks */
    uint32_t block_size;
    uint64_t capacity; /* bytes */
    uint64_t slots;    /* uint32_t per block: 1 + where it is in the memory, or 0 */
    uint32_t blocks;
    uint32_t used;
};

/* Addresses are the process's own. */
struct spt_plan {
    uint64_t region;
    uint64_t region_size;
    uint64_t stack_end; /* the end of the region: of this code's stack, then of the handlers' */
    uint64_t stack_size;
    uint64_t memory; /* where guest memory is, until it is moved */
    uint64_t mem_size;
    uint64_t entry;
    uint64_t filter; /* struct sock_filter[filter_length] */
    uint32_t filter_length;
    uint32_t range_count;
    struct spt_range ranges[SPT_RANGES]; /* what is not R+W */
    int32_t message_fd;                  /* standard error, or the report of a program's child */
    uint32_t is_report;
    uint32_t is_init;            /* it is PID 1, which the kernel does not end by SIGTERM */
    uint32_t traps_exit;         /* the filter raises SIGSYS for exit_group, and allows exit */
    uint32_t has_core;           /* a core file is written when it aborts or takes an exception */
    int32_t core_fd;
    int32_t core_helper_fd;
    uint64_t core_header; /* a page, in which the registers are at `core_registers` */
    uint64_t core_registers;
    uint32_t has_report; /* the end is written to `report_fd`, once */
    int32_t report_fd;
    uint64_t report_tail; /* the end of the object, `report_tail_size` bytes */
    uint64_t report_tail_size;
    uint32_t overlay_count;
    struct spt_overlay overlays[SPT_OVERLAYS];
    char program[SPT_PROGRAM_MAX]; /* what a line begins with */
};

/*
 * Become the guest: does not return, unless the code cannot be made executable (-1 and errno).
 * `region` begins with the code, which is RW until now.
 */
int spt_become(void *region);

/* How much the kernel needs of a signal stack for its frame; 0: it does not say. */
uint64_t spt_frame_size(void);

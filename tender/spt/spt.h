/*
 * How the tender's process becomes an spt guest: the plan for the code that does it.
 *
 * Declarations only: cffi reads this file, too, and code.c is built with it.
 */
#pragma once

#include <stdint.h>

/* All that stays mapped beside guest memory is one region: code, the plan, and what it points to. */
#define SPT_CODE_SIZE 0x2000
#define SPT_PLAN SPT_CODE_SIZE /* offset in the region */

#define SPT_RANGES 65 /* as many as an image has segments, and the heap */
#define SPT_PROGRAM_MAX 32
#define SPT_MESSAGE_MAX 128 /* bytes */

struct spt_range {
    uint64_t start;
    uint64_t end;
    uint64_t prot; /* PROT_*, of the guest */
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
    char program[SPT_PROGRAM_MAX]; /* what a line begins with */
};

/*
 * Become the guest: does not return, unless the code cannot be made executable (-1 and errno).
 * `region` begins with the code, which is RW until now.
 */
int spt_become(void *region);

/* How much the kernel needs of a signal stack for its frame; 0: it does not say. */
uint64_t spt_frame_size(void);

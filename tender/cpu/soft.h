/*
 * A CPU in software for Python: the Unicorn emulator, whose library is found at run time.
 * Declarations only: cffi reads this file, too.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "abi/stats.h"

/* uc_mem_type, uc_err, uc_arch */
#define UC_MEM_WRITE_UNMAPPED 20
#define UC_MEM_FETCH_UNMAPPED 21
#define UC_MEM_WRITE_PROT 22
#define UC_ERR_FETCH_PROT 14
#define UC_ARCH_ARM64 2
#define UC_ARCH_X86 4

struct uc_x86_mmr { /* GDTR, IDTR, LDTR, TR */
    uint16_t selector;
    uint64_t base;
    uint32_t limit;
    uint32_t flags;
};

struct uc_x86_msr {
    uint32_t rid;
    uint64_t value;
};

struct uc_arm64_cp_reg {
    uint32_t crn, crm, op0, op1, op2;
    uint64_t val;
};

/* What a run ends with. */
enum soft_exit_kind {
    SOFT_HALTED,   /* the CPU waits for an interrupt */
    SOFT_STOPPED,  /* soft_kick() */
    SOFT_OUT,      /* number: port */
    SOFT_IN,       /* number: port; soft.reply is what the guest reads */
    SOFT_INTR,     /* number: the exception or interrupt; the emulator does not deliver it;
                      soft.again: go on with a new emulation, at a new program counter */
    SOFT_INVALID,  /* an instruction that the emulator does not know */
    SOFT_MEMORY,   /* number: uc_mem_type; address is physical; soft.skip: go on behind it */
    SOFT_INSN,     /* number: what soft_hook_insn() was given; soft.reply: skip it */
    SOFT_CODE,     /* address: an instruction of soft_watch_x86() */
    SOFT_LIMIT,    /* the guest has had its instructions */
    SOFT_ERROR,    /* number: uc_err */
    SOFT_DEBUG,    /* number: enum soft_debug_kind; address: of the access that was watched */
};

/* Why a guest that is debugged has stopped. */
enum soft_debug_kind {
    SOFT_STEP,
    SOFT_BREAKPOINT, /* before the instruction */
    SOFT_READ,       /* a watchpoint: after the instruction, or, with `before`, before the access */
    SOFT_WRITE,
};

struct soft_watch { /* a range that a debugger watches */
    uint64_t start;
    uint64_t size;
    bool read;
    bool write;
};

struct soft_clock {
    uint64_t frequency; /* Hz, of the counter */
    uint64_t counter;   /* its value at `since_ns` */
    uint64_t since_ns;  /* of CLOCK_MONOTONIC, or of the virtual clock */
    uint64_t now_ns;    /* of the virtual clock */
    uint64_t tick_ns;   /* what a reading of the virtual clock takes; 0: real time */
    uint64_t random;    /* where RDRAND has got to in virtual time */
};

/* A CPU, and what its last run ended with. */
struct soft {
    int kind; /* enum soft_exit_kind */
    uint32_t number;
    uint32_t size;
    uint32_t is_write;
    uint64_t address;
    uint64_t value;
    uint64_t reply;
    uint64_t skip; /* bytes of the instruction that ended with SOFT_MEMORY */
    bool again;
    _Atomic bool inside;   /* the emulator is in the middle of something */
    uint64_t instructions; /* left, where they are counted */
    struct soft_clock *clock;
    struct activity *activity; /* or NULL */
    struct soft_private *own;
};

/* An instruction that is hooked by its number. */
struct soft_insn {
    struct soft *soft;
    uint32_t number;
};

/* Find the library; NULL, or what is wrong in words. Once per process is enough. */
const char *soft_load(const char *path);
/* major << 16 | minor << 8 | patch, as far as the library tells. */
unsigned soft_version(void);
/* Whether Unicorn can map its memory, without which it calls exit(): 0, or the errno. */
int soft_try_memory(void);
const char *soft_strerror(int error);

/* A CPU of `arch` in `mode` whose program counter is register `pc`; NULL and a uc_err, or a negative
 * errno of mmap(2). */
struct soft *soft_open(int arch, int mode, int pc, int *error);
void soft_close(struct soft *soft);
/* Let the guest run until something happens; enum soft_exit_kind. */
int soft_run(struct soft *soft);
uintptr_t soft_kick_address(void);
/* Translate the guest's code again when it goes on from this SOFT_OUT or SOFT_MEMORY: the tender
 * changes it. */
void soft_forget_code(struct soft *soft);

/* Guest memory, in the order of its addresses. A page that an access hook covers is slow to write:
 * so none covers memory that may be written, and soft_hook_unmapped() is for where no memory is. */
int soft_map(struct soft *soft, uint64_t gpa, uint64_t size, uint32_t prot, void *host);
int soft_hook_unmapped(struct soft *soft, uint64_t first, uint64_t last);
int soft_hook_x86(struct soft *soft, int out, int in, int rdtsc, int rdtscp);
int soft_hook_arm64(struct soft *soft, int mrs);
/* Leave at an instruction that is hooked by its number (UC_X86_INS_*). `insn` lives as long. */
int soft_hook_insn(struct soft *soft, struct soft_insn *insn, int number);
/* Find RDMSR, WRMSR and AVX instructions in code that is executed, and leave before them; RDRAND and
 * RDSEED are answered. */
int soft_watch_x86(struct soft *soft);
/* From the next instruction on, this many; each one costs. */
int soft_count(struct soft *soft, uint64_t instructions);

/* From now on the guest can be debugged; before it runs. Each instruction and each access costs.
 * `before`: it stops at a watchpoint before the access, as aarch64 does. */
int soft_debug(struct soft *soft, bool before);
/* What it stops at, in the place of what was set before; it may be in the middle of an instruction.
 * `step`: at the next instruction. The one at which it stands does not stop it. 0, or UC_ERR_NOMEM. */
int soft_set_debug(struct soft *soft, const uint64_t *breaks, size_t breaks_count,
                   const struct soft_watch *watches, size_t watch_count, bool step);
/* Code in the guest's memory has been changed by somebody else. */
void soft_debug_forget_code(struct soft *soft);

int soft_reg_read(struct soft *soft, int number, void *value);
int soft_reg_write(struct soft *soft, int number, const void *value);
/* The emulator's own record of the CPU; free with soft_context_free(). NULL: no memory. */
void *soft_context(struct soft *soft);
size_t soft_context_size(struct soft *soft);
int soft_context_save(struct soft *soft, void *context);
int soft_context_restore(struct soft *soft, void *context);
void soft_context_free(void *context);

/* Read the clock: a virtual one goes on by being read. */
uint64_t soft_now_ns(struct soft_clock *clock);
/* The counter that the guest reads: `frequency` steps per second of the clock. */
uint64_t soft_counter(struct soft_clock *clock);
/* From here on the counter goes on from `counter` with this frequency. */
void soft_set_counter(struct soft_clock *clock, uint64_t counter, uint64_t frequency);

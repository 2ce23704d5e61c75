/*
 * The native CPU: a process runs the guest, and the tender answers what it traps.
 *
 * Declarations only: cffi reads this file, too, and native_guest.c is built with it.
 */
#pragma once

#include <stdint.h>

#define NATIVE_MEMORY_START 0x10000 /* pages of guest memory below are not present */

/* The address space of the guest's process, beside guest memory. */
#define NATIVE_PROGRAM 0x500000000000
#define NATIVE_SHARED 0x500010000000
#define NATIVE_SHARED_SIZE 0x10000
#define NATIVE_STACK 0x4000 /* offset in it of the signal stack, which fills the rest */
#define NATIVE_STACK_SIZE 0xc000

/* The descriptors that the program is started with; it closes them. */
#define NATIVE_SHARED_FD 3
#define NATIVE_MEMORY_FD 4

#define NATIVE_RANGES 256
#define NATIVE_COMM 16 /* TASK_COMM_LEN */
#define NATIVE_FILTER_MAX 32 /* instructions */

#define NATIVE_TURN_GUEST 0
#define NATIVE_TURN_TENDER 1

struct native_range {
    uint64_t start;
    uint64_t end;
    uint32_t prot; /* PROT_*, of the guest */
};

/* At NATIVE_SHARED in the guest's process. The guest can write all of it at any time. */
struct native_shared {
    _Atomic uint32_t turn; /* NATIVE_TURN_*: who runs; the futex of both */
    _Atomic uint32_t guest_sleeps;
    _Atomic uint32_t tender_sleeps;
    uint64_t guest_spin; /* for how many cycles the guest's side looks again before it sleeps */

    /* The last trap, written by the program. */
    int32_t signo;
    uint32_t arch;      /* of a SIGSYS */
    uint64_t call;      /* of a SIGSYS: si_call_addr */
    int32_t code;       /* si_code */
    uint64_t context;   /* the address of its ucontext_t, which is on the signal stack */
    uint64_t fs_base;
    uint64_t gs_base;

    /* For the start, written by the tender before. */
    char comm[NATIVE_COMM]; /* the name of both processes */
    int32_t parent; /* the tender's pid */
    int32_t failed; /* written by the program: the errno of a step that failed */
    uint32_t traps_tsc; /* RDTSC is to trap */
    uint32_t range_count;
    uint32_t filter_length;
    uint64_t filter[NATIVE_FILTER_MAX]; /* struct sock_filter */
    struct native_range ranges[NATIVE_RANGES];
};

#define NATIVE_TRAP 0      /* see struct native_trap */
#define NATIVE_HYPERCALL 1 /* `number` and `gpa`; the guest goes on behind the instruction */

#define NATIVE_REGISTERS 18 /* in the order of boot.x86_64.REGISTERS */

/* Whether one side spins before it sleeps: not where the last spins were in vain. */
struct native_spin {
    uint32_t skipped; /* waits that are still to be made without one */
    uint32_t skip;    /* ... after the next one in vain */
};

/* A guest's CPU: the tender's side. */
struct native {
    struct native_shared *shared; /* where the tender has it mapped */
    const uint8_t *memory;
    void *activity;            /* struct activity, or NULL */
    void *engine;              /* struct engine, or NULL: Python answers every hypercall */
    struct native_range *text; /* what the guest may execute; the tender can read it */
    uint32_t text_count;
    int32_t pidfd;
    int32_t is_guests_turn;
    int32_t traps_tsc; /* RDTSC traps, which the guest's side would need to spin; then: */
    uint64_t tsc;      /* ... what the guest's counter was */
    uint64_t tsc_then; /* ... when the machine's was this */
    uint64_t tsc_hz, machine_hz;
    uint64_t spin_cycles; /* how long to spin; 0 where there is one CPU only */
    uint64_t guest_spins; /* for how many the guest's side does now */
    struct native_spin guest_spin;
    struct native_spin tender_spin;
    _Atomic uint8_t immediate_exit; /* as KVM's */

    /* The last exit, checked and copied. */
    int32_t kind; /* NATIVE_* */
    uint32_t number;
    uint32_t gpa;
    int32_t signo;
    int32_t code; /* si_code: 0 where it is native_pause() */
    uint32_t arch;
    uint64_t call;
    uint32_t vector;
    uint64_t error_code;
    uint64_t cr2;
    uint32_t cs;
    uint64_t frame; /* offset of its ucontext_t in the shared region */
    uint64_t registers[NATIVE_REGISTERS];
};

/* Create a memfd; 0 or more, else -1 and errno. `executable`: it can be executed. */
int native_memfd(const char *name, uint64_t size, int executable);

/* Map a file shared, at `at` or anywhere (NULL); NULL and errno. */
void *native_map(void *at, uint64_t size, int fd);
int native_unmap(void *at, uint64_t size);

/* The seccomp filter of the guest's process. */
void native_filter(struct native_shared *shared);

/* Start the process: its pidfd, or -1 and errno. */
int native_start(int program_fd, int shared_fd, int memory_fd);

/*
 * Let the guest run until Python is needed: 0 for an exit, EINTR, ESRCH where the process has ended,
 * EBADMSG where it has forged what it shares with the tender.
 */
int native_run(struct native *native);

/* Write `registers` to the frame. */
void native_set_registers(struct native *native);

/*
 * Copy `size` bytes of the frame's XSAVE area; -1 where the frame has none of this size. `set`: write
 * them, but for the words that are the kernel's.
 */
int native_fpu(struct native *native, void *area, uint64_t size, int set);

/* The guest's counter: the machine's TSC, or what is made of it where RDTSC traps. */
uint64_t native_counter(const struct native *native);

/* Let the guest, which runs, come back by a SIGTRAP. */
void native_pause(struct native *native);

/* Whether the process has ended: the signal that has killed it; -1: it has exited. */
int native_has_ended(const struct native *native);

/* End the process and wait for it. */
void native_kill(struct native *native);

/* Why the CPU or the kernel can't: 1 no FSGSBASE, 2 a signal frame that is too large, else 0. */
int native_missing(void);

/* Which limit of this process (RLIMIT_*) keeps a guest with so much memory from this CPU; -1: none. */
int native_limit(uint64_t mem_bytes);

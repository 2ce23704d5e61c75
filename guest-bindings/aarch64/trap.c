/*
 * CPU exceptions: each one is printed, and ends the guest.
 * The rule: every handler runs on a stack of its own, so that a guest that has smashed its stack
 * can still be reported; and nothing returns from here.
 */
#include "runtime.h"

#include <string.h>

enum { KINDS = 4, KIND_SYNCHRONOUS = 0 }; /* of an entry of the vector table */
enum { ESR_CLASS_SHIFT = 26, ESR_CLASSES = 64 };

union cookie { /* the tender reads all of its size, whatever is in it */
    struct hvt_aarch64_trap trap;
    uint8_t bytes[HVT_HALT_COOKIE_SIZE];
};

extern const char hvt_vectors[];
uint64_t hvt_trap_registers[32]; /* x0 to x30 and SP, from entry.S */
_Noreturn void hvt_trap(uint64_t vector);

static union cookie cookie;

void hvt_cpu_init(void)
{
    cpu_set_vectors(hvt_vectors);
}

/* Exception classes that a guest can meet (Arm ARM, D24.2.40, ESR_EL1). */
static const char *name_of(uint64_t vector, uint64_t esr)
{
    static const char *const kinds[KINDS] = {"synchronous exception", "IRQ", "FIQ", "SError"};

    if (vector % KINDS != KIND_SYNCHRONOUS)
        return kinds[vector % KINDS];
    switch (esr >> ESR_CLASS_SHIFT & (ESR_CLASSES - 1)) {
    case 0x00:
        return "undefined instruction";
    case 0x07:
        return "floating point access";
    case 0x0e:
        return "illegal execution state";
    case 0x15:
        return "supervisor call";
    case 0x18:
        return "system register access";
    case 0x20:
    case 0x21:
        return "instruction abort";
    case 0x22:
        return "program counter alignment";
    case 0x24:
    case 0x25:
        return "data abort";
    case 0x26:
        return "stack pointer alignment";
    case 0x3c:
        return "breakpoint instruction";
    default:
        return kinds[KIND_SYNCHRONOUS];
    }
}

static void print_trap(uint64_t vector, const struct hvt_aarch64_trap *trap)
{
    const char *name = name_of(vector, trap->esr);

    hvt_log("Solo5: trap %s: vector=%lu esr=0x%lx elr=0x%lx far=0x%lx\n", name, vector, trap->esr,
            trap->elr, trap->far);
    hvt_log("Solo5: sp=0x%lx lr=0x%lx spsr=0x%lx\n", trap->sp, trap->x[30], trap->spsr);
    hvt_log("Solo5: ABORT: unhandled CPU exception (%s)\n", name);
}

void hvt_trap(uint64_t vector)
{
    static bool reporting;

    if (reporting) /* the report itself has failed: the first cookie says more than the second */
        hvt_halt(SOLO5_EXIT_ABORT, &cookie);
    reporting = true;
    cookie.trap.far = cpu_read_far();
    cookie.trap.esr = cpu_read_esr();
    cookie.trap.elr = cpu_read_elr();
    cookie.trap.spsr = cpu_read_spsr();
    cookie.trap.sp = hvt_trap_registers[31];
    memcpy(cookie.trap.x, hvt_trap_registers, sizeof cookie.trap.x);
    print_trap(vector, &cookie.trap);
    hvt_halt(SOLO5_EXIT_ABORT, &cookie);
}

/*
 * The tender's side of the native CPU; native.h has what each function does.
 *
 * The rule here: what lies in the shared region is the guest's word. Each field is read once, and
 * only the address of the frame is used as one, after a check.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
#include <x86intrin.h>

#include "abi/abi.h"
#include "native.h"
#include "tender/engine/engine.h"
#include "tender/host/ticks.h"

#define LOOK_NS 100000000 /* how often to look whether the process is alive */
#define MAX_SKIP 1000    /* waits */
#define TRAP_GP 13
#define OUT_DX_EAX 0xef
#define RDTSC_0 0x0f
#define RDTSC_1 0x31
#define FXSAVE_SIZE 512
#define FXSAVE_OWN 416 /* behind are words of the kernel's */

_Static_assert(sizeof(struct native_shared) <= NATIVE_STACK, "struct native_shared");
_Static_assert(NATIVE_STACK + NATIVE_STACK_SIZE == NATIVE_SHARED_SIZE, "the signal stack");
PTENDER_SIZE(struct native_range, 24);

/* In the order of boot.x86_64.REGISTERS. */
static const uint8_t gregs[NATIVE_REGISTERS] = {
    REG_RAX, REG_RBX, REG_RCX, REG_RDX, REG_RSI, REG_RDI, REG_RSP, REG_RBP, REG_R8,
    REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RIP, REG_EFL,
};

/* For how many cycles to spin in the next wait. */
static uint64_t next_spin(const struct native *native, struct native_spin *spin)
{
    if (!spin->skipped)
        return native->spin_cycles;
    spin->skipped--;
    return 0;
}

/* A wait with a spin has ended; `slept`: the spin was in vain. */
static void note_spin(struct native_spin *spin, int slept)
{
    spin->skip = slept ? spin->skip * 2 + 1 : spin->skip / 2;
    if (spin->skip > MAX_SKIP)
        spin->skip = MAX_SKIP;
    spin->skipped = slept ? spin->skip : 0;
}

static void to_guest(struct native *native)
{
    struct native_shared *shared = native->shared;
    if (native->guest_spins)
        note_spin(&native->guest_spin, shared->guest_sleeps != 0);
    native->guest_spins = native->traps_tsc ? 0 : next_spin(native, &native->guest_spin);
    shared->guest_spin = native->guest_spins;
    shared->turn = NATIVE_TURN_GUEST;
    if (shared->guest_sleeps)
        syscall(SYS_futex, &shared->turn, FUTEX_WAKE, 1, NULL, NULL, 0);
    native->is_guests_turn = 1;
}

static int spun_for_guest(struct native *native)
{
    const uint64_t cycles = next_spin(native, &native->tender_spin);
    const uint64_t begun = __rdtsc();
    while (__rdtsc() - begun < cycles) {
        if (native->shared->turn == NATIVE_TURN_TENDER) {
            note_spin(&native->tender_spin, 0);
            return 1;
        }
        __builtin_ia32_pause();
    }
    if (cycles)
        note_spin(&native->tender_spin, 1);
    return 0;
}

/* Wait for the guest: 0, EINTR, ESRCH or EBADMSG. */
static int wait_for_guest(struct native *native)
{
    struct native_shared *shared = native->shared;
    const struct timespec look = {0, LOOK_NS};
    int error = 0;

    if (spun_for_guest(native))
        return 0;
    shared->tender_sleeps = 1;
    for (uint32_t turn; !error && (turn = shared->turn) != NATIVE_TURN_TENDER;) {
        if (native->immediate_exit)
            error = EINTR;
        else if (turn != NATIVE_TURN_GUEST)
            error = EBADMSG; /* FUTEX_WAIT would come back at once, whether the guest lives or not */
        else if (syscall(SYS_futex, &shared->turn, FUTEX_WAIT, NATIVE_TURN_GUEST, &look, NULL, 0)) {
            if (errno == EINTR)
                error = EINTR;
            else if (errno == ETIMEDOUT && native_has_ended(native))
                error = ESRCH;
        }
    }
    shared->tender_sleeps = 0;
    return error;
}

/* The frame of the last trap, NULL where what the guest names is none. */
static ucontext_t *frame_of(const struct native *native)
{
    const uint64_t at = native->frame;
    if (at < NATIVE_STACK || at % 8 || at > NATIVE_SHARED_SIZE - sizeof(ucontext_t))
        return NULL;
    return (ucontext_t *)((uint8_t *)native->shared + at);
}

static int read_trap(struct native *native)
{
    struct native_shared *shared = native->shared;
    native->frame = *(volatile uint64_t *)&shared->context - NATIVE_SHARED;
    const ucontext_t *frame = frame_of(native);
    if (!frame)
        return EBADMSG;
    const volatile greg_t *from = frame->uc_mcontext.gregs;
    for (unsigned i = 0; i < NATIVE_REGISTERS; i++)
        native->registers[i] = (uint64_t)from[gregs[i]];
    native->vector = (uint32_t)from[REG_TRAPNO];
    native->error_code = (uint64_t)from[REG_ERR];
    native->cr2 = (uint64_t)from[REG_CR2];
    native->cs = (uint32_t)from[REG_CSGSFS] & 0xffff;
    native->signo = *(volatile int32_t *)&shared->signo;
    native->code = *(volatile int32_t *)&shared->code;
    native->arch = *(volatile uint32_t *)&shared->arch;
    native->call = *(volatile uint64_t *)&shared->call;
    native->kind = NATIVE_TRAP;
    return 0;
}

static int is_text(const struct native *native, uint64_t address)
{
    for (uint32_t i = 0; i < native->text_count; i++)
        if (native->text[i].start <= address && address < native->text[i].end)
            return 1;
    return 0;
}

#define RAX 0
#define RDX 3
#define RIP 16

/* Whether the trap is a hypercall: `out %eax, (%dx)` in the guest's text. */
static int read_hypercall(struct native *native)
{
    const uint64_t rip = native->registers[RIP];
    const uint32_t number = (native->registers[RDX] & 0xffff) - HVT_HYPERCALL_PIO_BASE;
    if (native->signo != SIGSEGV || native->vector != TRAP_GP || number > HVT_HYPERCALL_HALT)
        return 0;
    if (!is_text(native, rip) || *(const volatile uint8_t *)(native->memory + rip) != OUT_DX_EAX)
        return 0;
    native->kind = NATIVE_HYPERCALL;
    native->number = number;
    native->gpa = (uint32_t)native->registers[RAX];
    native->registers[RIP] = rip + 1;
    frame_of(native)->uc_mcontext.gregs[REG_RIP] = (greg_t)(rip + 1);
    return 1;
}

void native_set_registers(struct native *native)
{
    ucontext_t *frame = frame_of(native);
    for (unsigned i = 0; frame && i < NATIVE_REGISTERS; i++)
        frame->uc_mcontext.gregs[gregs[i]] = (greg_t)native->registers[i];
}

uint64_t native_counter(const struct native *native)
{
    const uint64_t now = __rdtsc();
    if (!native->traps_tsc)
        return now;
    const unsigned __int128 passed = now - native->tsc_then;
    return native->tsc + (uint64_t)(passed * native->tsc_hz / native->machine_hz);
}

/* Whether the trap is an RDTSC in the guest's text, which is answered. */
static int answer_rdtsc(struct native *native)
{
    const uint64_t rip = native->registers[RIP];
    if (!native->traps_tsc || native->signo != SIGSEGV || native->vector != TRAP_GP)
        return 0;
    if (!is_text(native, rip) || !is_text(native, rip + 1))
        return 0;
    const volatile uint8_t *code = native->memory + rip;
    if (code[0] != RDTSC_0 || code[1] != RDTSC_1)
        return 0;
    const uint64_t now = native_counter(native);
    native->registers[RAX] = now & 0xffffffff;
    native->registers[RDX] = now >> 32;
    native->registers[RIP] = rip + 2;
    native_set_registers(native);
    return 1;
}

int native_run(struct native *native)
{
    for (;;) {
        if (!native->is_guests_turn) {
            if (native->immediate_exit) /* a guest that is quick never lets the tender sleep */
                return EINTR;
            to_guest(native);
        }
        guest_enter(native->activity);
        int error = wait_for_guest(native);
        guest_exit(native->activity);
        if (error)
            return error;
        native->is_guests_turn = 0;
        error = read_trap(native);
        if (!error && answer_rdtsc(native))
            continue;
        if (error || !read_hypercall(native) || !native->engine)
            return error;
        struct engine *engine = native->engine;
        if (!engine_answer(engine, native->number, native->gpa))
            return 0;
        if (engine->has_report)
            return EINTR;
    }
}

int native_fpu(struct native *native, void *area, uint64_t size, int set)
{
    ucontext_t *frame = frame_of(native);
    if (!frame || size > NATIVE_STACK_SIZE)
        return -1;
    const uint64_t at = (uint64_t)*(void *volatile *)&frame->uc_mcontext.fpregs - NATIVE_SHARED;
    if (at < NATIVE_STACK || at > NATIVE_SHARED_SIZE - size)
        return -1;
    uint8_t *there = (uint8_t *)native->shared + at;
    if (!set) {
        memcpy(area, there, size);
        return 0;
    }
    memcpy(there, area, FXSAVE_OWN);
    if (size > FXSAVE_SIZE)
        memcpy(there + FXSAVE_SIZE, (uint8_t *)area + FXSAVE_SIZE, size - FXSAVE_SIZE);
    return 0;
}

void native_pause(struct native *native)
{
    syscall(SYS_pidfd_send_signal, native->pidfd, SIGTRAP, NULL, 0);
}

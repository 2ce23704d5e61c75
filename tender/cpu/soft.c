/*
 * A CPU in software for Python: the Unicorn emulator, whose library is found at run time.
 *
 * The emulator answers by calling back, from the middle of the guest's code; a vCPU of the tender
 * answers by returning from run(). So the emulator runs on a stack of its own: a callback leaves it
 * there, in the middle of an instruction, and the next soft_run() lets it go on. That costs two
 * jumps instead of ending and starting an emulation.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#undef _FORTIFY_SOURCE /* the fortified longjmp() refuses to change stacks */
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "soft_private.h"
#include "tender/host/ticks.h"

#define SOFT_STACK (1u << 20)
#define SOFT_GUARD 4096u
#define SOFT_TRANSLATOR (1u << 30) /* what Unicorn maps for translated code ... */
#define SOFT_MARGIN (64u << 20)    /* ... and more than it needs beside it */

_Static_assert(sizeof(struct soft) == 88, "struct soft");
_Static_assert(offsetof(struct soft, clock) == 64, "struct soft");
_Static_assert(sizeof(struct soft_clock) == 48, "struct soft_clock");
_Static_assert(sizeof(struct uc_x86_mmr) == 24, "struct uc_x86_mmr");
_Static_assert(sizeof(struct uc_x86_msr) == 16, "struct uc_x86_msr");
_Static_assert(sizeof(struct uc_arm64_cp_reg) == 32, "struct uc_arm64_cp_reg");

struct soft_library uc;

const char *soft_load(const char *path)
{
    static const struct { const char *name; void *at; } wanted[] = {
        {"uc_version", &uc.version}, {"uc_open", &uc.open}, {"uc_close", &uc.close},
        {"uc_strerror", &uc.strerror}, {"uc_emu_start", &uc.emu_start},
        {"uc_emu_stop", &uc.emu_stop}, {"uc_mem_map_ptr", &uc.mem_map_ptr},
        {"uc_mem_protect", &uc.mem_protect}, {"uc_reg_read", &uc.reg_read},
        {"uc_reg_write", &uc.reg_write}, {"uc_hook_add", &uc.hook_add}, {"uc_ctl", &uc.ctl},
        {"uc_context_size", &uc.context_size}, {"uc_context_alloc", &uc.context_alloc},
        {"uc_context_save", &uc.context_save}, {"uc_context_restore", &uc.context_restore},
        {"uc_context_free", &uc.context_free},
    };
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return dlerror();
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *function = dlsym(library, wanted[i].name);
        if (!function)
            return dlerror();
        memcpy(wanted[i].at, &function, sizeof function);
    }
    return NULL;
}

unsigned soft_version(void)
{
    return uc.version(NULL, NULL) >> 8;
}

const char *soft_strerror(int error)
{
    return uc.strerror(error);
}

static uint64_t soft_scale(uint64_t value, uint64_t by, uint64_t per)
{
    return (uint64_t)((unsigned __int128)value * by / per);
}

static uint64_t soft_host_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t soft_now_ns(struct soft_clock *clock)
{
    if (!clock->tick_ns)
        return soft_host_ns();
    return clock->now_ns += clock->tick_ns;
}

uint64_t soft_counter(struct soft_clock *clock)
{
    uint64_t passed = soft_now_ns(clock) - clock->since_ns;
    return clock->counter + soft_scale(passed, clock->frequency, 1000000000u);
}

void soft_set_counter(struct soft_clock *clock, uint64_t counter, uint64_t frequency)
{
    clock->frequency = frequency;
    clock->counter = counter;
    clock->since_ns = clock->tick_ns ? clock->now_ns : soft_host_ns();
}

/* The two stacks. */

void soft_leave(struct soft *soft, int kind)
{
    soft->kind = kind;
    if (!_setjmp(soft->own->inner))
        _longjmp(soft->own->outer, 1);
}

/* The emulator's stack: one emulation after the other, each until the guest halts or is stopped. */
static void soft_stack(unsigned low, unsigned high)
{
    struct soft *soft = (struct soft *)((uintptr_t)low | (uintptr_t)high << 16 << 16);

    soft_leave(soft, SOFT_STOPPED); /* soft_open() waits for this */
    for (;;) {
        uint64_t pc = 0;
        if (soft->own->stale)
            uc.ctl(soft->own->uc, UC_CTL_WRITE_0(UC_CTL_TB_FLUSH));
        soft->own->stale = false;
        uc.reg_read(soft->own->uc, soft->own->pc, &pc);
        soft_debug_before(soft, pc);
        if (soft->own->watch && !soft->own->suspect.size)
            soft_suspect_first(soft, pc);
        int error = soft->own->suspect.size ? soft_hook_suspects(soft) : 0;
        if (!error) {
            soft->inside = true;
            error = uc.emu_start(soft->own->uc, pc, 0, 0, 0);
            soft->inside = false;
        }
        if (error && soft->skip) { /* the access was the tender's to make, and is made */
            uc.reg_read(soft->own->uc, soft->own->pc, &pc);
            pc += soft->skip;
            uc.reg_write(soft->own->uc, soft->own->pc, &pc);
            soft->again = true;
            error = 0;
        }
        bool again = soft->again || soft->own->suspect.size;
        soft->again = false;
        soft->skip = 0;
        soft->number = (uint32_t)error;
        if (!error && again && !soft->own->stopping)
            continue;
        bool stopped = soft->own->stopping;
        soft->own->stopping = 0;
        soft_leave(soft, error ? SOFT_ERROR : stopped ? SOFT_STOPPED : SOFT_HALTED);
    }
}

/* Async-signal-safe: uc_emu_stop() of a running emulator only sets flags. A kick that comes in the
 * instant before the emulator runs is lost to it: whoever kicks repeats it (stop.h). */
static void soft_kick(void *of)
{
    struct soft *soft = of;
    soft->own->kicked = 1;
    if (soft->inside) {
        soft->own->stopping = 1;
        uc.emu_stop(soft->own->uc);
    }
}

uintptr_t soft_kick_address(void)
{
    return (uintptr_t)soft_kick;
}

int soft_run(struct soft *soft)
{
    if (soft->own->kicked) {
        soft->own->kicked = 0;
        return soft->kind = SOFT_STOPPED;
    }
    guest_enter(soft->activity);
    if (!_setjmp(soft->own->outer))
        _longjmp(soft->own->inner, 1);
    guest_exit(soft->activity);
    if (soft->kind == SOFT_STOPPED)
        soft->own->kicked = 0;
    return soft->kind;
}

void soft_forget_code(struct soft *soft)
{
    soft->own->stale = true;
}

int soft_hook(struct soft *soft, int type, void *function, void *data, uint64_t from, uint64_t to,
              int insn)
{
    size_t handle;
    return uc.hook_add(soft->own->uc, &handle, type, function, data, from, to, insn);
}

int soft_hook_all(struct soft *soft, int type, void *function)
{
    return soft_hook(soft, type, function, soft, 1, 0, 0);
}

static bool soft_remember_piece(struct soft *soft, struct soft_piece piece)
{
    struct soft_private *own = soft->own;

    if (own->piece_count == own->piece_room) {
        size_t room = own->piece_room ? own->piece_room * 2 : 8;
        struct soft_piece *pieces = reallocarray(own->pieces, room, sizeof *pieces);
        if (!pieces)
            return false;
        own->pieces = pieces;
        own->piece_room = room;
    }
    own->pieces[own->piece_count++] = piece;
    return true;
}

int soft_map(struct soft *soft, uint64_t gpa, uint64_t size, uint32_t prot, void *host)
{
    int error = uc.mem_map_ptr(soft->own->uc, gpa, size, prot, host);
    if (!error && !soft_remember_piece(soft, (struct soft_piece){gpa, gpa + size, host}))
        error = UC_ERR_NOMEM;
    if (error || prot & UC_PROT_WRITE)
        return error;
    /* Mapping it so holds for the guest's accesses; protecting it, for the emulator's own as well,
     * which notes in the page tables that a page was used, wherever the guest says they are. */
    error = uc.mem_protect(soft->own->uc, gpa, size, prot);
    if (!error)
        error = soft_hook(soft, UC_HOOK_MEM_WRITE_PROT, soft_on_memory, soft, gpa, gpa + size - 1, 0);
    return error;
}

int soft_hook_unmapped(struct soft *soft, uint64_t first, uint64_t last)
{
    return soft_hook(soft, UC_HOOK_MEM_UNMAPPED, soft_on_memory, soft, first, last, 0);
}

int soft_reg_read(struct soft *soft, int number, void *value)
{
    return uc.reg_read(soft->own->uc, number, value);
}

int soft_reg_write(struct soft *soft, int number, const void *value)
{
    return uc.reg_write(soft->own->uc, number, value);
}

void *soft_context(struct soft *soft)
{
    void *context = NULL;
    return uc.context_alloc(soft->own->uc, &context) ? NULL : context;
}

size_t soft_context_size(struct soft *soft)
{
    return uc.context_size(soft->own->uc);
}

int soft_context_save(struct soft *soft, void *context)
{
    return uc.context_save(soft->own->uc, context);
}

int soft_context_restore(struct soft *soft, void *context)
{
    return uc.context_restore(soft->own->uc, context);
}

void soft_context_free(void *context)
{
    uc.context_free(context);
}

void soft_close(struct soft *soft)
{
    if (soft->own->uc)
        uc.close(soft->own->uc);
    if (soft->own->stack)
        munmap(soft->own->stack, SOFT_STACK);
    free(soft->own->seen.places);
    free(soft->own->pieces);
    free(soft->own->debug.breakpoints.places);
    free(soft->own->debug.watches);
    free(soft);
}

static int soft_make_stack(struct soft *soft)
{
    char *stack = mmap(NULL, SOFT_STACK, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED)
        return -1;
    soft->own->stack = stack;
    return mprotect(stack, SOFT_GUARD, PROT_NONE);
}

static void soft_enter_stack(struct soft *soft)
{
    ucontext_t here;

    getcontext(&soft->own->start);
    soft->own->start.uc_stack.ss_sp = soft->own->stack + SOFT_GUARD;
    soft->own->start.uc_stack.ss_size = SOFT_STACK - SOFT_GUARD;
    soft->own->start.uc_link = NULL;
    makecontext(&soft->own->start, (void (*)(void))soft_stack, 2, (unsigned)(uintptr_t)soft,
                (unsigned)((uintptr_t)soft >> 16 >> 16));
    if (!_setjmp(soft->own->outer))
        swapcontext(&here, &soft->own->start);
}

int soft_try_memory(void)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS, error = 0;
    void *code = mmap(NULL, SOFT_TRANSLATOR, PROT_READ | PROT_WRITE | PROT_EXEC, flags, -1, 0);
    if (code == MAP_FAILED)
        return errno;
    void *data = mmap(NULL, SOFT_MARGIN, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED)
        error = errno;
    else
        munmap(data, SOFT_MARGIN);
    munmap(code, SOFT_TRANSLATOR);
    return error;
}

struct soft *soft_open(int arch, int mode, int pc, int *error)
{
    struct {
        struct soft soft;
        struct soft_private own;
    } *both = calloc(1, sizeof *both);

    *error = both ? -soft_try_memory() : UC_ERR_NOMEM;
    if (*error) {
        free(both);
        return NULL;
    }
    *error = UC_ERR_NOMEM;
    struct soft *soft = &both->soft;
    soft->own = &both->own;
    soft->own->pc = pc;
    if (soft_make_stack(soft))
        goto failed;
    *error = uc.open(arch, mode, &soft->own->uc);
    if (!*error) /* no address ends an emulation */
        *error = uc.ctl(soft->own->uc, UC_CTL_WRITE_1(UC_CTL_UC_USE_EXITS), 1);
    if (!*error)
        *error = soft_hook_all(soft, UC_HOOK_INTR, soft_on_intr);
    if (!*error)
        *error = soft_hook_all(soft, UC_HOOK_INSN_INVALID, soft_on_invalid);
    if (*error)
        goto failed;
    soft_enter_stack(soft);
    return soft;
failed:
    soft_close(soft);
    return NULL;
}

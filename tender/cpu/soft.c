/*
 * A CPU in software for Python: the Unicorn emulator, whose library is found at run time.
 *
 * The emulator answers by calling back, from the middle of the guest's code; a vCPU of the tender
 * answers by returning from run(). So the emulator runs on a stack of its own: a callback leaves it
 * there, in the middle of an instruction, and the next soft_run() lets it go on. That costs two
 * jumps instead of ending and starting an emulation.
 *
 * Nothing of Unicorn is compiled in: the types below say what its functions look like (source:
 * the Unicorn's public interface, version 2.1), and only this file knows them.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#undef _FORTIFY_SOURCE /* the fortified longjmp() refuses to change stacks */
#include <dlfcn.h>
#include <errno.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "soft.h"
#include "tender/host/ticks.h"

#define SOFT_STACK (1u << 20)
#define SOFT_GUARD 4096u
#define SOFT_PAGE 4096u
#define SOFT_BLOCK_MAX 8192u /* 512 instructions of 15 bytes */
#define SOFT_INSN_MAX 15
#define SOFT_TRANSLATOR (1u << 30) /* what Unicorn maps for translated code ... */
#define SOFT_MARGIN (64u << 20)    /* ... and more than it needs beside it */
#define SOFT_WATCHED_MAX (1u << 17) /* addresses; each costs 400 bytes */
#define SOFT_RANDOM 256             /* bytes: getrandom(2) gives as many without an interruption */

/* uc_hook_type, uc_control_type, uc_prot */
#define UC_HOOK_INTR (1 << 0)
#define UC_HOOK_INSN (1 << 1)
#define UC_HOOK_CODE (1 << 2)
#define UC_HOOK_MEM_UNMAPPED (0x7 << 4) /* read, write, fetch */
#define UC_HOOK_MEM_WRITE_PROT (1 << 8)
#define UC_HOOK_MEM_READ (1 << 10)
#define UC_HOOK_MEM_WRITE (1 << 11)
#define UC_HOOK_INSN_INVALID (1 << 14)
#define UC_HOOK_EDGE_GENERATED (1 << 15)
#define UC_CTL_WRITE_0(type) ((1 << 30) | (type))
#define UC_CTL_WRITE_1(type) ((1 << 30) | (1 << 26) | (type))
#define UC_CTL_WRITE_2(type) ((1 << 30) | (2 << 26) | (type))
#define UC_CTL_UC_USE_EXITS 4
#define UC_CTL_TB_REMOVE_CACHE 9
#define UC_CTL_TB_FLUSH 10
#define UC_PROT_WRITE 2
#define UC_ERR_NOMEM 1
#define UC_MEM_WRITE 17

struct uc_tb { /* a block of code that the emulator has translated */
    uint64_t pc;
    uint16_t icount;
    uint16_t size;
};

struct soft_piece { /* of guest memory, as the emulator has it */
    uint64_t start, end;
    const char *host;
};

struct soft_set { /* of addresses: an open hash table, where 0 is a free place */
    uint64_t *places;
    size_t room, count; /* 0 is not counted */
    bool has_zero;
};

struct soft_debugging { /* what a debugger has set */
    bool on, before, step;
    bool passing;       /* the next instruction does not stop the guest */
    bool forget;        /* translated code is to be thrown away */
    uint64_t last;      /* the last instruction that was begun */
    uint32_t hit;       /* enum soft_debug_kind: an access that was watched, or 0 */
    uint64_t hit_at;
    struct soft_set breakpoints;
    struct soft_watch *watches;
    size_t watch_count;
};

struct soft_private {
    void *uc;
    struct soft_piece *pieces; /* by address */
    size_t piece_room, piece_count;
    int pc;                                /* the register's number */
    _Atomic int kicked;                    /* to be reported to the caller */
    _Atomic int stopping;                  /* the emulator was told to stop */
    bool stale;                            /* translated code is to be forgotten */
    struct uc_tb suspect;                  /* a block to translate again, with more hooks; size 0 */
    struct soft_set seen;                  /* addresses with such hooks */
    bool watch;
    uint64_t random[SOFT_RANDOM / 8]; /* from the host, the first `random_left` of them unused */
    unsigned random_left;
    struct soft_debugging debug;
    char *stack;
    jmp_buf outer, inner;
    ucontext_t start;
};

_Static_assert(sizeof(struct soft) == 88, "struct soft");
_Static_assert(offsetof(struct soft, clock) == 64, "struct soft");
_Static_assert(sizeof(struct soft_clock) == 48, "struct soft_clock");
_Static_assert(sizeof(struct uc_x86_mmr) == 24, "struct uc_x86_mmr");
_Static_assert(sizeof(struct uc_x86_msr) == 16, "struct uc_x86_msr");
_Static_assert(sizeof(struct uc_arm64_cp_reg) == 32, "struct uc_arm64_cp_reg");

static struct {
    unsigned (*version)(unsigned *, unsigned *);
    int (*open)(int, int, void **);
    int (*close)(void *);
    const char *(*strerror)(int);
    int (*emu_start)(void *, uint64_t, uint64_t, uint64_t, size_t);
    int (*emu_stop)(void *);
    int (*mem_map_ptr)(void *, uint64_t, uint64_t, uint32_t, void *);
    int (*mem_protect)(void *, uint64_t, uint64_t, uint32_t);
    int (*reg_read)(void *, int, void *);
    int (*reg_write)(void *, int, const void *);
    int (*hook_add)(void *, size_t *, int, void *, void *, uint64_t, uint64_t, ...);
    int (*ctl)(void *, unsigned, ...);
    size_t (*context_size)(void *);
    int (*context_alloc)(void *, void **);
    int (*context_save)(void *, void *);
    int (*context_restore)(void *, void *);
    int (*context_free)(void *);
} uc;

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

static void soft_leave(struct soft *soft, int kind)
{
    soft->kind = kind;
    if (!_setjmp(soft->own->inner))
        _longjmp(soft->own->outer, 1);
}

static void soft_suspect_first(struct soft *soft, uint64_t pc);
static int soft_hook_suspects(struct soft *soft);
static void soft_debug_before(struct soft *soft, uint64_t pc);

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

/* Callbacks of the emulator. */

static void soft_on_out(void *emulator, uint32_t port, int size, uint32_t value, void *data)
{
    struct soft *soft = data;
    (void)emulator;
    soft->number = port;
    soft->size = (uint32_t)size;
    soft->value = value;
    soft_leave(soft, SOFT_OUT);
    if (soft->own->stale) {
        soft->again = true;
        uc.emu_stop(emulator);
    }
}

void soft_forget_code(struct soft *soft)
{
    soft->own->stale = true;
}

static uint32_t soft_on_in(void *emulator, uint32_t port, int size, void *data)
{
    struct soft *soft = data;
    (void)emulator;
    soft->number = port;
    soft->size = (uint32_t)size;
    soft->reply = 0;
    soft_leave(soft, SOFT_IN);
    return (uint32_t)soft->reply;
}

static void soft_on_intr(void *emulator, uint32_t number, void *data)
{
    struct soft *soft = data;
    soft->number = number;
    soft_leave(soft, SOFT_INTR);
    if (soft->again)
        uc.emu_stop(emulator);
}

static bool soft_on_invalid(void *emulator, void *data)
{
    (void)emulator;
    soft_leave(data, SOFT_INVALID);
    return true; /* who runs on has made an exception of it */
}

static bool soft_on_memory(void *emulator, int type, uint64_t address, int size, int64_t value,
                           void *data)
{
    struct soft *soft = data;
    (void)emulator;
    soft->number = (uint32_t)type;
    soft->address = address;
    soft->size = (uint32_t)size;
    soft->value = (uint64_t)value;
    soft->is_write = type == UC_MEM_WRITE_UNMAPPED || type == UC_MEM_WRITE_PROT;
    soft_leave(soft, SOFT_MEMORY);
    return false;
}

static void soft_on_count(void *emulator, uint64_t address, uint32_t size, void *data)
{
    struct soft *soft = data;
    (void)emulator;
    (void)address;
    (void)size;
    if (!soft->instructions)
        soft_leave(soft, SOFT_LIMIT);
    else
        soft->instructions--;
}

/* RDTSC and RDTSCP are answered here: a guest reads its clock more often than anything else. */
#define SOFT_REG_RAX 35
#define SOFT_REG_RCX 38
#define SOFT_REG_RDX 40
#define SOFT_REG_MSR 248
#define SOFT_TSC_AUX 0xc0000103

static int soft_on_rdtsc(void *emulator, void *data)
{
    struct soft *soft = data;
    uint64_t counter = soft_counter(soft->clock);
    uint64_t low = (uint32_t)counter, high = counter >> 32;

    uc.reg_write(emulator, SOFT_REG_RAX, &low);
    uc.reg_write(emulator, SOFT_REG_RDX, &high);
    return 1;
}

static int soft_on_rdtscp(void *emulator, void *data)
{
    struct uc_x86_msr aux = {.rid = SOFT_TSC_AUX};

    uc.reg_read(emulator, SOFT_REG_MSR, &aux);
    uc.reg_write(emulator, SOFT_REG_RCX, &aux.value);
    return soft_on_rdtsc(emulator, data);
}

/* MRS of a counter (CNTPCT_EL0, CNTVCT_EL0) likewise. */
static uint32_t soft_on_mrs(void *emulator, int to, const struct uc_arm64_cp_reg *from, void *data)
{
    struct soft *soft = data;
    bool timer = from->op0 == 3 && from->op1 == 3 && from->crn == 14 && from->crm == 0;

    if (!timer || (from->op2 != 1 && from->op2 != 2))
        return 0;
    uint64_t counter = soft_counter(soft->clock);
    uc.reg_write(emulator, to, &counter);
    return 1;
}

static int soft_on_insn(void *emulator, void *data)
{
    struct soft_insn *insn = data;
    (void)emulator;
    insn->soft->number = insn->number;
    insn->soft->reply = 0;
    soft_leave(insn->soft, SOFT_INSN);
    return (int)insn->soft->reply;
}

static uint64_t *soft_place(const struct soft_set *set, uint64_t address)
{
    size_t i = address * 0x9e3779b97f4a7c15 >> 32 & (set->room - 1);
    while (set->places[i] && set->places[i] != address)
        i = (i + 1) & (set->room - 1);
    return &set->places[i];
}

static bool soft_set_has(const struct soft_set *set, uint64_t address)
{
    return address ? set->count && *soft_place(set, address) : set->has_zero;
}

static bool soft_set_grow(struct soft_set *set)
{
    const struct soft_set old = *set;
    set->room = old.room ? old.room * 2 : 256;
    set->places = calloc(set->room, sizeof *set->places);
    if (!set->places) {
        *set = old;
        return false;
    }
    for (size_t i = 0; i < old.room; i++)
        if (old.places[i])
            *soft_place(set, old.places[i]) = old.places[i];
    free(old.places);
    return true;
}

/* Add an address that is not in it; false: no memory. */
static bool soft_set_add(struct soft_set *set, uint64_t address)
{
    if (!address)
        return set->has_zero = true;
    if (set->count * 2 >= set->room && !soft_set_grow(set))
        return false;
    *soft_place(set, address) = address;
    set->count++;
    return true;
}

/* Making one. Each of these gives a uc_err, 0 for success. */

static int soft_hook(struct soft *soft, int type, void *function, void *data, uint64_t from,
                     uint64_t to, int insn)
{
    size_t handle;
    return uc.hook_add(soft->own->uc, &handle, type, function, data, from, to, insn);
}

static int soft_hook_all(struct soft *soft, int type, void *function)
{
    return soft_hook(soft, type, function, soft, 1, 0, 0);
}

int soft_hook_insn(struct soft *soft, struct soft_insn *insn, int number)
{
    insn->soft = soft;
    insn->number = (uint32_t)number;
    return soft_hook(soft, UC_HOOK_INSN, soft_on_insn, insn, 1, 0, number);
}

/*
 * Instructions of x86_64 that the emulator must not do by itself, and has no hook for:
 * - RDMSR and WRMSR: it makes up MSRs that it does not have;
 * - RDRAND and RDSEED: it opens /dev/urandom;
 * - AVX instructions on XMM registers: it takes them for SSE ones with two operands.
 * So each block of code is looked at once, when it has been translated: where one of these may
 * start, a hook is put, and the block is translated again before it has run. The hook is reached
 * only if an instruction does start there.
 */
static bool soft_is_prefix(uint8_t byte)
{
    return byte == 0x66 || byte == 0x67 || byte == 0xf0 || byte == 0xf2 || byte == 0xf3 ||
           byte == 0x2e || byte == 0x36 || byte == 0x3e || byte == 0x26 || byte == 0x64 ||
           byte == 0x65 || (byte & 0xf0) == 0x40;
}

static unsigned soft_skip_prefixes(const uint8_t *at, unsigned left)
{
    unsigned count = 0;
    while (count < left && count < SOFT_INSN_MAX - 1 && soft_is_prefix(at[count]))
        count++;
    return count;
}

static bool soft_is_watched(const uint8_t *at, unsigned left)
{
    unsigned prefixes = soft_skip_prefixes(at, left);
    at += prefixes;
    left -= prefixes;
    if (left < 2)
        return false;
    if (at[0] == 0x0f)
        return at[1] == 0x30 || at[1] == 0x32 || (left > 2 && at[1] == 0xc7 && at[2] >= 0xf0);
    /* The two-byte prefix always, the three-byte one with opcodes of map 1; others are no AVX
     * (BMI) or are refused by the emulator. */
    return at[0] == 0xc5 || (at[0] == 0xc4 && (at[1] & 0x1f) == 1);
}

#define SOFT_REG_CR3 53
#define SOFT_ADDRESS_BITS 0x000ffffffffff000u
#define SOFT_PRESENT 1u
#define SOFT_LARGE 0x80u

/* Copy from guest memory, from one piece of it; false: it is not there. */
static bool soft_read_memory(struct soft *soft, uint64_t gpa, void *to, size_t size)
{
    size_t low = 0, high = soft->own->piece_count;

    while (low < high) { /* the first piece that ends behind `gpa` */
        size_t middle = low + (high - low) / 2;
        if (soft->own->pieces[middle].end <= gpa)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == soft->own->piece_count)
        return false;
    const struct soft_piece *piece = &soft->own->pieces[low];
    if (gpa < piece->start || piece->end - gpa < size)
        return false;
    memcpy(to, piece->host + (gpa - piece->start), size);
    return true;
}

/* The GPA behind an address by the page tables at `entry` (SDM volume 3, figure 4-8). */
static bool soft_translate(struct soft *soft, uint64_t entry, uint64_t address, uint64_t *gpa)
{
    for (int shift = 39; shift >= 12; shift -= 9) {
        uint64_t at = (entry & SOFT_ADDRESS_BITS) + (address >> shift & 0x1ff) * 8;
        uint64_t inside = (UINT64_C(1) << shift) - 1;
        if (!soft_read_memory(soft, at, &entry, sizeof entry) || !(entry & SOFT_PRESENT))
            return false;
        if (shift == 12 || (shift < 39 && entry & SOFT_LARGE)) {
            *gpa = (entry & SOFT_ADDRESS_BITS & ~inside) | (address & inside);
            return true;
        }
    }
    return false;
}

/* How many of these bytes of code there are. */
static unsigned soft_read_code(struct soft *soft, uint64_t address, uint8_t *code, unsigned size)
{
    unsigned done = 0;
    uint64_t tables = 0;

    uc.reg_read(soft->own->uc, SOFT_REG_CR3, &tables);
    while (done < size) {
        uint64_t at = address + done, gpa;
        unsigned count = SOFT_PAGE - at % SOFT_PAGE;
        if (count > size - done)
            count = size - done;
        if (!soft_translate(soft, tables, at, &gpa) ||
            !soft_read_memory(soft, gpa, code + done, count))
            break;
        done += count;
    }
    return done;
}

static void soft_on_block(void *emulator, struct uc_tb *block, struct uc_tb *before, void *data)
{
    struct soft *soft = data;
    uint8_t code[SOFT_BLOCK_MAX];
    (void)before;
    if (block->size > sizeof code)
        return;
    unsigned size = soft_read_code(soft, block->pc, code, block->size);
    for (unsigned i = 0; i < size; i++)
        if (soft_is_watched(code + i, size - i) && !soft_set_has(&soft->own->seen, block->pc + i)) {
            soft->own->suspect = *block;
            uc.emu_stop(emulator);
            return;
        }
}

/* The first block of an emulation is not reported; it ends in this page or a little behind. */
static void soft_suspect_first(struct soft *soft, uint64_t pc)
{
    soft->own->suspect.pc = pc;
    soft->own->suspect.size = (uint16_t)(SOFT_PAGE - pc % SOFT_PAGE + SOFT_INSN_MAX - 1);
}

static uint64_t soft_random(struct soft *soft)
{
    uint64_t value;

    if (soft->clock->tick_ns) { /* splitmix64 */
        value = soft->clock->random += 0x9e3779b97f4a7c15;
        value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
        value = (value ^ value >> 27) * 0x94d049bb133111eb;
        return value ^ value >> 31;
    }
    if (!soft->own->random_left) {
        /* Not by the C library, which may map memory of its own for it. */
        if (syscall(SYS_getrandom, soft->own->random, SOFT_RANDOM, 0) != SOFT_RANDOM)
            abort();
        soft->own->random_left = SOFT_RANDOM / 8;
    }
    value = soft->own->random[--soft->own->random_left];
    soft->own->random[soft->own->random_left] = 0;
    return value;
}

#define SOFT_REG_RIP 41
#define SOFT_REG_RFLAGS 253
#define SOFT_ARITHMETIC_FLAGS 0x8d5u
#define SOFT_CF 1u

/* RDRAND or RDSEED at `address`; false: it is another instruction. */
static bool soft_do_random(struct soft *soft, uint64_t address)
{
    static const int registers[] = {35, 38, 40, 37, 44, 36, 43, 39, 106, 107, 108, 109, 110, 111,
                                    112, 113};
    uint8_t code[SOFT_INSN_MAX];
    unsigned size = soft_read_code(soft, address, code, sizeof code);
    unsigned at = soft_skip_prefixes(code, size);
    bool word = false;

    if (size - at < 3 || code[at] != 0x0f || code[at + 1] != 0xc7 || code[at + 2] < 0xf0)
        return false;
    for (unsigned i = 0; i < at; i++) {
        if (code[i] == 0xf0 || code[i] == 0xf2 || code[i] == 0xf3)
            return false; /* without a meaning: the emulator raises #UD */
        word = word || code[i] == 0x66;
    }
    uint8_t rex = at && (code[at - 1] & 0xf0) == 0x40 ? code[at - 1] : 0;
    int number = registers[(code[at + 2] & 7) | (rex & 1) << 3];
    uint64_t value = soft_random(soft), flags = 0, rip = address + at + 3;
    if (!(rex & 8)) {
        uint64_t before = 0;
        uc.reg_read(soft->own->uc, number, &before);
        value = word ? (before & ~UINT64_C(0xffff)) | (value & 0xffff) : (uint32_t)value;
    }
    uc.reg_write(soft->own->uc, number, &value);
    uc.reg_read(soft->own->uc, SOFT_REG_RFLAGS, &flags);
    flags = (flags & ~(uint64_t)SOFT_ARITHMETIC_FLAGS) | SOFT_CF;
    uc.reg_write(soft->own->uc, SOFT_REG_RFLAGS, &flags);
    uc.reg_write(soft->own->uc, SOFT_REG_RIP, &rip);
    return true;
}

static void soft_on_watched(void *emulator, uint64_t address, uint32_t size, void *data)
{
    struct soft *soft = data;
    (void)emulator;
    if (soft_do_random(soft, address))
        return;
    soft->address = address;
    soft->size = size;
    soft_leave(soft, SOFT_CODE);
}

static int soft_hook_suspects(struct soft *soft)
{
    struct uc_tb block = soft->own->suspect;
    uint8_t code[SOFT_BLOCK_MAX];
    unsigned size = soft_read_code(soft, block.pc, code, block.size);
    int error = 0;

    soft->own->suspect.size = 0;
    for (unsigned i = 0; i < size && !error; i++) {
        uint64_t at = block.pc + i;
        if (!soft_is_watched(code + i, size - i) || soft_set_has(&soft->own->seen, at))
            continue;
        if (soft->own->seen.count == SOFT_WATCHED_MAX || !soft_set_add(&soft->own->seen, at))
            return UC_ERR_NOMEM;
        error = soft_hook(soft, UC_HOOK_CODE, soft_on_watched, soft, at, at, 0);
    }
    uc.ctl(soft->own->uc, UC_CTL_WRITE_2(UC_CTL_TB_REMOVE_CACHE), block.pc, block.pc + block.size);
    return error;
}

int soft_watch_x86(struct soft *soft)
{
    soft->own->watch = true;
    return soft_hook_all(soft, UC_HOOK_EDGE_GENERATED, soft_on_block);
}

int soft_count(struct soft *soft, uint64_t instructions)
{
    soft->instructions = instructions;
    return soft_hook_all(soft, UC_HOOK_CODE, soft_on_count);
}

int soft_hook_x86(struct soft *soft, int out, int in, int rdtsc, int rdtscp)
{
    int error = soft_hook(soft, UC_HOOK_INSN, soft_on_out, soft, 1, 0, out);
    if (!error)
        error = soft_hook(soft, UC_HOOK_INSN, soft_on_in, soft, 1, 0, in);
    if (!error)
        error = soft_hook(soft, UC_HOOK_INSN, soft_on_rdtsc, soft, 1, 0, rdtsc);
    if (!error)
        error = soft_hook(soft, UC_HOOK_INSN, soft_on_rdtscp, soft, 1, 0, rdtscp);
    return error;
}

int soft_hook_arm64(struct soft *soft, int mrs)
{
    return soft_hook(soft, UC_HOOK_INSN, soft_on_mrs, soft, 1, 0, mrs);
}

/*
 * Debugging: a hook on every instruction, and one on every access, in place of hooks where there is
 * something to stop at. An emulation can take those only between two runs of it, with its translated
 * code thrown away, and this one is usually in the middle of an instruction.
 */
static void soft_debug_leave(struct soft *soft, uint32_t why, uint64_t address)
{
    soft->number = why;
    soft->address = address;
    soft_leave(soft, SOFT_DEBUG);
}

/* Before an instruction. */
static void soft_on_debug(void *emulator, uint64_t address, uint32_t size, void *data)
{
    struct soft *soft = data;
    struct soft_debugging *debug = &soft->own->debug;
    (void)size;
    if (soft->own->stopping)
        return; /* it is not executed now */
    if (!debug->passing && debug->hit) {
        uint32_t why = debug->hit;
        debug->hit = 0;
        soft_debug_leave(soft, why, debug->hit_at);
    } else if (!debug->passing && soft_set_has(&debug->breakpoints, address)) {
        soft_debug_leave(soft, SOFT_BREAKPOINT, address);
    } else if (!debug->passing && debug->step) {
        soft_debug_leave(soft, SOFT_STEP, address);
    }
    debug->passing = false;
    debug->last = address;
    if (debug->forget) { /* it is begun again, by another emulation */
        soft->again = true;
        uc.emu_stop(emulator);
    }
}

static void soft_on_access(void *emulator, int type, uint64_t address, int size, int64_t value,
                           void *data)
{
    struct soft *soft = data;
    struct soft_debugging *debug = &soft->own->debug;
    const bool write = type == UC_MEM_WRITE;
    (void)emulator;
    (void)value;
    for (size_t i = 0; i < debug->watch_count && !debug->hit; i++) {
        const struct soft_watch *watch = &debug->watches[i];
        if (address >= watch->start + watch->size || address + (uint64_t)size <= watch->start)
            continue;
        if (write ? watch->write : watch->read) {
            debug->hit = write ? SOFT_WRITE : SOFT_READ;
            debug->hit_at = address > watch->start ? address : watch->start;
        }
    }
    if (debug->hit && debug->before) {
        uint32_t why = debug->hit;
        soft_debug_leave(soft, why, debug->hit_at);
        debug->hit = 0;
    }
}

/* Before an emulation that begins at `pc`. */
static void soft_debug_before(struct soft *soft, uint64_t pc)
{
    struct soft_debugging *debug = &soft->own->debug;
    if (!debug->on)
        return;
    /* The last one stopped when the instruction was begun, and not yet executed. */
    debug->passing = debug->passing || pc == debug->last;
    if (debug->forget)
        uc.ctl(soft->own->uc, UC_CTL_WRITE_0(UC_CTL_TB_FLUSH));
    debug->forget = false;
}

int soft_debug(struct soft *soft, bool before)
{
    soft->own->debug.on = true;
    soft->own->debug.before = before;
    int error = soft_hook_all(soft, UC_HOOK_CODE, soft_on_debug);
    return error ? error : soft_hook_all(soft, UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE, soft_on_access);
}

int soft_set_debug(struct soft *soft, const uint64_t *breaks, size_t breaks_count,
                   const struct soft_watch *watches, size_t watch_count, bool step)
{
    struct soft_debugging *debug = &soft->own->debug;
    struct soft_watch *copy = calloc(watch_count + 1, sizeof *copy);
    struct soft_set breakpoints = {0};
    bool made = copy != NULL;
    for (size_t i = 0; i < breaks_count && made; i++)
        made = soft_set_has(&breakpoints, breaks[i]) || soft_set_add(&breakpoints, breaks[i]);
    if (!made) {
        free(breakpoints.places);
        free(copy);
        return UC_ERR_NOMEM;
    }
    free(debug->breakpoints.places);
    debug->breakpoints = breakpoints;
    memcpy(copy, watches, watch_count * sizeof *copy);
    free(debug->watches);
    debug->watches = copy;
    debug->watch_count = watch_count;
    debug->step = step;
    debug->passing = soft->kind != SOFT_DEBUG;
    return 0;
}

void soft_debug_forget_code(struct soft *soft)
{
    soft->own->debug.forget = true;
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

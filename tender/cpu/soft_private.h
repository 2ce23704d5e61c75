/*
 * What the C files of the software CPU share: the emulator's functions, and a CPU's own state.
 *
 * Nothing of Unicorn is compiled in: the types below say what its functions look like (source: its
 * public interface, version 2.1).
 */
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include "soft.h"

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

#define SOFT_RANDOM 256 /* bytes: getrandom(2) gives as many without an interruption */

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

/* The emulator's library, once soft_load() has found it. */
struct soft_library {
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
};
extern struct soft_library uc;

/* Leave the emulator, from the middle of a callback: soft_run() returns `kind`, and the next one comes
 * back here. */
void soft_leave(struct soft *soft, int kind);

/* Each of these gives a uc_err, 0 for success. */
int soft_hook(struct soft *soft, int type, void *function, void *data, uint64_t from, uint64_t to,
              int insn);
int soft_hook_all(struct soft *soft, int type, void *function);

/* soft_hooks.c: an exception or interrupt, and an instruction that the emulator does not know. */
void soft_on_intr(void *emulator, uint32_t number, void *data);
bool soft_on_invalid(void *emulator, void *data);
bool soft_on_memory(void *emulator, int type, uint64_t address, int size, int64_t value, void *data);

bool soft_set_has(const struct soft_set *set, uint64_t address);
/* Add an address that is not in it; false: no memory. */
bool soft_set_add(struct soft_set *set, uint64_t address);

/* soft_watch.c: the first block of an emulation is not reported; it ends in this page or a little
 * behind. */
void soft_suspect_first(struct soft *soft, uint64_t pc);
/* Hook what is to be watched in the block that was noted, and have it translated again. */
int soft_hook_suspects(struct soft *soft);

/* soft_debug.c: before an emulation that begins at `pc`. */
void soft_debug_before(struct soft *soft, uint64_t pc);

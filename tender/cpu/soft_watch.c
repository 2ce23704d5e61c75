/*
 * Instructions of x86_64 that the emulator must not do by itself, and has no hook for:
 * - RDMSR and WRMSR: it makes up MSRs that it does not have;
 * - RDRAND and RDSEED: it opens /dev/urandom;
 * - AVX instructions on XMM registers: it takes them for SSE ones with two operands.
 * So each block of code is looked at once, when it has been translated: where one of these may
 * start, a hook is put, and the block is translated again before it has run. The hook is reached
 * only if an instruction does start there.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "soft_private.h"

#define SOFT_PAGE 4096u
#define SOFT_BLOCK_MAX 8192u /* 512 instructions of 15 bytes */
#define SOFT_INSN_MAX 15
#define SOFT_WATCHED_MAX (1u << 17) /* addresses; each costs 400 bytes */

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

void soft_suspect_first(struct soft *soft, uint64_t pc)
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

int soft_hook_suspects(struct soft *soft)
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

/*
 * Debugging: a hook on every instruction, and one on every access, in place of hooks where there is
 * something to stop at. An emulation can take those only between two runs of it, with its translated
 * code thrown away, and this one is usually in the middle of an instruction.
 */
#include <stdlib.h>
#include <string.h>

#include "soft_private.h"

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
        if (address - watch->start >= watch->size && watch->start - address >= (uint64_t)size)
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

void soft_debug_before(struct soft *soft, uint64_t pc)
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

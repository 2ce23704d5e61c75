/*
 * Thread-local storage, the x86_64 way: variables lie below the thread pointer, and the word it
 * points at is the thread pointer itself. The rule: the layout is the linker's; each address here
 * is computed from the ends and the alignment it gave.
 */
#include "runtime.h"

#include <string.h>

#define MSR_FS_BASE 0xc0000100

static uintptr_t align_up(uintptr_t value, uintptr_t to)
{
    return (value + to - 1) / to * to;
}

static uintptr_t alignment(void)
{
    uintptr_t least = sizeof(uintptr_t), linked = (uintptr_t)hvt_tls_align;
    return linked > least ? linked : least;
}

static size_t variables_size(void)
{
    return align_up((uintptr_t)hvt_tls_memory_size, alignment());
}

/* Any address will do as a block, so there is room to align it. */
size_t solo5_tls_size(void)
{
    return alignment() - 1 + variables_size() + sizeof(uintptr_t);
}

uintptr_t solo5_tls_tp_offset(uintptr_t tls)
{
    return align_up(tls, alignment()) + variables_size();
}

solo5_result_t solo5_tls_init(uintptr_t tls)
{
    size_t initialised = (size_t)(hvt_tdata_end - hvt_tdata_start);
    uintptr_t thread_pointer = solo5_tls_tp_offset(tls);
    char *variables = (char *)thread_pointer - variables_size();

    memcpy(variables, hvt_tdata_start, initialised);
    memset(variables + initialised, 0, variables_size() - initialised);
    *(uintptr_t *)thread_pointer = thread_pointer;
    return SOLO5_R_OK;
}

solo5_result_t solo5_set_tls_base(uintptr_t base)
{
    if ((int64_t)(base << 16) >> 16 != (int64_t)base) /* not canonical: the CPU would fault */
        return SOLO5_R_EINVAL;
    cpu_write_msr(MSR_FS_BASE, base);
    return SOLO5_R_OK;
}

/*
 * Thread-local storage: the variables of one thread lie beside what its thread pointer points at,
 * below it or above it as the architecture has it. The rule: the layout is the linker's; each
 * address here is computed from the ends and the alignment it gave.
 */
#include "runtime.h"

#include <string.h>

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

/* What the architecture keeps at the thread pointer itself. */
static size_t head_size(void)
{
    return align_up(CPU_TLS_HEAD, alignment());
}

/* Any address will do as a block, so there is room to align it. */
size_t solo5_tls_size(void)
{
    return alignment() - 1 + variables_size() + head_size();
}

uintptr_t solo5_tls_tp_offset(uintptr_t tls)
{
    return align_up(tls, alignment()) + (CPU_TLS_IS_ABOVE ? 0 : variables_size());
}

solo5_result_t solo5_tls_init(uintptr_t tls)
{
    size_t initialised = (size_t)(hvt_tdata_end - hvt_tdata_start);
    uintptr_t thread_pointer = solo5_tls_tp_offset(tls);
    char *variables = (char *)align_up(tls, alignment()) + (CPU_TLS_IS_ABOVE ? head_size() : 0);

    memcpy(variables, hvt_tdata_start, initialised);
    memset(variables + initialised, 0, variables_size() - initialised);
    *(uintptr_t *)thread_pointer = thread_pointer;
    return SOLO5_R_OK;
}

solo5_result_t solo5_set_tls_base(uintptr_t base)
{
    if ((int64_t)(base << 16) >> 16 != (int64_t)base) /* no address: an x86 CPU would fault */
        return SOLO5_R_EINVAL;
    cpu_set_thread_pointer(base);
    return SOLO5_R_OK;
}

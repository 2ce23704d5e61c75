/*
 * What the runtime needs by name in an spt guest, which is code of a Linux process.
 * The rule: in the place of a hypercall is what its tender would do: calls.c.
 */
#ifndef PTENDER_CPU_H
#define PTENDER_CPU_H

#include <stdint.h>

#define BINDINGS_TARGET ABI_TARGET_SPT
#define BINDINGS_ABI_VERSION SPT_ABI_VERSION
#define BINDINGS_TARGET_NAME "spt"

/* The hypercall `number` of abi/hvt.h, with its block. */
void hvt_spt_call(uint32_t number, void *block);

static inline void cpu_hypercall(uint32_t number, void *block)
{
    hvt_spt_call(number, block);
}

static inline void cpu_ring_kick(void) /* there is no ring */
{
}

static inline void cpu_relax(void)
{
    __asm__ volatile("pause" : : : "memory");
}

/* The host's monotonic clock, in nanoseconds: what the frequency of the counter is, nobody says. */
uint64_t cpu_cycles(void);

/* Thread-local variables lie below the thread pointer, FS base; it points at its own value. */
enum { CPU_TLS_IS_ABOVE = 0, CPU_TLS_HEAD = 8 };

void cpu_set_thread_pointer(uint64_t value);

#endif

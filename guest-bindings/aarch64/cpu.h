/*
 * The instructions of aarch64 that the runtime needs by name.
 * The rule: one function, one instruction; what they mean together is in the .c files.
 */
#ifndef PTENDER_CPU_H
#define PTENDER_CPU_H

#include <stdint.h>

#include "abi.h"

#define BINDINGS_TARGET ABI_TARGET_HVT
#define BINDINGS_ABI_VERSION HVT_ABI_VERSION
#define BINDINGS_TARGET_NAME "hvt"

/*
 * The tender reads and writes the block, and what it points at: hence the clobber of memory.
 * A plain store without writeback is what a hypervisor can decode.
 */
static inline void cpu_hypercall(uint32_t number, void *block)
{
    uint64_t door = HVT_HYPERCALL_MMIO_BASE + ((uint64_t)number << 3);
    uint32_t gpa = (uint32_t)(uintptr_t)block; /* guest memory ends at 4 GiB at most */
    __asm__ volatile("str %w0, [%1]" : : "rZ"(gpa), "r"(door) : "memory");
}

static inline void cpu_ring_kick(void)
{
    uint64_t door = HVT_HYPERCALL_MMIO_BASE + HVT_RING_KICK_MMIO_OFFSET;
    __asm__ volatile("str wzr, [%0]" : : "r"(door) : "memory");
}

/* In a loop that waits for somebody else. */
static inline void cpu_relax(void)
{
    __asm__ volatile("yield" : : : "memory");
}

/* The counter may be read early, while older instructions are under way, but for the ISB. */
static inline uint64_t cpu_cycles(void)
{
    uint64_t value;
    __asm__ volatile("isb\n\tmrs %0, cntvct_el0" : "=r"(value) : : "memory");
    return value;
}

/* Thread-local variables lie above the thread pointer, which points at two words of its own. */
enum { CPU_TLS_IS_ABOVE = 1, CPU_TLS_HEAD = 16 };

static inline void cpu_set_thread_pointer(uint64_t value)
{
    __asm__ volatile("msr tpidr_el0, %0" : : "r"(value) : "memory");
}

static inline void cpu_set_vectors(const void *table)
{
    __asm__ volatile("msr vbar_el1, %0\n\tisb" : : "r"(table) : "memory");
}

/* What an exception left for its handler. */
static inline uint64_t cpu_read_esr(void)
{
    uint64_t value;
    __asm__ volatile("mrs %0, esr_el1" : "=r"(value));
    return value;
}

static inline uint64_t cpu_read_far(void)
{
    uint64_t value;
    __asm__ volatile("mrs %0, far_el1" : "=r"(value));
    return value;
}

static inline uint64_t cpu_read_elr(void)
{
    uint64_t value;
    __asm__ volatile("mrs %0, elr_el1" : "=r"(value));
    return value;
}

static inline uint64_t cpu_read_spsr(void)
{
    uint64_t value;
    __asm__ volatile("mrs %0, spsr_el1" : "=r"(value));
    return value;
}

#endif

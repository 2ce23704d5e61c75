/*
 * The instructions of x86_64 that the runtime needs by name.
 * The rule: one function, one instruction; what they mean together is in the .c files.
 */
#ifndef PTENDER_CPU_H
#define PTENDER_CPU_H

#include <stdint.h>

#include "abi.h"

#define BINDINGS_TARGET ABI_TARGET_HVT
#define BINDINGS_ABI_VERSION HVT_ABI_VERSION
#define BINDINGS_TARGET_NAME "hvt"

/* The tender reads and writes the block, and what it points at: hence the clobber of memory. */
static inline void cpu_hypercall(uint32_t number, void *block)
{
    uint16_t port = (uint16_t)(HVT_HYPERCALL_PIO_BASE + number);
    uint32_t gpa = (uint32_t)(uintptr_t)block; /* guest memory ends at 4 GiB at most */
    __asm__ volatile("outl %0, %1" : : "a"(gpa), "d"(port) : "memory");
}

static inline void cpu_ring_kick(void)
{
    __asm__ volatile("outl %0, %1" : : "a"(0), "d"((uint16_t)HVT_RING_KICK_PIO) : "memory");
}

/* In a loop that waits for somebody else. */
static inline void cpu_relax(void)
{
    __asm__ volatile("pause" : : : "memory");
}

static inline uint64_t cpu_cycles(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

static inline uint64_t cpu_read_cr2(void)
{
    uint64_t value;
    __asm__ volatile("mov %%cr2, %0" : "=r"(value));
    return value;
}

static inline void cpu_write_msr(uint32_t msr, uint64_t value)
{
    __asm__ volatile("wrmsr"
                     :
                     : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
                     : "memory");
}

/* Thread-local variables lie below the thread pointer, FS base; it points at its own value. */
enum { CPU_TLS_IS_ABOVE = 0, CPU_TLS_HEAD = 8 };

#define MSR_FS_BASE 0xc0000100

static inline void cpu_set_thread_pointer(uint64_t value)
{
    cpu_write_msr(MSR_FS_BASE, value);
}

struct cpu_table { /* what LGDT and LIDT read */
    uint16_t limit;
    uint64_t base;
} __attribute__((packed));

static inline void cpu_load_gdt(const struct cpu_table *table)
{
    __asm__ volatile("lgdt %0" : : "m"(*table) : "memory");
}

static inline void cpu_load_idt(const struct cpu_table *table)
{
    __asm__ volatile("lidt %0" : : "m"(*table) : "memory");
}

static inline void cpu_load_task(uint16_t selector)
{
    __asm__ volatile("ltr %0" : : "r"(selector) : "memory");
}

#endif

/*
 * Hypercalls without the runtime, to make the mistakes that it prevents.
 * The rule: nothing is checked here.
 */
#ifndef RAW_H
#define RAW_H

#include <abi.h>

static inline void raw_out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "d"(port) : "memory");
}

static inline void raw_out16(uint16_t port, uint16_t value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "d"(port) : "memory");
}

static inline void raw_out32(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "d"(port) : "memory");
}

static inline uint32_t raw_in32(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "d"(port) : "memory");
    return value;
}

static inline void raw_hypercall_at(uint32_t number, uint32_t block_gpa)
{
    raw_out32((uint16_t)(HVT_HYPERCALL_PIO_BASE + number), block_gpa);
}

static inline void raw_hypercall(uint32_t number, const void *block)
{
    raw_hypercall_at(number, (uint32_t)(uintptr_t)block);
}

/* Results start as a value that no tender gives, so that one that was never written shows. */
enum { RAW_UNTOUCHED = 0x7f };

static inline int32_t raw_block_io(uint32_t number, uint64_t handle, uint64_t offset, void *data,
                                   uint64_t len)
{
    struct hvt_block_io block = {handle, offset, (uintptr_t)data, len, RAW_UNTOUCHED};
    raw_hypercall(number, &block);
    return block.ret;
}

static inline int32_t raw_net_io(uint32_t number, uint64_t handle, void *data, uint64_t len)
{
    struct hvt_net_io block = {handle, (uintptr_t)data, len, RAW_UNTOUCHED};
    raw_hypercall(number, &block);
    return block.ret;
}

#endif

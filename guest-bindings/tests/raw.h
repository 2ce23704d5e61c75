/*
 * Hypercalls without the runtime, to make the mistakes that it prevents.
 * The rule: nothing is checked here.
 */
#ifndef RAW_H
#define RAW_H

#include <abi.h>

/* Where a hypercall is made: an I/O port on x86_64, an address on aarch64. */
#if defined(__x86_64__)
typedef uint16_t raw_door;

static inline raw_door raw_door_of(uint32_t number)
{
    return (raw_door)(HVT_HYPERCALL_PIO_BASE + number);
}

static inline void raw_write8(raw_door door, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "d"(door) : "memory");
}

static inline void raw_write16(raw_door door, uint16_t value)
{
    __asm__ volatile("outw %0, %1" : : "a"(value), "d"(door) : "memory");
}

static inline void raw_write32(raw_door door, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "d"(door) : "memory");
}

static inline uint32_t raw_read32(raw_door door)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "d"(door) : "memory");
    return value;
}
#elif defined(__aarch64__)
typedef uint64_t raw_door;

static inline raw_door raw_door_of(uint32_t number)
{
    return HVT_HYPERCALL_MMIO_BASE + ((raw_door)number << 3);
}

static inline void raw_write8(raw_door door, uint8_t value)
{
    __asm__ volatile("strb %w0, [%1]" : : "r"(value), "r"(door) : "memory");
}

static inline void raw_write16(raw_door door, uint16_t value)
{
    __asm__ volatile("strh %w0, [%1]" : : "r"(value), "r"(door) : "memory");
}

static inline void raw_write32(raw_door door, uint32_t value)
{
    __asm__ volatile("str %w0, [%1]" : : "r"(value), "r"(door) : "memory");
}

static inline uint32_t raw_read32(raw_door door)
{
    uint32_t value;
    __asm__ volatile("ldr %w0, [%1]" : "=r"(value) : "r"(door) : "memory");
    return value;
}
#endif

/* The network ring's kick. */
static inline void raw_kick(void)
{
#if defined(__x86_64__)
    raw_write32(HVT_RING_KICK_PIO, 0);
#else
    raw_write32(HVT_HYPERCALL_MMIO_BASE + HVT_RING_KICK_MMIO_OFFSET, 0);
#endif
}

static inline void raw_hypercall_at(uint32_t number, uint32_t block_gpa)
{
    raw_write32(raw_door_of(number), block_gpa);
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

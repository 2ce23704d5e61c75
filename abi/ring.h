/*
 * The network ring: frames without a hypercall for each. One ring for all devices, in memory that
 * guest and tender share. Declarations only: cffi reads this file, too.
 * Indices run freely modulo 2^32; an entry's place is its index modulo HVT_RING_ENTRIES.
 */
#pragma once

#include <stdint.h>

#define HVT_FEATURE_NET_RING 1
#define HVT_RING_KICK_PIO 0x600
#define HVT_RING_KICK_MMIO_OFFSET 0x100
#define HVT_RING_ENTRIES 1024
#define HVT_RING_REGION 0x200000 /* bytes of guest memory that are set aside for it */

#define HVT_RING_NET_WRITE 1
#define HVT_RING_NET_READ 2

struct hvt_ring_entry {
    uint32_t op;
    uint32_t handle;
    uint64_t data_gpa;
    uint32_t len;
    uint32_t id;
    uint64_t reserved;
};

struct hvt_ring_completion {
    uint32_t id;
    int32_t ret;
    uint32_t len;
    uint32_t reserved;
};

struct hvt_ring {
    uint32_t ent_tail; /* written by the guest, as com_head */
    uint32_t com_head;
    uint8_t pad0[56];
    uint32_t ent_head; /* written by the tender, as the next two */
    uint32_t com_tail;
    uint32_t needs_kick;
    uint8_t pad1[52];
    struct hvt_ring_entry entries[HVT_RING_ENTRIES];
    struct hvt_ring_completion completions[HVT_RING_ENTRIES];
};

/*
 * The two ELF notes of a Solo5 executable: its ABI and its manifest.
 * Declarations only: cffi reads this file, too. abi.h checks the layouts.
 */
#pragma once

#include <stdint.h>

#define ABI1_NOTE_TYPE 0x31494241
#define ABI1_NOTE_ALIGN 4
#define ABI1_NOTE_DESC_OFFSET 20
#define MFT1_NOTE_TYPE 0x3154464d
#define MFT1_NOTE_DESC_OFFSET 24

#define ABI_TARGET_HVT 1
#define HVT_ABI_VERSION 2
#define ABI_TARGET_SPT 2
#define SPT_ABI_VERSION 2

struct abi1_info {
    uint32_t abi_target;
    uint32_t abi_version;
    uint32_t reserved0;
    uint32_t reserved1;
};

#define MFT_VERSION 1
#define MFT_MAX_ENTRIES 64
#define MFT_NAME_SIZE 68
#define MFT_NAME_MAX 67

#define MFT_DEV_BLOCK_BASIC 1
#define MFT_DEV_NET_BASIC 2
#define MFT_RESERVED_FIRST 0x40000000

struct mft_block_basic {
    uint64_t capacity;
    uint16_t block_size;
};

struct mft_net_basic {
    uint8_t mac[6];
    uint16_t mtu;
};

union mft_device {
    struct mft_block_basic block_basic;
    struct mft_net_basic net_basic;
};

struct mft_entry {
    char name[MFT_NAME_SIZE];
    uint32_t type;
    union mft_device u;
    uint64_t host_private; /* hvt: the tender keeps it 0; spt: the guest's descriptor, an int */
    uint8_t attached;
    uint8_t reserved[7];
};

struct mft_header {
    uint32_t version;
    uint32_t entries;
};

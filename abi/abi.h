/*
 * The layouts for C: the declarations of this folder, and a check of every size and of each offset
 * that a compiler could get wrong. A number here is a fact of Solo5's hvt and spt targets (ABI version 2).
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "note.h"
#include "hvt.h"
#include "ring.h"
#include "spt.h"
#include "stats.h"

#define PTENDER_LAYOUT(type, field, at) \
    _Static_assert(offsetof(type, field) == (at), #type "." #field)
#define PTENDER_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type)

PTENDER_SIZE(struct abi1_info, 16);
PTENDER_SIZE(struct mft_header, 8);
PTENDER_SIZE(struct mft_entry, 104);
PTENDER_LAYOUT(struct mft_entry, type, 68);
PTENDER_LAYOUT(struct mft_entry, u, 72);
PTENDER_LAYOUT(struct mft_entry, host_private, 88);
PTENDER_LAYOUT(struct mft_entry, attached, 96);
PTENDER_SIZE(struct hvt_boot_info, 56);
PTENDER_LAYOUT(struct hvt_boot_info, cmdline_gpa, 24);
PTENDER_LAYOUT(struct hvt_boot_info, mft_gpa, 32);
PTENDER_LAYOUT(struct hvt_boot_info, net_ring_gpa, 48);
PTENDER_SIZE(struct spt_boot_info, 40);
PTENDER_SIZE(struct hvt_walltime, 8);
PTENDER_SIZE(struct hvt_puts, 16);
PTENDER_LAYOUT(struct hvt_puts, len, 8);
PTENDER_SIZE(struct hvt_poll, 24);
PTENDER_LAYOUT(struct hvt_poll, ready_set, 8);
PTENDER_LAYOUT(struct hvt_poll, ret, 16);
PTENDER_SIZE(struct hvt_block_io, 40);
PTENDER_LAYOUT(struct hvt_block_io, data_gpa, 16);
PTENDER_LAYOUT(struct hvt_block_io, ret, 32);
PTENDER_SIZE(struct hvt_net_io, 32);
PTENDER_LAYOUT(struct hvt_net_io, data_gpa, 8);
PTENDER_LAYOUT(struct hvt_net_io, ret, 24);
PTENDER_SIZE(struct hvt_halt, 16);
PTENDER_LAYOUT(struct hvt_halt, exit_status, 8);
PTENDER_SIZE(struct hvt_ring, 49280);
_Static_assert(sizeof(struct hvt_ring) <= HVT_RING_REGION, "the ring fits into its region");
PTENDER_LAYOUT(struct hvt_ring, com_head, 4);
PTENDER_LAYOUT(struct hvt_ring, ent_head, 64);
PTENDER_LAYOUT(struct hvt_ring, needs_kick, 72);
PTENDER_LAYOUT(struct hvt_ring, entries, 128);
PTENDER_SIZE(struct hvt_ring_entry, 32);
PTENDER_SIZE(struct hvt_ring_completion, 16);
PTENDER_SIZE(struct hvt_x86_trap, 56);
PTENDER_SIZE(struct hvt_aarch64_trap, 288);
_Static_assert(sizeof(struct hvt_aarch64_trap) <= HVT_HALT_COOKIE_SIZE, "a trap fits into a cookie");
PTENDER_SIZE(struct stats_device, 76);
PTENDER_LAYOUT(struct stats_header, mem_bytes, 16);
PTENDER_LAYOUT(struct stats_header, devices, 40);
PTENDER_SIZE(struct counters, 40);
PTENDER_LAYOUT(struct counters, delays, 32);
PTENDER_SIZE(struct activity, 16);
PTENDER_LAYOUT(struct stats, state, 96);
PTENDER_LAYOUT(struct stats, devices, 104);

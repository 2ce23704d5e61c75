/*
 * The guest's side of the network ring: frames to the tender without a hypercall for each.
 * The rule: a frame to send is copied into a slot of ours, since nobody tells when it has gone; a
 * frame to receive is waited for, so there is never more than one answer under way.
 */
#include "runtime.h"

#include <string.h>

enum {
    SLOTS = 64, /* frames that can be on their way at once */
    SLOT_SIZE = 2048,
};

static struct hvt_ring *ring;
static uint32_t request;
static uint8_t slots[SLOTS][SLOT_SIZE];

void hvt_ring_init(const struct hvt_boot_info *boot)
{
    /* An older tender's boot info ends before these fields; what stands there is zero then. */
    if (boot->host_features & HVT_FEATURE_NET_RING)
        ring = (struct hvt_ring *)(uintptr_t)boot->net_ring_gpa;
}

/* The tender has handled all but the last `left` entries. */
static void wait_for_room(uint32_t left)
{
    while (ring->ent_tail - __atomic_load_n(&ring->ent_head, __ATOMIC_ACQUIRE) > left)
        cpu_relax();
}

static void submit(struct hvt_ring_entry entry)
{
    uint32_t tail = ring->ent_tail;

    entry.id = request++;
    ring->entries[tail % HVT_RING_ENTRIES] = entry;
    __atomic_store_n(&ring->ent_tail, tail + 1, __ATOMIC_RELEASE);
    /* Either the tender sees the new tail before it sleeps, or we see that it wants a kick. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&ring->needs_kick, __ATOMIC_RELAXED))
        cpu_ring_kick();
}

bool hvt_ring_write(solo5_handle_t handle, const uint8_t *frame, size_t size)
{
    if (ring == NULL || size > SLOT_SIZE)
        return false;
    wait_for_room(SLOTS - 1);
    uint8_t *slot = slots[ring->ent_tail % SLOTS];
    memcpy(slot, frame, size);
    submit((struct hvt_ring_entry){
        .op = HVT_RING_NET_WRITE,
        .handle = (uint32_t)handle,
        .data_gpa = (uintptr_t)slot,
        .len = (uint32_t)size,
    });
    return true;
}

bool hvt_ring_read(solo5_handle_t handle, uint8_t *buf, size_t size, struct hvt_net_io *answer)
{
    if (ring == NULL)
        return false;
    wait_for_room(SLOTS - 1); /* or it would overtake a slot */
    submit((struct hvt_ring_entry){
        .op = HVT_RING_NET_READ,
        .handle = (uint32_t)handle,
        .data_gpa = (uintptr_t)buf,
        .len = (uint32_t)size,
    });
    uint32_t head = ring->com_head;
    while (__atomic_load_n(&ring->com_tail, __ATOMIC_ACQUIRE) == head)
        cpu_relax();
    const struct hvt_ring_completion *completion = &ring->completions[head % HVT_RING_ENTRIES];
    answer->ret = completion->ret;
    answer->len = completion->len;
    __atomic_store_n(&ring->com_head, head + 1, __ATOMIC_RELEASE);
    return true;
}

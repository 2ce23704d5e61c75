/*
 * Misuses the network ring, as the command line says; the tender must go on, or end this guest:
 *   index      the tail runs too far ahead            (ends)
 *   address    a frame that is not in memory          (ends)
 *   wrap       address + length that wraps            (ends)
 *   readonly   a frame that is to arrive in the code  (ends)
 *   handle     handles that name nothing: EINVAL, or nothing happens
 *   op         operations that do not exist: skipped
 *   greedy     answers that nobody fetches, more than there is room for
 *   storm      entries for ever, with kicks           (a signal ends it)
 */
#include "check.h"
#include "raw.h"

enum { SERVICE = 1, FRAME = 60 };

static struct hvt_ring *ring;
static uint8_t frame[2048];

static void kick(void)
{
    raw_kick();
}

static void publish(uint32_t more)
{
    __atomic_store_n(&ring->ent_tail, ring->ent_tail + more, __ATOMIC_SEQ_CST);
    kick();
}

static void put(uint32_t op, uint32_t handle, uint64_t gpa, uint32_t len)
{
    ring->entries[ring->ent_tail % HVT_RING_ENTRIES] =
        (struct hvt_ring_entry){.op = op, .handle = handle, .data_gpa = gpa, .len = len, .id = 7};
    publish(1);
}

static uint32_t on_their_way(void)
{
    return ring->ent_tail - __atomic_load_n(&ring->ent_head, __ATOMIC_ACQUIRE);
}

static void wait_until_handled(void)
{
    while (on_their_way() != 0)
        __asm__ volatile("" : : : "memory");
}

/* A full ring, always: one entry more would be a wrong index. */
static void storm(void)
{
    for (puts("storming");;)
        if (on_their_way() < HVT_RING_ENTRIES)
            put(HVT_RING_NET_WRITE, SERVICE, (uintptr_t)frame, FRAME);
}

static void read_wrong_handle(uint32_t handle)
{
    uint32_t answer = ring->com_tail;

    put(HVT_RING_NET_READ, handle, (uintptr_t)frame, sizeof frame);
    wait_until_handled();
    EXPECT(ring->com_tail == answer + 1);
    EXPECT(ring->completions[answer % HVT_RING_ENTRIES].ret == HVT_R_EINVAL);
    EXPECT(ring->completions[answer % HVT_RING_ENTRIES].id == 7);
    put(HVT_RING_NET_WRITE, handle, (uintptr_t)frame, FRAME);
    wait_until_handled();
    EXPECT(ring->com_tail == answer + 1);
}

static int misuse_that_is_survived(const char *how)
{
    if (is_word(how, "handle")) {
        read_wrong_handle(0);
        read_wrong_handle(2);
        read_wrong_handle(64);
        read_wrong_handle(0xffffffff);
    } else if (is_word(how, "op")) {
        for (uint32_t op = 3; op < 8; op++)
            put(op, SERVICE, (uintptr_t)frame, FRAME);
        put(0xffffffff, SERVICE, 0, 0);
        wait_until_handled();
        EXPECT(ring->com_tail == 0);
    } else {
        for (int i = 0; i < 3 * HVT_RING_ENTRIES; i++) {
            put(HVT_RING_NET_READ, SERVICE, (uintptr_t)frame, sizeof frame);
            wait_until_handled();
        }
    }
    return verdict();
}

int solo5_app_main(const struct solo5_start_info *info)
{
    const char *how = info->cmdline;

    /* The ring lies right above the memory that the guest was told of. */
    ring = (struct hvt_ring *)(info->heap_start + info->heap_size);
    if (is_word(how, "index"))
        publish(HVT_RING_ENTRIES + 1);
    else if (is_word(how, "address"))
        put(HVT_RING_NET_WRITE, SERVICE, (uintptr_t)ring - FRAME + 1, FRAME);
    else if (is_word(how, "wrap"))
        put(HVT_RING_NET_WRITE, SERVICE, UINT64_MAX - 8, FRAME);
    else if (is_word(how, "readonly"))
        put(HVT_RING_NET_READ, SERVICE, (uintptr_t)solo5_app_main, FRAME);
    else if (is_word(how, "storm"))
        storm();
    else
        return misuse_that_is_survived(how);
    for (;;)
        __asm__ volatile("" : : : "memory");
}

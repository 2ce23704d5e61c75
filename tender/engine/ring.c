/*
 * The network ring, served on a thread of its own.
 *
 * The rule here: the guest may change any byte of the ring at any time. Every field is read once
 * into a local and checked, the tender's own indices are kept here and only published there, and a
 * look at the ring handles no more than one ring of entries.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>

#include "abi/abi.h"
#include "engine.h"
#include "shared.h"
#include "tender/sandbox/sandbox.h"

PTENDER_LAYOUT(struct engine_ring, gpa, 24);
PTENDER_LAYOUT(struct engine_ring, ending, 36);
PTENDER_LAYOUT(struct engine_ring, filter, 80);
PTENDER_SIZE(struct engine_ring, 96);

static int ring_fault(struct engine_ring *ring, int fault, uint64_t gpa, uint64_t len)
{
    ring->fault_gpa = gpa;
    ring->fault_len = len;
    ring->fault = fault;
    return fault;
}

/* An error of the host with a device: count it, and let Python report it. */
static void ring_error(struct engine_ring *ring, _Atomic uint64_t *errors, uint32_t handle,
                       int error)
{
    count(errors, 1);
    if (ring->host_errno)
        return;
    ring->host_errno_handle = (int32_t)handle;
    ring->host_errno = error;
    stop_kick(ring->stop);
}

static int ring_write(struct engine_ring *ring, const struct hvt_ring_entry *entry)
{
    struct engine_device *device = device_of(ring->engine, entry->handle, ENGINE_NET);
    const void *frame = guest_range(ring->engine, entry->data_gpa, entry->len, 0);
    if (!frame)
        return ring_fault(ring, RING_ADDRESS, entry->data_gpa, entry->len);
    if (!device)
        return RING_NO_FAULT; /* nobody waits for an answer */
    int fits = FRAME_MIN <= entry->len && entry->len <= device->frame_max, has_report = 0;
    int error = fits ? net_send(device, frame, entry->len, &has_report) : EMSGSIZE;
    if (error)
        count(&device->out->drops, 1);
    if (error && fits)
        has_report = capture(device, PCAP_OUTBOUND | PCAP_DROPPED, frame, entry->len);
    if (has_report)
        stop_kick(ring->stop);
    if (error && error != EINVAL && error != EMSGSIZE)
        ring_error(ring, &device->out->errors, entry->handle, error);
    return RING_NO_FAULT;
}

static int ring_read(struct engine_ring *ring, const struct hvt_ring_entry *entry,
                     struct hvt_ring_completion *completion)
{
    struct engine_device *device = device_of(ring->engine, entry->handle, ENGINE_NET);
    void *frame = guest_range(ring->engine, entry->data_gpa, entry->len, 1);
    ssize_t length = 0;
    int has_report = 0;
    if (!frame)
        return ring_fault(ring, RING_ADDRESS, entry->data_gpa, entry->len);
    if (device) {
        length = net_receive(device, frame, entry->len, &has_report);
        if (length < 0) {
            ring_error(ring, &device->in->errors, entry->handle, errno);
            length = 0;
        }
        if (has_report)
            stop_kick(ring->stop);
    }
    completion->id = entry->id;
    completion->ret = !device ? HVT_R_EINVAL : length ? HVT_R_OK : HVT_R_AGAIN;
    completion->len = (uint32_t)length;
    return RING_NO_FAULT;
}

/* Handle the entries from *head to `tail`; a RING_* fault ends it. */
static int ring_entries(struct engine_ring *ring, struct hvt_ring *shared, uint32_t *head,
                        uint32_t tail, uint32_t *com_tail)
{
    int fault = RING_NO_FAULT;
    while (*head != tail && !fault && !ring->ending) {
        struct hvt_ring_entry entry;
        memcpy(&entry, &shared->entries[*head % HVT_RING_ENTRIES], sizeof entry);
        __asm__ volatile("" : : : "memory"); /* the copy is what is looked at */
        if (entry.op == HVT_RING_NET_WRITE)
            fault = ring_write(ring, &entry);
        else if (entry.op == HVT_RING_NET_READ) {
            fault = ring_read(ring, &entry, &shared->completions[*com_tail % HVT_RING_ENTRIES]);
            __atomic_store_n(&shared->com_tail, ++*com_tail, __ATOMIC_RELEASE);
        }
        __atomic_store_n(&shared->ent_head, ++*head, __ATOMIC_RELEASE);
    }
    return fault;
}

/* Sleep until the guest kicks, unless something has come in the meantime. */
static void ring_sleep(const struct engine_ring *ring, struct hvt_ring *shared, uint32_t head)
{
    eventfd_t kicks;

    __atomic_store_n(&shared->needs_kick, 1, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&shared->ent_tail, __ATOMIC_ACQUIRE) == head && !ring->ending)
        (void)!eventfd_read(ring->kick_fd, &kicks);
    __atomic_store_n(&shared->needs_kick, 0, __ATOMIC_RELEASE);
}

static int ring_serve(struct engine_ring *ring, struct hvt_ring *shared)
{
    uint32_t head = 0, com_tail = 0, idle = 0;

    while (!ring->ending) {
        uint32_t tail = __atomic_load_n(&shared->ent_tail, __ATOMIC_ACQUIRE);
        if (tail - head > HVT_RING_ENTRIES)
            return ring_fault(ring, RING_INDEX, ring->gpa, tail - head);
        if (tail != head) {
            int fault = ring_entries(ring, shared, &head, tail, &com_tail);
            if (fault)
                return fault;
            idle = 0;
        } else if (++idle > ring->spins) {
            ring_sleep(ring, shared, head);
            idle = 0;
        } else {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
    }
    return RING_NO_FAULT;
}

static void *ring_thread(void *argument)
{
    struct engine_ring *ring = argument;
    const struct timespec again = {.tv_nsec = 10 * 1000 * 1000};

    if (ring->filter && sandbox_install(ring->filter, ring->filter_length)) {
        ring->started = -errno;
        return NULL;
    }
    ring->started = 1;
    ring_serve(ring, (struct hvt_ring *)(ring->engine->memory + ring->gpa));
    while (ring->fault && !ring->ending) {
        stop_request(ring->stop);
        nanosleep(&again, NULL);
    }
    return NULL;
}

int ring_start(struct engine_ring *ring)
{
    sigset_t all, before;
    pthread_t thread;

    sigfillset(&all); /* signals are for the thread that runs the guest, but this thread's faults */
    sigdelset(&all, SIGSYS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&thread, NULL, ring_thread, ring);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    ring->thread = (uintptr_t)thread;
    while (!error && !ring->started)
        sched_yield();
    return error ? error : ring->started < 0 ? -ring->started : 0;
}

void ring_end(struct engine_ring *ring)
{
    ring->ending = 1;
    (void)!eventfd_write(ring->kick_fd, 1);
    pthread_join((pthread_t)ring->thread, NULL);
}

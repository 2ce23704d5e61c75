/*
 * The engine: runs a vCPU and answers hypercalls whose device is a plain descriptor.
 *
 * The rules here:
 * - It is a second implementation of a subset. tender/modules/ defines the meaning; a call with a
 *   bad address, a wrong handle, a host error or a full console is left untouched and returns to
 *   Python, which makes the same call from the start.
 * - The guest is hostile. An argument block is copied once and only the copy is looked at; every
 *   address passes through guest_range(), which can't overflow.
 * - No allocation, no lock, no state but *engine: any number of guests may run on threads.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <linux/kvm.h>

#include "abi/abi.h"
#include "engine.h"
#include "shared.h"
#include "tender/embed/heap.h"
#include "tender/host/ticks.h"

PTENDER_SIZE(struct engine_device, 72);
PTENDER_LAYOUT(struct engine_device, capacity, 16);
PTENDER_SIZE(struct engine_range, 24);
PTENDER_LAYOUT(struct engine, mem_size, 24);
PTENDER_LAYOUT(struct engine, ranges, 48);
PTENDER_LAYOUT(struct engine, devices, 432);
PTENDER_LAYOUT(struct engine, poll_deadline_ns, 5080);
PTENDER_SIZE(struct engine, 5104);

#define NSEC_PER_SEC 1000000000u
/* Python makes larger transfers, in pieces between which it sees a stop request. */
#define STEP (1u << 20)
#define IDLE_NS 100000000u

enum { PYTHON = 0, ANSWERED = 1 };

static int may_access(const struct engine *engine, uint64_t gpa, uint64_t size, int write)
{
    if (!engine->range_count)
        return 0; /* too many ranges to look through here */
    for (uint32_t i = 0; i < engine->range_count; i++) {
        const struct engine_range *range = &engine->ranges[i];
        if (gpa < range->end && gpa + size > range->start && (write || !range->readable))
            return 0;
    }
    return 1;
}

void *guest_range(const struct engine *engine, uint64_t gpa, uint64_t size, int write)
{
    if (size > engine->mem_size || gpa > engine->mem_size - size)
        return NULL;
    if (gpa < engine->protected_end && size && !may_access(engine, gpa, size, write))
        return NULL;
    return engine->memory + gpa;
}

struct engine_device *device_of(struct engine *engine, uint64_t handle, int kind)
{
    if (handle >= ENGINE_DEVICES || engine->devices[handle].kind != kind)
        return NULL;
    return &engine->devices[handle];
}

/*
 * Copy the `size` bytes of an argument block, which may lie at any address and be changed by a read
 * into the guest's memory at the same time: only the copy is looked at. Returns where the block is,
 * for the reply, or NULL where the guest may not name it.
 */
static uint8_t *read_block(const struct engine *engine, uint64_t gpa, void *copy, uint64_t size,
                           int write)
{
    uint8_t *block = guest_range(engine, gpa, size, write);
    if (block) {
        memcpy(copy, block, size);
        __asm__ volatile("" : : : "memory"); /* no second look at the guest's memory */
    }
    return block;
}

/* Write one field of the reply. */
#define REPLY(block, type, field, value)                                                           \
    do {                                                                                           \
        const __typeof__(((struct type *)0)->field) reply_ = (value);                              \
        memcpy((block) + offsetof(struct type, field), &reply_, sizeof reply_);                    \
    } while (0)

void count(_Atomic uint64_t *cell, uint64_t more)
{
    atomic_fetch_add_explicit(cell, more, memory_order_relaxed);
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * NSEC_PER_SEC + (uint64_t)now.tv_nsec;
}

/* Whether a device must not do anything now; Python makes the call, and waits. */
static int is_limited(const struct rate *rate)
{
    return rate && rate_due(rate, clock_ns(CLOCK_MONOTONIC));
}

static void take_rate(struct rate *rate, struct counters *counters, uint64_t bytes)
{
    if (rate && rate_take(rate, clock_ns(CLOCK_MONOTONIC), bytes))
        count(&counters->delays, 1);
}

static int walltime(struct engine *engine, uint64_t gpa)
{
    uint8_t *block = guest_range(engine, gpa, sizeof(struct hvt_walltime), 1);
    if (!block)
        return PYTHON;
    REPLY(block, hvt_walltime, nsecs, clock_ns(CLOCK_REALTIME));
    return ANSWERED;
}

static int console_puts(struct engine *engine, uint64_t gpa)
{
    struct hvt_puts args;
    if (!read_block(engine, gpa, &args, sizeof args, 0) || engine->console_fd < 0)
        return PYTHON;
    const void *data = guest_range(engine, args.data_gpa, args.len, 0);
    if (!data || args.len > STEP)
        return PYTHON;
    ssize_t done = write(engine->console_fd, data, args.len);
    if (done < 0 || (uint64_t)done != args.len) {
        engine->console_done = done > 0 ? (uint64_t)done : 0;
        return PYTHON;
    }
    count(&engine->console->calls, 1);
    count(&engine->console->bytes, args.len);
    return ANSWERED;
}

/* The set of ready handles; PYTHON where a descriptor is ready for anything but a frame, or the
 * frame may not be read yet. */
static int ready_handles(const struct engine *engine, const struct pollset *set, int events,
                         uint64_t *ready_set)
{
    *ready_set = 0;
    for (uint32_t i = 0; events > 0 && i < set->count; i++) {
        short revents = set->fds[i].revents;
        if (revents & ~POLLIN)
            return PYTHON;
        if (revents && is_limited(engine->devices[set->handles[i]].rate_in))
            return PYTHON;
        if (revents & POLLIN)
            *ready_set |= UINT64_C(1) << set->handles[i];
    }
    return ANSWERED;
}

/* What host_poll() returns; a guest that is idle first gives back memory. */
static int poll_and_give_back(struct engine *engine, uint64_t begun_ns, uint64_t deadline_ns)
{
    if (!engine->gives_back || deadline_ns - begun_ns < IDLE_NS)
        return host_poll(engine->pollset, deadline_ns);
    const int events = host_poll(engine->pollset, begun_ns + IDLE_NS);
    if (events)
        return events;
    heap_give_back((uintptr_t)engine->gives_back);
    engine->gives_back = NULL;
    return host_poll(engine->pollset, deadline_ns);
}

static int poll_devices(struct engine *engine, uint64_t gpa)
{
    struct hvt_poll args;
    uint8_t *block = read_block(engine, gpa, &args, sizeof args, 1);
    if (!block || !engine->pollset)
        return PYTHON;
    const uint64_t timeout_ns = args.timeout_nsecs;
    struct pollset *set = engine->pollset;
    uint64_t begun_ns = timeout_ns ? clock_ns(CLOCK_MONOTONIC) : 0;
    /* Far deadlines are cut: nobody waits for 584 years. */
    uint64_t deadline_ns = timeout_ns > UINT64_MAX - begun_ns ? UINT64_MAX : begun_ns + timeout_ns;
    uint64_t ready_set;
    int events = poll_and_give_back(engine, begun_ns, deadline_ns);

    if (events < 0 || ready_handles(engine, set, events, &ready_set) == PYTHON) {
        engine->poll_deadline_ns = deadline_ns;
        return PYTHON;
    }
    count(&engine->poll->calls, 1);
    REPLY(block, hvt_poll, ready_set, ready_set);
    REPLY(block, hvt_poll, ret, __builtin_popcountll(ready_set));
    return ANSWERED;
}

static int block_io(struct engine *engine, uint64_t gpa, int write)
{
    struct hvt_block_io args;
    uint8_t *block = read_block(engine, gpa, &args, sizeof args, 1);
    if (!block)
        return PYTHON;
    const struct engine_device *device = device_of(engine, args.handle, ENGINE_BLOCK);
    if (!device || (write && !device->writable))
        return PYTHON;
    if (args.offset >= device->capacity || args.len > device->capacity - args.offset)
        return PYTHON;
    if (args.len > STEP || is_limited(device->rate_in))
        return PYTHON;
    void *data = guest_range(engine, args.data_gpa, args.len, !write);
    if (!data)
        return PYTHON;
    ssize_t done = write ? pwrite(device->fd, data, args.len, (off_t)args.offset)
                         : pread(device->fd, data, args.len, (off_t)args.offset);
    if (done < 0 || (uint64_t)done != args.len)
        return PYTHON;
    count(&device->in->calls, 1);
    count(&device->in->bytes, args.len);
    take_rate(device->rate_in, device->in, args.len);
    REPLY(block, hvt_block_io, ret, HVT_R_OK);
    return ANSWERED;
}

int capture(const struct engine_device *device, uint32_t flags, const void *frame, uint64_t len)
{
    return device->pcap && pcap_write(device->pcap, 0, flags, frame, len);
}

int net_send(const struct engine_device *device, const void *frame, uint64_t len, int *has_report)
{
    int dropped = write(device->fd, frame, len) < 0;
    if (dropped && errno != EAGAIN && errno != ENOBUFS)
        return errno;
    if (dropped)
        count(&device->out->drops, 1);
    else
        count(&device->out->bytes, len);
    count(&device->out->calls, 1);
    *has_report |= capture(device, PCAP_OUTBOUND | (dropped ? PCAP_DROPPED : 0), frame, len);
    return 0;
}

ssize_t net_receive(const struct engine_device *device, void *frame, uint64_t len, int *has_report)
{
    ssize_t length = read(device->fd, frame, len);
    if (length < 0 && errno == EAGAIN)
        length = 0; /* as an empty message, and the end of a socket, which POLL reports */
    if (length >= 0) {
        count(&device->in->bytes, (uint64_t)length);
        count(&device->in->calls, 1);
    }
    if (length > 0)
        *has_report |= capture(device, PCAP_INBOUND, frame, (uint64_t)length);
    return length;
}

static int net_write(struct engine *engine, uint64_t gpa)
{
    struct hvt_net_io args;
    uint8_t *block = read_block(engine, gpa, &args, sizeof args, 1);
    if (!block)
        return PYTHON;
    const struct engine_device *device = device_of(engine, args.handle, ENGINE_NET);
    if (!device || args.len > device->frame_max || args.len < FRAME_MIN)
        return PYTHON;
    const void *frame = guest_range(engine, args.data_gpa, args.len, 0);
    if (!frame)
        return PYTHON;
    if (is_limited(device->rate_out) || net_send(device, frame, args.len, &engine->has_report))
        return PYTHON;
    take_rate(device->rate_out, device->out, args.len);
    REPLY(block, hvt_net_io, ret, HVT_R_OK);
    return ANSWERED;
}

static int net_read(struct engine *engine, uint64_t gpa)
{
    struct hvt_net_io args;
    uint8_t *block = read_block(engine, gpa, &args, sizeof args, 1);
    if (!block)
        return PYTHON;
    const struct engine_device *device = device_of(engine, args.handle, ENGINE_NET);
    if (!device)
        return PYTHON;
    void *frame = guest_range(engine, args.data_gpa, args.len, 1);
    if (!frame || is_limited(device->rate_in))
        return PYTHON;
    ssize_t length = net_receive(device, frame, args.len, &engine->has_report);
    if (length < 0)
        return PYTHON;
    if (length > 0)
        take_rate(device->rate_in, device->in, (uint64_t)length);
    REPLY(block, hvt_net_io, ret, length ? HVT_R_OK : HVT_R_AGAIN);
    REPLY(block, hvt_net_io, len, (uint64_t)length);
    return ANSWERED;
}

static int answer(struct engine *engine, uint32_t number, uint64_t gpa)
{
    switch (number) {
    case HVT_HYPERCALL_WALLTIME:
        return walltime(engine, gpa);
    case HVT_HYPERCALL_PUTS:
        return console_puts(engine, gpa);
    case HVT_HYPERCALL_POLL:
        return poll_devices(engine, gpa);
    case HVT_HYPERCALL_BLOCK_WRITE:
        return block_io(engine, gpa, 1);
    case HVT_HYPERCALL_BLOCK_READ:
        return block_io(engine, gpa, 0);
    case HVT_HYPERCALL_NET_WRITE:
        return net_write(engine, gpa);
    case HVT_HYPERCALL_NET_READ:
        return net_read(engine, gpa);
    default:
        return PYTHON; /* HALT, and numbers that are no hypercall */
    }
}

static int answer_exit(struct engine *engine, const struct kvm_run *run)
{
    if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT)
        return PYTHON;
    if (run->io.size != sizeof(uint32_t) || run->io.count != 1)
        return PYTHON;
    uint32_t gpa;
    memcpy(&gpa, (const uint8_t *)run + run->io.data_offset, sizeof gpa);
    return answer(engine, run->io.port - HVT_HYPERCALL_PIO_BASE, gpa);
}

/* Answer WALLTIME, which takes less than two looks at the clock would: it is time in the guest. */
static int answers_walltime(struct engine *engine, const struct kvm_run *run)
{
    if (run->exit_reason != KVM_EXIT_IO || engine->has_report)
        return 0;
    if (run->io.port != HVT_HYPERCALL_PIO_BASE + HVT_HYPERCALL_WALLTIME)
        return 0;
    if (answer_exit(engine, run) == PYTHON)
        return 0;
    count_exit(engine->activity);
    return 1;
}

int engine_run(struct engine *engine)
{
    const struct kvm_run *run = engine->run;

    engine->console_done = 0;
    engine->poll_deadline_ns = 0;
    do {
        int error;
        guest_enter(engine->activity);
        do
            error = ioctl(engine->vcpu_fd, KVM_RUN, 0) < 0 ? errno : 0;
        while (!error && answers_walltime(engine, run));
        guest_exit(engine->activity);
        if (error)
            return error;
        if (answer_exit(engine, run) == PYTHON)
            return 0;
    } while (!engine->has_report);
    return EINTR;
}

int engine_answer(struct engine *engine, uint32_t number, uint64_t gpa)
{
    engine->console_done = 0;
    engine->poll_deadline_ns = 0;
    return answer(engine, number, gpa);
}

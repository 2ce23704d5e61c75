/*
 * The engine: runs a vCPU and answers the hypercalls whose device is a plain descriptor.
 *
 * The rules here:
 * - It is a second implementation of a subset. tender/modules/ holds the meaning; whatever is not
 *   the plain good case (a bad address, a wrong handle, a host error, a full console) is left
 *   untouched and goes back to Python, which makes the same call from the start.
 * - The guest is hostile. An argument block is copied once and only the copy is looked at; every
 *   address passes through guest_range(), which can't overflow.
 * - No allocation, no lock, no state but *engine: any number of guests may run on threads.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <linux/kvm.h>

#include "abi.h"
#include "device.h"
#include "engine.h"

#define NSEC_PER_SEC 1000000000u

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

/* The memory [gpa, gpa + size) if the guest may name it, else NULL. */
static void *guest_range(const struct engine *engine, uint64_t gpa, uint64_t size, int write)
{
    if (size > engine->mem_size || gpa > engine->mem_size - size)
        return NULL;
    if (gpa < engine->protected_end && size && !may_access(engine, gpa, size, write))
        return NULL;
    return engine->memory + gpa;
}

static struct engine_device *device_of(struct engine *engine, uint64_t handle, int kind)
{
    if (handle >= ENGINE_DEVICES || engine->devices[handle].kind != kind)
        return NULL;
    return &engine->devices[handle];
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * NSEC_PER_SEC + (uint64_t)now.tv_nsec;
}

static int walltime(struct engine *engine, uint64_t gpa)
{
    struct hvt_walltime *block = guest_range(engine, gpa, sizeof *block, 1);
    if (!block)
        return PYTHON;
    block->nsecs = clock_ns(CLOCK_REALTIME);
    return ANSWERED;
}

static int console_puts(struct engine *engine, uint64_t gpa)
{
    const struct hvt_puts *block = guest_range(engine, gpa, sizeof *block, 0);
    if (!block || engine->console_fd < 0)
        return PYTHON;
    const struct hvt_puts args = *block;
    const void *data = guest_range(engine, args.data_gpa, args.len, 0);
    if (!data)
        return PYTHON;
    ssize_t done = write(engine->console_fd, data, args.len);
    if (done < 0 || (uint64_t)done != args.len) {
        engine->console_done = done > 0 ? (uint64_t)done : 0;
        return PYTHON;
    }
    engine->console->calls++;
    engine->console->bytes += args.len;
    return ANSWERED;
}

/* The set of ready handles; PYTHON where a descriptor is ready for another reason than a frame. */
static int ready_handles(const struct pollset *set, int events, uint64_t *ready_set)
{
    *ready_set = 0;
    for (uint32_t i = 0; events > 0 && i < set->count; i++) {
        short revents = set->fds[i].revents;
        if (revents & ~POLLIN)
            return PYTHON;
        if (revents & POLLIN)
            *ready_set |= UINT64_C(1) << set->handles[i];
    }
    return ANSWERED;
}

static int poll_devices(struct engine *engine, uint64_t gpa)
{
    struct hvt_poll *block = guest_range(engine, gpa, sizeof *block, 1);
    if (!block)
        return PYTHON;
    const uint64_t timeout_ns = block->timeout_nsecs;
    struct pollset *set = engine->pollset;
    const struct timespec limit = {
        .tv_sec = (time_t)(timeout_ns / NSEC_PER_SEC),
        .tv_nsec = (long)(timeout_ns % NSEC_PER_SEC),
    };
    uint64_t begun_ns = timeout_ns ? clock_ns(CLOCK_MONOTONIC) : 0;
    uint64_t ready_set;
    int events = ppoll(set->fds, set->count, &limit, NULL);

    if (events < 0 || ready_handles(set, events, &ready_set) == PYTHON) {
        /* Far deadlines are cut: nobody waits for 584 years. */
        if (timeout_ns)
            engine->poll_deadline_ns =
                timeout_ns > UINT64_MAX - begun_ns ? UINT64_MAX : begun_ns + timeout_ns;
        return PYTHON;
    }
    engine->poll->calls++;
    block->ready_set = ready_set;
    block->ret = __builtin_popcountll(ready_set);
    return ANSWERED;
}

static int block_io(struct engine *engine, uint64_t gpa, int write)
{
    struct hvt_block_io *block = guest_range(engine, gpa, sizeof *block, 1);
    if (!block)
        return PYTHON;
    const struct hvt_block_io args = *block;
    const struct engine_device *device = device_of(engine, args.handle, ENGINE_BLOCK);
    if (!device || (write && !device->writable))
        return PYTHON;
    if (args.offset >= device->capacity || args.len > device->capacity - args.offset)
        return PYTHON;
    void *data = guest_range(engine, args.data_gpa, args.len, !write);
    if (!data)
        return PYTHON;
    ssize_t done = write ? pwrite(device->fd, data, args.len, (off_t)args.offset)
                         : pread(device->fd, data, args.len, (off_t)args.offset);
    if (done < 0 || (uint64_t)done != args.len)
        return PYTHON;
    device->in->calls++;
    device->in->bytes += args.len;
    block->ret = HVT_R_OK;
    return ANSWERED;
}

static int net_write(struct engine *engine, uint64_t gpa)
{
    struct hvt_net_io *block = guest_range(engine, gpa, sizeof *block, 1);
    if (!block)
        return PYTHON;
    const struct hvt_net_io args = *block;
    const struct engine_device *device = device_of(engine, args.handle, ENGINE_NET);
    if (!device || args.len > device->frame_max)
        return PYTHON;
    const void *frame = guest_range(engine, args.data_gpa, args.len, 0);
    if (!frame)
        return PYTHON;
    if (write(device->fd, frame, args.len) >= 0)
        device->out->bytes += args.len;
    else if (errno == EAGAIN || errno == ENOBUFS)
        device->out->drops++; /* as a wire does */
    else
        return PYTHON;
    device->out->calls++;
    block->ret = HVT_R_OK;
    return ANSWERED;
}

static int net_read(struct engine *engine, uint64_t gpa)
{
    struct hvt_net_io *block = guest_range(engine, gpa, sizeof *block, 1);
    if (!block)
        return PYTHON;
    const struct hvt_net_io args = *block;
    const struct engine_device *device = device_of(engine, args.handle, ENGINE_NET);
    if (!device)
        return PYTHON;
    void *frame = guest_range(engine, args.data_gpa, args.len, 1);
    if (!frame)
        return PYTHON;
    ssize_t length = read(device->fd, frame, args.len);
    if (length > 0) {
        device->in->bytes += (uint64_t)length;
        block->ret = HVT_R_OK;
    } else if (length < 0 && errno == EAGAIN) {
        length = 0;
        block->ret = HVT_R_AGAIN;
    } else {
        return PYTHON;
    }
    device->in->calls++;
    block->len = (uint64_t)length;
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
        return PYTHON; /* HALT, and what is no hypercall */
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

int engine_run(struct engine *engine)
{
    const struct kvm_run *run = engine->run;

    engine->console_done = 0;
    engine->poll_deadline_ns = 0;
    do {
        if (ioctl(engine->vcpu_fd, KVM_RUN, 0) < 0)
            return errno;
    } while (answer_exit(engine, run) == ANSWERED);
    return 0;
}

int engine_answer(struct engine *engine, uint32_t number, uint64_t gpa)
{
    engine->console_done = 0;
    engine->poll_deadline_ns = 0;
    return answer(engine, number, gpa);
}

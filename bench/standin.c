/*
 * A stand-in for KVM_RUN, preloaded into a tender: what a hypercall costs without a guest.
 * The rule: every other ioctl goes to the real KVM. KVM_RUN returns the next canned exit, a
 * hypercall whose argument block has been put into guest memory; each reply is checked when the
 * tender comes back. Nothing is opened, allocated or printed once the guest "runs", because the
 * sandbox may not allow it: the result goes to a file that was mapped before.
 *
 *   STANDIN_RESULT    path of a file of sizeof(struct result) bytes; without it nothing changes
 *   STANDIN_CALL      number of the hypercall, HVT_HYPERCALL_HALT for a guest that ends at once
 *   STANDIN_LENGTH    bytes per call of PUTS, NET_* and BLOCK_*
 *   STANDIN_SPAN      bytes of the block device that the calls walk over
 *   STANDIN_HANDLE    of the device
 *   STANDIN_ROUND_NS  how long one round should take
 *   STANDIN_CALLS     calls per round, where the number matters more than the time
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"

#define ROUNDS 31
#define WARM_UP_CALLS 200
#define OWN_CALLS 20000
#define PAGE 4096
#define POISON 0x5a5a5a5a

int ioctl(int fd, unsigned long request, ...); /* <sys/ioctl.h> differs between libraries */

struct result {
    uint64_t calls; /* in one round */
    uint64_t rounds;
    uint64_t wrong; /* replies, in all rounds */
    uint64_t own_ns; /* of OWN_CALLS calls of this file alone */
    uint64_t own_calls;
    uint64_t round_ns[ROUNDS];
};

static struct {
    uint32_t call;
    uint64_t length, span, handle, round_ns, calls;
} scenario;

static struct result *result;
static int vcpu_fd = -1;
static struct kvm_run *vcpu;
static uint8_t *memory;
static uint64_t memory_size;

static union argument {
    struct hvt_walltime walltime;
    struct hvt_puts puts;
    struct hvt_poll poll;
    struct hvt_block_io block;
    struct hvt_net_io net;
    struct hvt_halt halt;
} volatile *argument; /* in the middle of guest memory: no image of the bench reaches there */

static uint64_t left; /* calls of this round */
static uint64_t began_ns;
static int64_t round_number = -1; /* -1: warming up */
static int started;

static uint64_t number(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 0) : otherwise;
}

__attribute__((constructor)) static void open_result(void)
{
    const char *path = getenv("STANDIN_RESULT");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;

    if (fd == -1)
        return;
    void *mapped = mmap(NULL, sizeof *result, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped == MAP_FAILED)
        return;
    result = mapped;
    scenario.call = number("STANDIN_CALL", HVT_HYPERCALL_HALT);
    scenario.length = number("STANDIN_LENGTH", 0);
    scenario.span = number("STANDIN_SPAN", 0);
    scenario.handle = number("STANDIN_HANDLE", 1);
    scenario.round_ns = number("STANDIN_ROUND_NS", 1000000);
    scenario.calls = number("STANDIN_CALLS", 0);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static uint64_t data_gpa(void)
{
    return memory_size / 2 + PAGE;
}

/* A line, or an Ethernet frame from and to nobody. */
static void put_data(void)
{
    static const uint8_t frame[] = {2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x88, 0xb5};
    uint8_t *data = memory + data_gpa();

    memset(data, '.', scenario.length);
    if (scenario.call == HVT_HYPERCALL_PUTS && scenario.length)
        data[scenario.length - 1] = '\n';
    if (scenario.call == HVT_HYPERCALL_NET_WRITE)
        memcpy(data, frame, sizeof frame);
}

static void put_argument(void)
{
    switch (scenario.call) {
    case HVT_HYPERCALL_PUTS:
        argument->puts.data_gpa = data_gpa();
        argument->puts.len = scenario.length;
        break;
    case HVT_HYPERCALL_BLOCK_READ:
    case HVT_HYPERCALL_BLOCK_WRITE:
        argument->block.handle = scenario.handle;
        argument->block.offset = 0;
        argument->block.data_gpa = data_gpa();
        argument->block.len = scenario.length;
        break;
    case HVT_HYPERCALL_NET_READ:
    case HVT_HYPERCALL_NET_WRITE:
        argument->net.handle = scenario.handle;
        argument->net.data_gpa = data_gpa();
        break;
    default:
        break;
    }
}

/* What the last call changed, or has to change. */
static void renew_argument(void)
{
    switch (scenario.call) {
    case HVT_HYPERCALL_WALLTIME:
        argument->walltime.nsecs = 0;
        break;
    case HVT_HYPERCALL_POLL:
        argument->poll.timeout_nsecs = 0;
        argument->poll.ret = POISON;
        break;
    case HVT_HYPERCALL_BLOCK_READ:
    case HVT_HYPERCALL_BLOCK_WRITE:
        argument->block.offset += scenario.length;
        if (argument->block.offset + scenario.length > scenario.span)
            argument->block.offset = 0;
        argument->block.ret = POISON;
        break;
    case HVT_HYPERCALL_NET_READ:
    case HVT_HYPERCALL_NET_WRITE:
        argument->net.len = scenario.length;
        argument->net.ret = POISON;
        break;
    default:
        break;
    }
}

static int reply_is_right(void)
{
    switch (scenario.call) {
    case HVT_HYPERCALL_WALLTIME:
        return argument->walltime.nsecs != 0;
    case HVT_HYPERCALL_POLL:
        return argument->poll.ret == 0 && argument->poll.ready_set == 0;
    case HVT_HYPERCALL_BLOCK_READ:
    case HVT_HYPERCALL_BLOCK_WRITE:
        return argument->block.ret == HVT_R_OK;
    case HVT_HYPERCALL_NET_READ: /* nothing waits there */
        return argument->net.ret == HVT_R_AGAIN;
    case HVT_HYPERCALL_NET_WRITE:
        return argument->net.ret == HVT_R_OK;
    default:
        return 1;
    }
}

static void exit_with(uint32_t call)
{
    vcpu->exit_reason = KVM_EXIT_IO;
    vcpu->io.direction = KVM_EXIT_IO_OUT;
    vcpu->io.size = 4;
    vcpu->io.count = 1;
    vcpu->io.port = HVT_HYPERCALL_PIO_BASE + call;
    vcpu->io.data_offset = PAGE; /* where Linux has it */
    *(uint32_t *)((uint8_t *)vcpu + PAGE) = (uint8_t *)argument - memory;
}

static void next_call(void)
{
    left--;
    renew_argument();
    exit_with(scenario.call);
}

static void begin_round(void)
{
    left = round_number < 0 ? WARM_UP_CALLS : result->calls;
    began_ns = now_ns();
}

static void choose_calls(uint64_t elapsed_ns)
{
    uint64_t fitting = scenario.round_ns * WARM_UP_CALLS / (elapsed_ns ? elapsed_ns : 1);
    result->calls = scenario.calls ? scenario.calls : fitting < 50 ? 50 : fitting;
}

static void end_round(void)
{
    uint64_t elapsed_ns = now_ns() - began_ns;

    if (round_number < 0) {
        choose_calls(elapsed_ns);
        result->wrong = 0; /* a tap may have had something to say */
    } else {
        result->round_ns[round_number] = elapsed_ns;
        result->rounds = round_number + 1;
    }
    round_number++;
}

/* What this file itself costs a call, the way through the dynamic linker included. */
static void measure_self(void)
{
    int (*volatile again)(int, unsigned long, ...) = ioctl;
    uint64_t wrong = result->wrong;

    left = OWN_CALLS + 1;
    began_ns = now_ns();
    for (int i = 0; i < OWN_CALLS; i++)
        again(vcpu_fd, KVM_RUN, NULL);
    result->own_ns = now_ns() - began_ns;
    result->own_calls = OWN_CALLS;
    result->wrong = wrong;
}

static void start(void)
{
    started = 1;
    argument = (union argument *)(memory + memory_size / 2);
    put_data();
    put_argument();
    begin_round();
}

static int halt(void)
{
    argument->halt.cookie_gpa = 0;
    argument->halt.exit_status = 0;
    exit_with(HVT_HYPERCALL_HALT);
    return 0;
}

static int stand_in(void)
{
    if (vcpu->immediate_exit) {
        errno = EINTR;
        return -1;
    }
    if (!started)
        start();
    else
        result->wrong += !reply_is_right();
    if (scenario.call == HVT_HYPERCALL_HALT)
        return halt();
    if (!left) {
        end_round();
        if (round_number == ROUNDS) {
            measure_self();
            return halt();
        }
        begin_round();
    }
    next_call();
    return 0;
}

static void notice(unsigned long request, void *value, int answer)
{
    if (request == KVM_CREATE_VCPU && answer >= 0) {
        void *mapped = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, answer, 0);
        if (mapped != MAP_FAILED) {
            vcpu_fd = answer;
            vcpu = mapped;
        }
    } else if (request == KVM_SET_USER_MEMORY_REGION && answer == 0) {
        const struct kvm_userspace_memory_region *region = value;
        if (region->guest_phys_addr == 0) {
            memory = (uint8_t *)(uintptr_t)region->userspace_addr;
            memory_size = region->memory_size;
        }
    }
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list more;
    va_start(more, request);
    void *value = va_arg(more, void *);
    va_end(more);

    if (request == KVM_RUN && result && vcpu && memory) /* its descriptor may have moved */
        return stand_in();
    int answer = syscall(SYS_ioctl, fd, request, value);
    if (result)
        notice(request, value, answer);
    return answer;
}

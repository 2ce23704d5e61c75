/* KVM for Python: kvm.h has what each function does. */
#include <cpuid.h>
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "kvm.h"
#include "tender/host/ticks.h"

int kvm_ioctl(int fd, unsigned long request, unsigned long value)
{
    return ioctl(fd, request, value);
}

int kvm_ioctl_at(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument);
}

int64_t kvm_run_once(int vcpu_fd, const struct kvm_run *run, struct activity *activity)
{
    uint32_t value;
    guest_enter(activity);
    const int error = ioctl(vcpu_fd, KVM_RUN, 0) < 0 ? errno : 0;

    guest_exit(activity);
    if (error)
        return -error;
    if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT)
        return 0;
    if (run->io.size != sizeof value || run->io.count != 1)
        return 0;
    memcpy(&value, (const uint8_t *)run + run->io.data_offset, sizeof value);
    return (int64_t)run->io.port << 32 | value;
}

struct kvm_run *kvm_map_run(int vcpu_fd, size_t size)
{
    void *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
    return run == MAP_FAILED ? NULL : run;
}

int kvm_unmap_run(struct kvm_run *run, size_t size)
{
    return munmap(run, size);
}

uint64_t kvm_entry_failure(const struct kvm_run *run)
{
    return run->fail_entry.hardware_entry_failure_reason;
}

uint32_t kvm_suberror(const struct kvm_run *run)
{
    return run->internal.suberror;
}

int kvm_is_hardware(void)
{
    unsigned int eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 5)))
        return 1;
    return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 2));
}

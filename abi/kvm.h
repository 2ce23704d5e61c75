/*
 * KVM for Python: the kernel's own header, and ioctl() with a fixed shape, because a variadic
 * call can't be compiled by cffi ahead of time.
 */
#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <linux/kvm.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

static int kvm_ioctl(int fd, unsigned long request, unsigned long value)
{
    return ioctl(fd, request, value);
}

static int kvm_ioctl_at(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument);
}

/* The shared page of a vCPU; NULL where it can't be mapped. */
static struct kvm_run *kvm_map_run(int vcpu_fd, size_t size)
{
    void *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
    return run == MAP_FAILED ? NULL : run;
}

static int kvm_unmap_run(struct kvm_run *run, size_t size)
{
    return munmap(run, size);
}

/* The page-aligned host address of guest memory, as KVM wants it. */
static uint64_t kvm_address(void *memory)
{
    return (uint64_t)(uintptr_t)memory;
}

/* Whether this CPU has what KVM runs guests on (VMX or SVM); without it, KVM is an emulator. */
static int kvm_in_hardware(void)
{
#ifdef __x86_64__
    unsigned eax, ebx, ecx = 0, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & (1u << 5))
        return 1;
    return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && ecx & (1u << 2);
#else
    return 1;
#endif
}

/* Two facts of an exit whose structs have no name that cffi could use. */
static uint64_t kvm_entry_failure(const struct kvm_run *run)
{
    return run->fail_entry.hardware_entry_failure_reason;
}

static uint32_t kvm_suberror(const struct kvm_run *run)
{
    return run->internal.suberror;
}

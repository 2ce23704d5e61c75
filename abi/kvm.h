/*
 * KVM for Python: the kernel's own header, and ioctl() with a fixed shape, because a variadic
 * call can't be compiled by cffi ahead of time.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static int kvm_ioctl(int fd, unsigned long request, unsigned long value)
{
    return ioctl(fd, request, value);
}

static int kvm_ioctl_at(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument);
}

/*
 * KVM_RUN, with the exit that nearly all are, a 4-byte OUT, in one word: port << 32 | value.
 * Else 0, or -errno. (Python would read eight fields for it, each as long as a system call.)
 */
static int64_t kvm_run_once(int vcpu_fd, const struct kvm_run *run)
{
    uint32_t value;

    if (ioctl(vcpu_fd, KVM_RUN, 0) < 0)
        return -errno;
    if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT)
        return 0;
    if (run->io.size != sizeof value || run->io.count != 1)
        return 0;
    memcpy(&value, (const uint8_t *)run + run->io.data_offset, sizeof value);
    return (int64_t)run->io.port << 32 | value;
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

/* Two facts of an exit whose structs have no name that cffi could use. */
static uint64_t kvm_entry_failure(const struct kvm_run *run)
{
    return run->fail_entry.hardware_entry_failure_reason;
}

static uint32_t kvm_suberror(const struct kvm_run *run)
{
    return run->internal.suberror;
}

/*
 * Whether this CPU can run a guest by itself. A KVM without VMX and SVM under it emulates the
 * guest's kernel mode, which is where a unikernel spends all its time.
 * CPUID bits: Intel SDM volume 2A (leaf 1, ECX 5), AMD APM volume 3 (leaf 80000001h, ECX 2).
 */
static int kvm_is_hardware(void)
{
#if defined(__x86_64__)
    unsigned int eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 5)))
        return 1;
    return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 2));
#else
    return 1;
#endif
}

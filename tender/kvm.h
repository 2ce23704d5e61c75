/*
 * KVM for Python: ioctl() with fixed argument types, because cffi compiles no variadic call, and
 * parts of struct kvm_run. Declarations only: cffi reads this file, too.
 */
#pragma once

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>

#include "abi/stats.h"

int kvm_ioctl(int fd, unsigned long request, unsigned long value);
int kvm_ioctl_at(int fd, unsigned long request, void *argument);

/*
 * KVM_RUN, counted in `activity` unless it is NULL. A 4-byte OUT, which nearly every exit is, as
 * port << 32 | value; 0 for any other exit, or -errno. (Python would read eight fields for it, each
 * as slow as a system call.)
 */
int64_t kvm_run_once(int vcpu_fd, const struct kvm_run *run, struct activity *activity);

/* The shared page of a vCPU; NULL and errno where it can't be mapped. */
struct kvm_run *kvm_map_run(int vcpu_fd, size_t size);
int kvm_unmap_run(struct kvm_run *run, size_t size);

/* Two fields of an exit whose structs have no name that cffi could use. */
uint64_t kvm_entry_failure(const struct kvm_run *run);
uint32_t kvm_suberror(const struct kvm_run *run);

/*
 * Whether this CPU can run a guest by itself. A KVM without VMX and SVM under it emulates the
 * guest's kernel mode, where a unikernel spends all its time.
 * CPUID bits: Intel SDM volume 2A (leaf 1, ECX 5), AMD APM volume 3 (leaf 80000001h, ECX 2).
 */
int kvm_is_hardware(void);

/*
 * System calls of the sandbox; sandbox.h has what each function does.
 *
 * The rule here: no policy. What is allowed is in seccomp/.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <malloc.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sandbox.h"

#define CAPABILITIES 64 /* linux/capability.h */

struct sandbox_violation {
    char magic[4];
    int32_t number; /* of the system call */
    uint32_t arch;  /* AUDIT_ARCH_* */
};

_Static_assert(sizeof(struct sandbox_violation) == 12, "struct sandbox_violation");
/* libseccomp's struct scmp_arg_cmp, which it takes an array of. */
_Static_assert(sizeof(struct seccomp_compare) == 24, "struct seccomp_compare");
_Static_assert(offsetof(struct seccomp_compare, a) == 8, "struct seccomp_compare");

long sandbox_call(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e)
{
    return syscall(number, a, b, c, d, e);
}

int sandbox_empty_bounding_set(void)
{
    for (unsigned long number = 0; number < CAPABILITIES; number++) {
        const int present = prctl(PR_CAPBSET_READ, number);
        if (present < 0) /* EINVAL: this kernel has no more */
            return 0;
        if (present && prctl(PR_CAPBSET_DROP, number))
            return -1;
    }
    return 0;
}

static struct {
    void *(*init)(uint32_t);
    void (*release)(void *);
    int (*attr_set)(void *, int, uint32_t);
    int (*resolve)(const char *);
    char *(*name)(uint32_t, int);
    int (*priority)(void *, int, uint8_t);
    int (*add)(void *, uint32_t, int, unsigned int, const struct seccomp_compare *);
    int (*bpf)(const void *, int);
} seccomp;

const char *seccomp_load(const char *library)
{
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return dlerror();
    *(void **)&seccomp.init = dlsym(handle, "seccomp_init");
    *(void **)&seccomp.release = dlsym(handle, "seccomp_release");
    *(void **)&seccomp.attr_set = dlsym(handle, "seccomp_attr_set");
    *(void **)&seccomp.resolve = dlsym(handle, "seccomp_syscall_resolve_name");
    *(void **)&seccomp.name = dlsym(handle, "seccomp_syscall_resolve_num_arch");
    *(void **)&seccomp.priority = dlsym(handle, "seccomp_syscall_priority");
    *(void **)&seccomp.add = dlsym(handle, "seccomp_rule_add_exact_array");
    *(void **)&seccomp.bpf = dlsym(handle, "seccomp_export_bpf");
    int whole = seccomp.init && seccomp.release && seccomp.attr_set && seccomp.resolve &&
                seccomp.name && seccomp.priority && seccomp.add && seccomp.bpf;
    return whole ? NULL : "it lacks functions of libseccomp 2.4";
}

void sandbox_settle_malloc(void)
{
#ifdef __GLIBC__
    mallopt(M_MMAP_MAX, 0);
#endif
}

int sandbox_install(const void *code, uint32_t length)
{
    struct sock_fprog program = {
        .len = (unsigned short)length,
        .filter = (struct sock_filter *)code,
    };
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

void *seccomp_new(uint32_t action) { return seccomp.init(action); }

void seccomp_free(void *filter) { seccomp.release(filter); }

int seccomp_set(void *filter, int attribute, uint32_t value)
{
    return seccomp.attr_set(filter, attribute, value);
}

int seccomp_number(const char *name) { return seccomp.resolve(name); }

char *seccomp_name(int number) { return seccomp.name(0, number); } /* 0: native architecture */

int seccomp_prefer(void *filter, int number, uint8_t priority)
{
    return seccomp.priority(filter, number, priority);
}

int seccomp_allow(void *filter, int number, unsigned int count,
                  const struct seccomp_compare *compares)
{
    return seccomp.add(filter, SECCOMP_RET_ALLOW, number, count, compares);
}

int seccomp_write(void *filter, int fd) { return seccomp.bpf(filter, fd); }

static _Atomic int report_fd = -1;

/*
 * The handler is reset when it runs (SA_RESETHAND), and it ends with a call that no policy allows:
 * the process dies of SIGSYS, as without a handler.
 */
static void on_violation(int signo, siginfo_t *info, void *context)
{
    struct sandbox_violation report = {
        .magic = {0, 'S', 'Y', 'S'},
        .number = info->si_syscall,
        .arch = info->si_arch,
    };
    (void)signo, (void)context;
    (void)!write(report_fd, &report, sizeof report);
    for (;;)
        syscall(SYS_execve, NULL, NULL, NULL);
}

int sandbox_report_to(int fd)
{
    struct sigaction action = {
        .sa_sigaction = on_violation,
        .sa_flags = SA_SIGINFO | SA_RESETHAND | SA_NODEFER,
    };
    report_fd = fd;
    return sigaction(SIGSYS, &action, NULL);
}

/*
 * What the sandbox needs of the host and Python has no face for: bare system calls, the library
 * that compiles filters, and the last words of a process that broke its policy.
 *
 * The rule here: no policy. What is allowed stands in seccomp/, what is done in tender/sandbox/sandbox.py.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <malloc.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "sandbox_install.h"
#include "stop.h"

#ifndef CLONE_NEWCGROUP
#define CLONE_NEWCGROUP 0x02000000
#endif
/* One number on all machines (linux, asm-generic/unistd.h); older headers do not have them. */
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

static long sandbox_call(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d,
                         uintptr_t e)
{
    return syscall(number, a, b, c, d, e);
}

/*
 * libseccomp, found at run time: the tender runs without it where the sandbox is off. Its types
 * as its manual seccomp_rule_add(3) has them.
 */
struct seccomp_compare {
    unsigned int arg;
    int op;
    uint64_t a, b;
};

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

/* NULL, or why there is no libseccomp. */
static const char *seccomp_load(const char *library)
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

/*
 * From here on, no block of malloc's is a mapping of its own: a large one that grows would be
 * moved by mremap(), a call that nothing else needs.
 */
static void sandbox_settle_malloc(void)
{
#ifdef __GLIBC__
    mallopt(M_MMAP_MAX, 0);
#endif
}

static void *seccomp_new(uint32_t action) { return seccomp.init(action); }

static void seccomp_free(void *filter) { seccomp.release(filter); }

static int seccomp_set(void *filter, int attribute, uint32_t value)
{
    return seccomp.attr_set(filter, attribute, value);
}

static int seccomp_number(const char *name) { return seccomp.resolve(name); }

/* The name of a system call of this machine; the caller frees it. 0: native architecture. */
static char *seccomp_name(int number) { return seccomp.name(0, number); }

static int seccomp_prefer(void *filter, int number, uint8_t priority)
{
    return seccomp.priority(filter, number, priority);
}

static int seccomp_allow(void *filter, int number, unsigned int count,
                         const struct seccomp_compare *compares)
{
    return seccomp.add(filter, SECCOMP_RET_ALLOW, number, count, compares);
}

static int seccomp_write(void *filter, int fd) { return seccomp.bpf(filter, fd); }

/*
 * The last words: a child of a program that embeds the tender traps its violations, so that the
 * program learns which call it was. The handler is gone when it runs (SA_RESETHAND), and it ends
 * with a call that no policy allows: the process dies of SIGSYS, as without a handler.
 */
static int sandbox_report_fd = -1;

static void sandbox_on_violation(int signo, siginfo_t *info, void *context)
{
    struct sandbox_violation words = {
        .magic = SANDBOX_VIOLATION,
        .number = info->si_syscall,
        .arch = info->si_arch,
    };
    (void)signo, (void)context;
    (void)!write(sandbox_report_fd, &words, sizeof words);
    for (;;)
        syscall(SYS_execve, NULL, NULL, NULL);
}

static int sandbox_report_to(int fd)
{
    struct sigaction action = {
        .sa_sigaction = sandbox_on_violation,
        .sa_flags = SA_SIGINFO | SA_RESETHAND | SA_NODEFER,
    };
    sandbox_report_fd = fd;
    return sigaction(SIGSYS, &action, NULL);
}

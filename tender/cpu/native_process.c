/*
 * The process of a guest on the native CPU, from its start to its end; native.h has what each
 * function does.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "native.h"
#include "tender/sandbox/constants.h"

#define SIGNAL_FRAME 4096 /* a frame beside XSAVE's area, and the handler */
#define HWCAP2_FSGSBASE_BIT (1 << 1)
#ifndef MFD_EXEC
#define MFD_EXEC 0x10
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif
#ifndef AT_MINSIGSTKSZ
#define AT_MINSIGSTKSZ 51
#endif

_Static_assert(sizeof(struct sock_filter) == sizeof(uint64_t), "struct sock_filter");

int native_memfd(const char *name, uint64_t size, int executable)
{
    unsigned int flags = MFD_CLOEXEC | (executable ? MFD_EXEC : MFD_ALLOW_SEALING);
    int fd = (int)syscall(SYS_memfd_create, name, flags);
    if (fd < 0 && errno == EINVAL) /* Linux before 6.3 has no MFD_EXEC: all are executable */
        fd = (int)syscall(SYS_memfd_create, name, flags & ~MFD_EXEC);
    if (fd < 0 || executable)
        return fd;
    if (ftruncate(fd, (off_t)size) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

void *native_map(void *at, uint64_t size, int fd)
{
    int flags = MAP_SHARED | (at ? MAP_FIXED : 0);
    void *mapped = mmap(at, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    return mapped == MAP_FAILED ? NULL : mapped;
}

int native_unmap(void *at, uint64_t size) { return munmap(at, size); }

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (field))
#define LOW(n) ((uint32_t)offsetof(struct seccomp_data, args[n]))
#define HIGH(n) (LOW(n) + 4)
#define IS(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(value), yes, no)

void native_filter(struct native_shared *shared)
{
    const uint64_t turn = NATIVE_SHARED + offsetof(struct native_shared, turn);
    const struct sock_filter filter[] = {
        /* 0*/ LOAD(offsetof(struct seccomp_data, arch)),
        /* 1*/ IS(AUDIT_ARCH_X86_64, 0, 15),
        /* 2*/ LOAD(offsetof(struct seccomp_data, nr)),
        /* 3*/ IS(SYS_rt_sigreturn, 14, 0),
        /* 4*/ IS(SYS_futex, 0, 12),
        /* 5*/ LOAD(LOW(0)), /* the address: our word */
        /* 6*/ IS(turn, 0, 10),
        /* 7*/ LOAD(HIGH(0)),
        /* 8*/ IS(turn >> 32, 0, 8),
        /* 9*/ LOAD(LOW(1)),
        /*10*/ IS(FUTEX_WAIT, 1, 0),
        /*11*/ IS(FUTEX_WAKE, 0, 5),
        /*12*/ LOAD(LOW(3)), /* no timeout: SIGSTOP would make a restart_syscall of it */
        /*13*/ IS(0, 0, 3),
        /*14*/ LOAD(HIGH(3)),
        /*15*/ IS(0, 0, 1),
        /*16*/ BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        /*17*/ BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        /*18*/ BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    _Static_assert(sizeof filter / sizeof *filter <= NATIVE_FILTER_MAX, "the filter");
    memcpy(shared->filter, filter, sizeof filter);
    shared->filter_length = sizeof filter / sizeof *filter;
}

/*
 * clone(2) as vfork(2) does it: the child runs `function` on a stack in this process's memory. It
 * has all signals blocked, as a handler would write to that memory, too.
 */
static int start_child(int (*function)(void *), void *stack_end, void *argument, int *pidfd)
{
    const int flags = CLONE_VM | CLONE_VFORK | (pidfd ? CLONE_PIDFD : 0) | SIGCHLD;
    sigset_t all, before;

    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    const int pid = clone(function, stack_end, flags, argument, pidfd);
    const int error = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return pid;
}

struct start {
    int program_fd;
    int shared_fd;
    int memory_fd;
    int error;
};

/* A descriptor that is not one of those that the program is started with. */
static int aside(int fd) { return fcntl(fd, F_DUPFD_CLOEXEC, NATIVE_MEMORY_FD + 1); }

static int execute(void *argument)
{
    struct start *start = argument;
    char *nothing[] = {NULL};
    sigset_t blocked;

    /* What ends the tender is for the tender; Ctrl-Z stops both. */
    sigfillset(&blocked);
    static const int own[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS, SIGTSTP};
    for (unsigned i = 0; i < sizeof own / sizeof *own; i++)
        sigdelset(&blocked, own[i]);
    sigprocmask(SIG_SETMASK, &blocked, NULL);
    int program = aside(start->program_fd);
    int shared = aside(start->shared_fd);
    int memory = aside(start->memory_fd);
    if (program >= 0 && dup2(shared, NATIVE_SHARED_FD) >= 0 && dup2(memory, NATIVE_MEMORY_FD) >= 0)
        syscall(SYS_execveat, program, "", nothing, nothing, AT_EMPTY_PATH);
    start->error = errno;
    _exit(1);
}

int native_start(int program_fd, int shared_fd, int memory_fd)
{
    struct start start = {program_fd, shared_fd, memory_fd, 0};
    char stack[1 << 14] __attribute__((aligned(16)));
    int pidfd = -1;
    const int pid = start_child(execute, stack + sizeof stack, &start, &pidfd);
    if (pid < 0)
        return -1;
    if (start.error) {
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
        close(pidfd);
        errno = start.error;
        return -1;
    }
    return pidfd;
}

int native_has_ended(const struct native *native)
{
    siginfo_t info = {.si_pid = 0}; /* which stays where there is nothing to report */
    const int options = WEXITED | WNOHANG | WNOWAIT;
    if (waitid(P_PIDFD, (id_t)native->pidfd, &info, options) || !info.si_pid)
        return 0;
    return info.si_code == CLD_EXITED ? -1 : info.si_status;
}

void native_kill(struct native *native)
{
    siginfo_t info;
    if (native->pidfd < 0)
        return;
    syscall(SYS_pidfd_send_signal, native->pidfd, SIGKILL, NULL, 0);
    while (waitid(P_PIDFD, (id_t)native->pidfd, &info, WEXITED) < 0 && errno == EINTR)
        ;
}

int native_missing(void)
{
    if (!(getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE_BIT))
        return 1;
    return getauxval(AT_MINSIGSTKSZ) + SIGNAL_FRAME > NATIVE_STACK_SIZE ? 2 : 0;
}

static int end(void *nothing)
{
    (void)nothing;
    _exit(0);
}

static int can_start_a_process(void)
{
    char stack[1 << 12] __attribute__((aligned(16)));
    const int pid = start_child(end, stack + sizeof stack, NULL, NULL);
    while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR)
        ;
    return pid > 0 || errno != EAGAIN;
}

int native_limit(uint64_t mem_bytes)
{
    struct rlimit limit;
    const uint64_t longest = mem_bytes > NATIVE_SHARED_SIZE ? mem_bytes : NATIVE_SHARED_SIZE;
    if (!getrlimit(RLIMIT_FSIZE, &limit) && limit.rlim_cur < longest)
        return RLIMIT_FSIZE;
    if (getrlimit(RLIMIT_NPROC, &limit) || limit.rlim_cur == RLIM_INFINITY)
        return -1;
    /* Root is not limited, but becomes a user with this process alone. */
    return (geteuid() ? can_start_a_process() : limit.rlim_cur > 1) ? -1 : RLIMIT_NPROC;
}

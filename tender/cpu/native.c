/*
 * The tender's side of the native CPU; native.h has what each function does.
 *
 * The rule here: what lies in the shared region is the guest's word. Each field is read once, and
 * only the address of the frame is used as one, after a check.
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
#include <ucontext.h>
#include <unistd.h>
#include <x86intrin.h>

#include "abi/abi.h"
#include "native.h"
#include "tender/engine/engine.h"
#include "tender/host/ticks.h"
#include "tender/sandbox/constants.h"

#define SIGNAL_FRAME 4096 /* a frame beside XSAVE's area, and the handler */
#define HWCAP2_FSGSBASE_BIT (1 << 1)
#define LOOK_NS 100000000 /* how often to look whether the process is alive */
#define MAX_SKIP 1000    /* waits */
#define TRAP_GP 13
#define OUT_DX_EAX 0xef
#define RDTSC_0 0x0f
#define RDTSC_1 0x31
#define FXSAVE_SIZE 512
#define FXSAVE_OWN 416 /* behind are words of the kernel's */
#ifndef MFD_EXEC
#define MFD_EXEC 0x10
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x1000
#endif
#ifndef AT_MINSIGSTKSZ
#define AT_MINSIGSTKSZ 51
#endif

_Static_assert(sizeof(struct native_shared) <= NATIVE_STACK, "struct native_shared");
_Static_assert(NATIVE_STACK + NATIVE_STACK_SIZE == NATIVE_SHARED_SIZE, "the signal stack");
_Static_assert(sizeof(struct sock_filter) == sizeof(uint64_t), "struct sock_filter");
PTENDER_SIZE(struct native_range, 24);

/* In the order of boot.x86_64.REGISTERS. */
static const uint8_t gregs[NATIVE_REGISTERS] = {
    REG_RAX, REG_RBX, REG_RCX, REG_RDX, REG_RSI, REG_RDI, REG_RSP, REG_RBP, REG_R8,
    REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RIP, REG_EFL,
};

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

/* For how many cycles to spin in the next wait. */
static uint64_t next_spin(const struct native *native, struct native_spin *spin)
{
    if (!spin->skipped)
        return native->spin_cycles;
    spin->skipped--;
    return 0;
}

/* A wait with a spin has ended; `slept`: the spin was in vain. */
static void note_spin(struct native_spin *spin, int slept)
{
    spin->skip = slept ? spin->skip * 2 + 1 : spin->skip / 2;
    if (spin->skip > MAX_SKIP)
        spin->skip = MAX_SKIP;
    spin->skipped = slept ? spin->skip : 0;
}

static void to_guest(struct native *native)
{
    struct native_shared *shared = native->shared;
    if (native->guest_spins)
        note_spin(&native->guest_spin, shared->guest_sleeps != 0);
    native->guest_spins = native->traps_tsc ? 0 : next_spin(native, &native->guest_spin);
    shared->guest_spin = native->guest_spins;
    shared->turn = NATIVE_TURN_GUEST;
    if (shared->guest_sleeps)
        syscall(SYS_futex, &shared->turn, FUTEX_WAKE, 1, NULL, NULL, 0);
    native->is_guests_turn = 1;
}

static int spun_for_guest(struct native *native)
{
    const uint64_t cycles = next_spin(native, &native->tender_spin);
    const uint64_t begun = __rdtsc();
    while (__rdtsc() - begun < cycles) {
        if (native->shared->turn == NATIVE_TURN_TENDER) {
            note_spin(&native->tender_spin, 0);
            return 1;
        }
        __builtin_ia32_pause();
    }
    if (cycles)
        note_spin(&native->tender_spin, 1);
    return 0;
}

/* Wait for the guest: 0, EINTR, ESRCH or EBADMSG. */
static int wait_for_guest(struct native *native)
{
    struct native_shared *shared = native->shared;
    const struct timespec look = {0, LOOK_NS};
    int error = 0;

    if (spun_for_guest(native))
        return 0;
    shared->tender_sleeps = 1;
    for (uint32_t turn; !error && (turn = shared->turn) != NATIVE_TURN_TENDER;) {
        if (native->immediate_exit)
            error = EINTR;
        else if (turn != NATIVE_TURN_GUEST)
            error = EBADMSG; /* FUTEX_WAIT would come back at once, whether the guest lives or not */
        else if (syscall(SYS_futex, &shared->turn, FUTEX_WAIT, NATIVE_TURN_GUEST, &look, NULL, 0)) {
            if (errno == EINTR)
                error = EINTR;
            else if (errno == ETIMEDOUT && native_has_ended(native))
                error = ESRCH;
        }
    }
    shared->tender_sleeps = 0;
    return error;
}

/* The frame of the last trap, NULL where what the guest names is none. */
static ucontext_t *frame_of(const struct native *native)
{
    const uint64_t at = native->frame;
    if (at < NATIVE_STACK || at % 8 || at > NATIVE_SHARED_SIZE - sizeof(ucontext_t))
        return NULL;
    return (ucontext_t *)((uint8_t *)native->shared + at);
}

static int read_trap(struct native *native)
{
    struct native_shared *shared = native->shared;
    native->frame = *(volatile uint64_t *)&shared->context - NATIVE_SHARED;
    const ucontext_t *frame = frame_of(native);
    if (!frame)
        return EBADMSG;
    const volatile greg_t *from = frame->uc_mcontext.gregs;
    for (unsigned i = 0; i < NATIVE_REGISTERS; i++)
        native->registers[i] = (uint64_t)from[gregs[i]];
    native->vector = (uint32_t)from[REG_TRAPNO];
    native->error_code = (uint64_t)from[REG_ERR];
    native->cr2 = (uint64_t)from[REG_CR2];
    native->cs = (uint32_t)from[REG_CSGSFS] & 0xffff;
    native->signo = *(volatile int32_t *)&shared->signo;
    native->code = *(volatile int32_t *)&shared->code;
    native->arch = *(volatile uint32_t *)&shared->arch;
    native->call = *(volatile uint64_t *)&shared->call;
    native->kind = NATIVE_TRAP;
    return 0;
}

static int is_text(const struct native *native, uint64_t address)
{
    for (uint32_t i = 0; i < native->text_count; i++)
        if (native->text[i].start <= address && address < native->text[i].end)
            return 1;
    return 0;
}

#define RAX 0
#define RDX 3
#define RIP 16

/* Whether the trap is a hypercall: `out %eax, (%dx)` in the guest's text. */
static int read_hypercall(struct native *native)
{
    const uint64_t rip = native->registers[RIP];
    const uint32_t number = (native->registers[RDX] & 0xffff) - HVT_HYPERCALL_PIO_BASE;
    if (native->signo != SIGSEGV || native->vector != TRAP_GP || number > HVT_HYPERCALL_HALT)
        return 0;
    if (!is_text(native, rip) || *(const volatile uint8_t *)(native->memory + rip) != OUT_DX_EAX)
        return 0;
    native->kind = NATIVE_HYPERCALL;
    native->number = number;
    native->gpa = (uint32_t)native->registers[RAX];
    native->registers[RIP] = rip + 1;
    frame_of(native)->uc_mcontext.gregs[REG_RIP] = (greg_t)(rip + 1);
    return 1;
}

void native_set_registers(struct native *native)
{
    ucontext_t *frame = frame_of(native);
    for (unsigned i = 0; frame && i < NATIVE_REGISTERS; i++)
        frame->uc_mcontext.gregs[gregs[i]] = (greg_t)native->registers[i];
}

uint64_t native_counter(const struct native *native)
{
    const uint64_t now = __rdtsc();
    if (!native->traps_tsc)
        return now;
    const unsigned __int128 passed = now - native->tsc_then;
    return native->tsc + (uint64_t)(passed * native->tsc_hz / native->machine_hz);
}

/* Whether the trap is an RDTSC in the guest's text, which is answered. */
static int answer_rdtsc(struct native *native)
{
    const uint64_t rip = native->registers[RIP];
    if (!native->traps_tsc || native->signo != SIGSEGV || native->vector != TRAP_GP)
        return 0;
    if (!is_text(native, rip) || !is_text(native, rip + 1))
        return 0;
    const volatile uint8_t *code = native->memory + rip;
    if (code[0] != RDTSC_0 || code[1] != RDTSC_1)
        return 0;
    const uint64_t now = native_counter(native);
    native->registers[RAX] = now & 0xffffffff;
    native->registers[RDX] = now >> 32;
    native->registers[RIP] = rip + 2;
    native_set_registers(native);
    return 1;
}

int native_run(struct native *native)
{
    for (;;) {
        if (!native->is_guests_turn) {
            if (native->immediate_exit) /* a guest that is quick never lets the tender sleep */
                return EINTR;
            to_guest(native);
        }
        guest_enter(native->activity);
        int error = wait_for_guest(native);
        guest_exit(native->activity);
        if (error)
            return error;
        native->is_guests_turn = 0;
        error = read_trap(native);
        if (!error && answer_rdtsc(native))
            continue;
        if (error || !read_hypercall(native) || !native->engine)
            return error;
        struct engine *engine = native->engine;
        if (!engine_answer(engine, native->number, native->gpa))
            return 0;
        if (engine->has_report)
            return EINTR;
    }
}

int native_fpu(struct native *native, void *area, uint64_t size, int set)
{
    ucontext_t *frame = frame_of(native);
    if (!frame || size > NATIVE_STACK_SIZE)
        return -1;
    const uint64_t at = (uint64_t)*(void *volatile *)&frame->uc_mcontext.fpregs - NATIVE_SHARED;
    if (at < NATIVE_STACK || at > NATIVE_SHARED_SIZE - size)
        return -1;
    uint8_t *there = (uint8_t *)native->shared + at;
    if (!set) {
        memcpy(area, there, size);
        return 0;
    }
    memcpy(there, area, FXSAVE_OWN);
    if (size > FXSAVE_SIZE)
        memcpy(there + FXSAVE_SIZE, (uint8_t *)area + FXSAVE_SIZE, size - FXSAVE_SIZE);
    return 0;
}

void native_pause(struct native *native)
{
    syscall(SYS_pidfd_send_signal, native->pidfd, SIGTRAP, NULL, 0);
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

/*
 * The program of a guest's process on the native CPU: it maps guest memory, gives up everything
 * else, and runs the guest's code. What the guest traps is handed to the tender, which decides.
 *
 * The rule here: no libc, no data of its own, nothing decided. The guest can write to the shared
 * region and to its signal stack at any time, and may jump into this text: what holds is the
 * filter, which pins the arguments of the two system calls that it allows.
 */
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/prctl.h>
#include <linux/seccomp.h>
#include <linux/mman.h>
#include <linux/resource.h>

#include <asm/siginfo.h>
#include <asm/signal.h>

#include "native.h"
#include "tender/host/freestanding.h"

#define USER_END 0x7ffffffff000

static struct native_shared *const shared = (struct native_shared *)NATIVE_SHARED;

extern char _end[] __attribute__((visibility("hidden")));

static void futex(int operation, uint32_t value)
{
    call(__NR_futex, (long)&shared->turn, operation, value, 0, 0);
}

static void hand_over(void)
{
    shared->turn = NATIVE_TURN_TENDER;
    if (shared->tender_sleeps)
        futex(FUTEX_WAKE, 1);
    const uint64_t spin = shared->guest_spin;
    for (uint64_t begun = spin ? __builtin_ia32_rdtsc() : 0;
         spin && __builtin_ia32_rdtsc() - begun < spin;) {
        if (shared->turn == NATIVE_TURN_GUEST)
            return;
        __builtin_ia32_pause();
    }
    shared->guest_sleeps = 1;
    while (shared->turn != NATIVE_TURN_GUEST)
        futex(FUTEX_WAIT, NATIVE_TURN_TENDER);
    shared->guest_sleeps = 0;
}

__attribute__((used)) void on_trap(int signo, siginfo_t *info, void *context)
{
    uint64_t base;
    shared->signo = signo;
    shared->code = info->si_code;
    shared->arch = info->si_arch;
    shared->call = (uint64_t)info->si_call_addr;
    shared->context = (uint64_t)context;
    __asm__ volatile("rdfsbase %0" : "=r"(base));
    shared->fs_base = base;
    __asm__ volatile("rdgsbase %0" : "=r"(base));
    shared->gs_base = base;
    hand_over();
    base = shared->fs_base;
    __asm__ volatile("wrfsbase %0" : : "r"(base));
    base = shared->gs_base;
    __asm__ volatile("wrgsbase %0" : : "r"(base));
}

SIGNAL_HANDLER(on_trap)

__attribute__((noreturn)) static void fail(long error)
{
    shared->failed = (int32_t)-error;
    shared->turn = NATIVE_TURN_TENDER;
    futex(FUTEX_WAKE, 1);
    for (;;)
        call(__NR_exit_group, 1, 0, 0, 0, 0);
}

static long check(long result)
{
    if (result < 0)
        fail(result);
    return result;
}

static void map_memory(void)
{
    uint64_t end = NATIVE_MEMORY_START;
    for (uint32_t i = 0; i < shared->range_count; i++) {
        const struct native_range *range = &shared->ranges[i];
        check(call6(__NR_mmap, (long)range->start, (long)(range->end - range->start), range->prot,
                    MAP_SHARED | MAP_FIXED_NOREPLACE, NATIVE_MEMORY_FD, (long)range->start));
        end = range->end;
    }
    /* The first stack, the environment, the vDSO. */
    unmap(end, NATIVE_PROGRAM);
    unmap(((uint64_t)_end + PAGE - 1) & -PAGE, NATIVE_SHARED);
    unmap(NATIVE_SHARED + NATIVE_SHARED_SIZE, USER_END);
}

static void handle_traps(void)
{
    static const uint8_t signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS};
    stack_t stack = {
        .ss_sp = (void *)(NATIVE_SHARED + NATIVE_STACK),
        .ss_size = NATIVE_STACK_SIZE,
    };
    struct sigaction action = {
        .sa_handler = (__sighandler_t)handler,
        .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTORER_FLAG,
        .sa_restorer = restorer,
        .sa_mask = ~0ul,
    };
    check(call(__NR_sigaltstack, (long)&stack, 0, 0, 0, 0));
    for (unsigned i = 0; i < sizeof signals; i++)
        check(call(__NR_rt_sigaction, signals[i], (long)&action, 0, sizeof action.sa_mask, 0));
}

static void give_up(void)
{
    static const uint8_t limits[] = {RLIMIT_CORE, RLIMIT_NOFILE, RLIMIT_MSGQUEUE, RLIMIT_MEMLOCK};
    const struct rlimit none = {0, 0};

    for (int fd = 0; call(__NR_close_range, fd, ~0u, 0, 0, 0) < 0 && fd < 1024; fd++)
        call(__NR_close, fd, 0, 0, 0, 0); /* Linux before 5.9 */
    for (unsigned i = 0; i < sizeof limits; i++)
        check(call(__NR_prlimit64, 0, limits[i], (long)&none, 0, 0));
    check(call(__NR_prctl, PR_SET_NAME, (long)shared->comm, 0, 0, 0));
    check(call(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0));
    if (shared->traps_tsc)
        check(call(__NR_prctl, PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0));
    check(call(__NR_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0));
    if (call(__NR_getppid, 0, 0, 0, 0, 0) != shared->parent)
        call(__NR_exit_group, 1, 0, 0, 0, 0); /* it has ended already */
    check(call(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    struct sock_fprog program = {
        .len = (unsigned short)shared->filter_length,
        .filter = (struct sock_filter *)shared->filter,
    };
    check(call(__NR_seccomp, SECCOMP_SET_MODE_FILTER, 0, (long)&program, 0, 0));
}

/* On the signal stack, which is free until the first trap: that hands over a frame, in which the
 * tender puts the guest's first registers. */
__attribute__((used, noreturn)) void run(void)
{
    map_memory();
    handle_traps();
    give_up();
    for (;;)
        __asm__ volatile("xor %%eax, %%eax; ud2" : : : "rax");
}

__attribute__((used, noreturn)) void start(void)
{
    long mapped = call6(__NR_mmap, NATIVE_SHARED, NATIVE_SHARED_SIZE, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_FIXED_NOREPLACE, NATIVE_SHARED_FD, 0);
    if (mapped != NATIVE_SHARED)
        call(__NR_exit_group, 1, 0, 0, 0, 0);
    __asm__ volatile("mov %0, %%rsp; xor %%ebp, %%ebp; call run"
                     :
                     : "r"(NATIVE_SHARED + NATIVE_SHARED_SIZE)
                     : "memory");
    __builtin_unreachable();
}

__asm__(".globl _start\n"
        "_start:\n"
        "    xor %ebp, %ebp\n"
        "    and $-16, %rsp\n"
        "    call start\n");

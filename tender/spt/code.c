/*
 * The code that makes a guest of the tender's process, and says why the guest died.
 *
 * It is copied into a region that the kernel places, beside its plan (spt.h), and unmaps everything
 * else but guest memory: there is no libc, no Python and no environment when the guest runs.
 *
 * The rule here: no libc, no data, nothing outside the region. The guest can read and write the
 * plan at any time and may jump into this text: what holds is the filter.
 */
#include <linux/filter.h>
#include <linux/mman.h>
#include <linux/prctl.h>
#include <linux/seccomp.h>

#include <asm/prctl.h>

#include "abi/spt.h"
#include "code.h"

#define USER_END 0x7ffffffff000ul
#define LAST_SIGNAL 64
#define ARCH_SHSTK_DISABLE_CODE 0x5002 /* asm/prctl.h of Linux 6.6 */
#define EXIT_FAILURE 1
#define ABORT 255
#define EXIT_SIGNAL 128 /* what a shell adds to the number of a signal */
#define MXCSR_DEFAULT 0x1f80
#define FCW_DEFAULT 0x37f

static void exit_with(const struct spt_plan *plan, int status)
{
    for (;;)
        call(plan->traps_exit ? __NR_exit : __NR_exit_group, status, 0, 0, 0, 0);
}

/* End by this signal. It is blocked in the handler: what would raise it again ends the process. */
__attribute__((noreturn)) static void die(int signo)
{
    for (;;)
        switch (signo) {
        case SIGSYS:
            call(__NR_execve, 0, 0, 0, 0, 0);
            break;
        case SIGILL: __asm__ volatile("ud2"); break;
        case SIGTRAP: __asm__ volatile("int3"); break;
        case SIGFPE: __asm__ volatile("div %b0" : : "q"(0) : "rax"); break;
        case SIGBUS: /* #SS, by an address that is not canonical */
            __asm__ volatile("mov %0, %%rsp; push %0" : : "r"(1ul << 62));
            break;
        default: __asm__ volatile("hlt"); break;
        }
}

/* The guest ends: a core file is written of an abort, if one was asked for. */
static void end(struct spt_plan *plan, int status, const struct sigcontext *cpu)
{
    char core[CORE_NAME_MAX] = "";
    if (status == ABORT)
        core_dump(plan, cpu, core);
    report_halted(plan, status, core);
    exit_with(plan, status);
}

__attribute__((used)) void on_signal(int signo, siginfo_t *info, void *context)
{
    struct spt_plan *plan = plan_here();
    struct sigcontext *cpu = &((struct ucontext *)context)->uc_mcontext;
    struct message message;
    char core[CORE_NAME_MAX];

    if (signo == SIGTERM || signo == SIGINT) {
        message_begin(plan, &message);
        message_put(&message, "Exiting on signal ");
        message_put_number(&message, (unsigned)signo, 10);
        if (!plan->is_report)
            message_send(plan, &message);
        report_stopped(plan, signo);
        exit_with(plan, EXIT_SIGNAL + signo);
    }
    if (signo == SIGSYS && overlay_answer(plan, info, cpu))
        return;
    if (signo == SIGSYS && plan->traps_exit && info->si_syscall == __NR_exit_group)
        end(plan, (uint8_t)cpu->rdi, cpu);
    if (plan->is_report) /* a program takes nothing after the words on the end */
        core_dump(plan, cpu, core);
    if (signo == SIGSYS)
        message_violation(plan, info);
    else
        message_exception(plan, signo, cpu);
    if (!plan->is_report)
        core_dump(plan, cpu, core);
    if (signo == SIGSYS)
        report_violation(plan, info, cpu, core);
    else
        report_exception(plan, signo, cpu, core);
    die(signo);
}

SIGNAL_HANDLER(on_signal)

__attribute__((noreturn)) static void fail(const struct spt_plan *plan, const char *what, long error)
{
    struct message message;
    message_begin(plan, &message);
    message_put(&message, "cannot ");
    message_put(&message, what);
    message_put(&message, ": errno ");
    message_put_number(&message, (uint64_t)-error, 10);
    message_send(plan, &message);
    for (;;) /* before the filter */
        call(__NR_exit_group, EXIT_FAILURE, 0, 0, 0, 0);
}

static void check(const struct spt_plan *plan, const char *what, long result)
{
    if (result < 0)
        fail(plan, what, result);
}

static void move_memory(const struct spt_plan *plan)
{
    const uint64_t memory_end = plan->memory + plan->mem_size;
    const uint64_t region_end = plan->region + plan->region_size;
    const int memory_first = plan->memory < plan->region;

    unmap(0, memory_first ? plan->memory : plan->region);
    unmap(memory_first ? memory_end : region_end, memory_first ? plan->region : plan->memory);
    unmap(memory_first ? region_end : memory_end, USER_END);
    const long size = (long)(plan->mem_size - SPT_GUEST_START);
    check(plan, "move guest memory to 0x10000",
          call(__NR_mremap, (long)plan->memory + SPT_GUEST_START, size, size,
               MREMAP_MAYMOVE | MREMAP_FIXED, SPT_GUEST_START));
    unmap(plan->memory, plan->memory + SPT_GUEST_START);
    for (uint32_t i = 0; i < plan->range_count; i++) {
        const struct spt_range *range = &plan->ranges[i];
        check(plan, "protect guest memory",
              call(__NR_mprotect, (long)range->start, (long)(range->end - range->start),
                   (long)range->prot, 0, 0));
    }
}

static void set_handler(const struct spt_plan *plan, int signo, void *function)
{
    struct sigaction action = {
        .sa_handler = (__sighandler_t)function,
        .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTORER_FLAG,
        .sa_restorer = restorer,
        .sa_mask = ~(1ul << (SIGTERM - 1) | 1ul << (SIGINT - 1)),
    };
    if (!function)
        action.sa_flags = SA_RESTORER_FLAG;
    check(plan, "handle signals",
          call(__NR_rt_sigaction, signo, (long)&action, 0, sizeof action.sa_mask, 0));
}

/* Python's handlers are gone; what is ignored stays ignored, but for requests to end. */
static void set_handlers(const struct spt_plan *plan)
{
    static const uint8_t exceptions[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS};
    static const uint8_t requests[] = {SIGTERM, SIGINT};
    const uint64_t none = 0;
    struct sigaction action;
    stack_t stack = {
        .ss_sp = (void *)(plan->stack_end - plan->stack_size),
        .ss_size = plan->stack_size,
    };

    for (int signo = 1; signo <= LAST_SIGNAL; signo++)
        if (!call(__NR_rt_sigaction, signo, 0, (long)&action, sizeof action.sa_mask, 0) &&
            action.sa_handler != SIG_IGN && action.sa_handler != SIG_DFL)
            set_handler(plan, signo, 0);
    const int handles_requests = plan->is_init || plan->has_report;
    for (unsigned i = 0; i < sizeof requests; i++)
        set_handler(plan, requests[i], handles_requests ? (void *)handler : 0);
    for (unsigned i = 0; i < sizeof exceptions; i++)
        set_handler(plan, exceptions[i], (void *)handler);
    check(plan, "set a signal stack", call(__NR_sigaltstack, (long)&stack, 0, 0, 0, 0));
    call(__NR_rt_sigprocmask, SIG_SETMASK, (long)&none, 0, sizeof none, 0);
}

static void install_filter(const struct spt_plan *plan)
{
    const struct sock_fprog program = {
        .len = (unsigned short)plan->filter_length,
        .filter = (struct sock_filter *)plan->filter,
    };
    call(__NR_set_robust_list, 0, 24, 0, 0, 0);
    call(__NR_arch_prctl, ARCH_SHSTK_DISABLE_CODE, 1, 0, 0, 0); /* it would be unmapped by now */
    call(__NR_arch_prctl, ARCH_SET_GS, 0, 0, 0, 0);
    call(__NR_arch_prctl, ARCH_SET_FS, 0, 0, 0, 0);
    check(plan, "set no_new_privs", call(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    check(plan, "install the filter",
          call(__NR_seccomp, SECCOMP_SET_MODE_FILTER, 0, (long)&program, 0, 0));
}

/*
 * The vector registers hold bytes of the tender's, so all of the state is set to its first one. The
 * area is the low end of the stack, zero until now: a CPU may look at all of the state's size.
 */
static void clear_vectors(const struct spt_plan *plan)
{
    uint32_t a = 1, b, c = 0, d;
    uint8_t *area = (uint8_t *)((plan->stack_end - plan->stack_size + 63) & ~63ul);

    *(uint16_t *)area = FCW_DEFAULT;
    *(uint32_t *)(area + 24) = MXCSR_DEFAULT;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (c & 1u << 27) /* OSXSAVE */
        __asm__ volatile("xrstor64 (%0)" : : "r"(area), "a"(~0u), "d"(~0u) : "memory");
    else
        __asm__ volatile("fxrstor64 (%0)" : : "r"(area) : "memory");
}

__attribute__((used, noreturn)) void become(struct spt_plan *plan)
{
    move_memory(plan);
    set_handlers(plan);
    install_filter(plan);
    clear_vectors(plan);
    register uint64_t boot_info __asm__("rdi") = SPT_BOOT_INFO;
    register uint64_t stack __asm__("rcx") = plan->mem_size - 8;
    __asm__ volatile("push $0x202; popfq\n"
                     "mov %%rcx, %%rsp\n"
                     "xor %%ebx, %%ebx; xor %%ecx, %%ecx; xor %%edx, %%edx; xor %%esi, %%esi\n"
                     "xor %%ebp, %%ebp; xor %%r8d, %%r8d; xor %%r9d, %%r9d; xor %%r10d, %%r10d\n"
                     "xor %%r11d, %%r11d; xor %%r12d, %%r12d; xor %%r13d, %%r13d\n"
                     "xor %%r14d, %%r14d; xor %%r15d, %%r15d\n"
                     "jmp *%%rax\n"
                     :
                     : "r"(boot_info), "r"(stack), "a"(plan->entry)
                     : "memory");
    __builtin_unreachable();
}

#define TEXT(value) TEXT_OF(value)
#define TEXT_OF(value) #value

__asm__(".section .entry, \"ax\"\n"
        ".globl code_start\n"
        "code_start:\n"
        "    lea code_start(%rip), %rdi\n"
        "    add $" TEXT(SPT_PLAN) ", %rdi\n"
        "    mov 16(%rdi), %rsp\n" /* stack_end */
        "    xor %ebp, %ebp\n"
        "    call become\n"
        ".text\n");

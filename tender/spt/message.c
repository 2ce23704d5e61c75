/*
 * What an spt guest's process says before it dies; code.h has what each function does.
 */
#include "code.h"

#define PF 14
#define PF_WRITE 2
#define PF_EXECUTE 16

void message_put(struct message *to, const char *text)
{
    while (*text && to->length < SPT_MESSAGE_MAX - 1)
        to->text[to->length++] = *text++;
}

void message_put_number(struct message *to, uint64_t value, unsigned base)
{
    char digits[21];
    unsigned at = sizeof digits - 1;
    digits[at] = 0;
    do {
        unsigned digit = value % base;
        digits[--at] = (char)(digit < 10 ? '0' + digit : 'a' + digit - 10);
        value /= base;
    } while (value);
    message_put(to, base == 16 ? "0x" : "");
    message_put(to, digits + at);
}

void message_begin(const struct spt_plan *plan, struct message *to)
{
    static const char report[4] = {0, 'C', 'P', 'U'}; /* embed/protocol.py */
    to->length = 0;
    if (!plan->is_report) {
        message_put(to, plan->program);
        message_put(to, ": ");
        return;
    }
    for (; to->length < sizeof report; to->length++)
        to->text[to->length] = report[to->length];
}

void message_send(const struct spt_plan *plan, struct message *message)
{
    if (!plan->is_report)
        message->text[message->length++] = '\n';
    call(__NR_write, plan->message_fd, (long)message->text, message->length, 0, 0);
}

static const char *exception(uint64_t vector)
{
    switch (vector) {
    case 0: return "divide error";
    case 1: return "debug exception";
    case 3: return "breakpoint";
    case 4: return "overflow";
    case 6: return "invalid opcode";
    case 12: return "stack-segment fault";
    case 13: return "general protection fault";
    case PF: return "page fault";
    case 16: return "floating-point exception";
    case 17: return "alignment check";
    case 19: return "SIMD floating-point exception";
    default: return "CPU exception";
    }
}

static const char *name(int signo)
{
    switch (signo) {
    case SIGSEGV: return "SIGSEGV";
    case SIGBUS: return "SIGBUS";
    case SIGILL: return "SIGILL";
    case SIGFPE: return "SIGFPE";
    default: return "SIGTRAP";
    }
}

void message_put_exception(struct message *to, int signo, const struct sigcontext *cpu)
{
    message_put(to, exception(cpu->trapno));
    message_put(to, " (");
    message_put(to, name(signo));
    message_put(to, ")");
    if (cpu->trapno == PF) {
        message_put(to, cpu->err & PF_EXECUTE ? ", execute" :
                        cpu->err & PF_WRITE   ? ", write" :
                                                ", read");
        message_put(to, " at address=");
        message_put_number(to, cpu->cr2, 16);
    }
    message_put(to, ", rip=");
    message_put_number(to, cpu->rip, 16);
}

void message_exception(const struct spt_plan *plan, int signo, const struct sigcontext *cpu)
{
    struct message message;

    message_begin(plan, &message);
    message_put_exception(&message, signo, cpu);
    message_send(plan, &message);
}

void message_put_violation(struct message *to, const siginfo_t *info)
{
    message_put(to, "the guest made a system call that is not allowed: ");
    message_put_number(to, (uint32_t)info->si_syscall, 10);
    message_put(to, ", rip=");
    message_put_number(to, (uint64_t)info->si_call_addr, 16);
}

/* What sandbox.c reports of a tender: struct sandbox_violation. */
static void send_violation(const struct spt_plan *plan, const siginfo_t *info)
{
    const struct {
        char magic[4];
        int32_t number;
        uint32_t arch;
    } report = {{0, 'S', 'Y', 'S'}, info->si_syscall, info->si_arch};
    call(__NR_write, plan->message_fd, (long)&report, sizeof report, 0, 0);
}

void message_violation(const struct spt_plan *plan, const siginfo_t *info)
{
    struct message message;

    if (plan->is_report) {
        send_violation(plan, info);
        return;
    }
    message_begin(plan, &message);
    message_put_violation(&message, info);
    message_send(plan, &message);
}

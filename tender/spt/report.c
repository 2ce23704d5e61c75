/*
 * How an spt guest ended, as one JSON object: the fields of Outcome.as_dict() (tender/outcome.py).
 *
 * The rule here: what is put into a string needs no escape. The versions are the tail, which Python
 * has made. There are no statistics, because nobody counts.
 */
#include "code.h"

#define REPORT_MAX 4096 /* bytes: seccomp/spt-report.policy */
#define FAILURE 1       /* the status of a guest that did not end by itself */

struct report {
    unsigned length;
    char text[REPORT_MAX];
};

static void put(struct report *to, const char *text)
{
    while (*text && to->length < REPORT_MAX)
        to->text[to->length++] = *text++;
}

static void put_message(struct report *to, struct message *message)
{
    message->text[message->length] = 0; /* message_put leaves room */
    put(to, message->text);
}

static void put_number(struct report *to, uint64_t value)
{
    struct message digits = {.length = 0};
    message_put_number(&digits, value, 10);
    put_message(to, &digits);
}

static void begin(struct report *to, const char *reason, uint64_t status)
{
    to->length = 0;
    put(to, "{\"reason\": \"");
    put(to, reason);
    put(to, "\", \"status\": ");
    put_number(to, status);
}

static void put_signal(struct report *to, int signo)
{
    put(to, ", \"signal\": ");
    put_number(to, (unsigned)signo);
}

static void put_error(struct report *to, const char *type, struct message *text)
{
    put(to, ", \"error\": {\"type\": \"");
    put(to, type);
    put(to, "\", \"text\": \"");
    put_message(to, text);
    put(to, "\"");
}

static void put_registers(struct report *to, const struct sigcontext *cpu)
{
    static const char names[][8] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8",
                                    "r9",  "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"};
    const uint64_t values[] = {cpu->rax, cpu->rbx, cpu->rcx, cpu->rdx, cpu->rsi, cpu->rdi,
                               cpu->rsp, cpu->rbp, cpu->r8,  cpu->r9,  cpu->r10, cpu->r11,
                               cpu->r12, cpu->r13, cpu->r14, cpu->r15, cpu->rip, cpu->eflags};
    for (unsigned i = 0; i < sizeof values / sizeof *values; i++) {
        put(to, i ? ", \"" : ", \"registers\": {\"");
        put(to, names[i]);
        put(to, "\": ");
        put_number(to, values[i]);
    }
    put(to, "}");
}

/* One write: a pipe's reader gets all of it. */
static void end(struct spt_plan *plan, struct report *to, const char *core)
{
    if (core[0]) {
        put(to, ", \"core\": \"");
        put(to, core);
        put(to, "\"");
    }
    const char *tail = (const char *)plan->report_tail;
    for (uint64_t i = 0; i < plan->report_tail_size && to->length < REPORT_MAX; i++)
        to->text[to->length++] = tail[i];
    const long count = call(__NR_write, plan->report_fd, (long)to->text, to->length, 0, 0);
    if (count >= 0)
        return;
    struct message message;
    message_begin(plan, &message);
    message_put(&message, "report: write: errno ");
    message_put_number(&message, (uint64_t)-count, 10);
    message_send(plan, &message);
}

/* A request to end may come while another end is being written. */
static int is_wanted(struct spt_plan *plan)
{
    const uint32_t wanted = plan->has_report;
    plan->has_report = 0;
    return wanted;
}

void report_halted(struct spt_plan *plan, int status, const char *core)
{
    struct report report;
    if (!is_wanted(plan))
        return;
    begin(&report, "halted", (unsigned)status);
    end(plan, &report, core);
}

void report_stopped(struct spt_plan *plan, int signo)
{
    struct report report;
    if (!is_wanted(plan))
        return;
    begin(&report, "stopped", FAILURE);
    put_signal(&report, signo);
    end(plan, &report, "");
}

void report_exception(struct spt_plan *plan, int signo, const struct sigcontext *cpu,
                      const char *core)
{
    struct report report;
    struct message message = {.length = 0};
    if (!is_wanted(plan))
        return;
    begin(&report, "fault", FAILURE);
    put_signal(&report, signo);
    message_put_exception(&message, signo, cpu);
    put_error(&report, "GuestFault", &message);
    put(&report, "}");
    put_registers(&report, cpu);
    end(plan, &report, core);
}

void report_violation(struct spt_plan *plan, const siginfo_t *info, const struct sigcontext *cpu,
                      const char *core)
{
    struct report report;
    struct message message = {.length = 0};
    if (!is_wanted(plan))
        return;
    begin(&report, "sandbox", FAILURE);
    message_put_violation(&message, info);
    put_error(&report, "SandboxViolation", &message);
    put(&report, ", \"number\": ");
    put_number(&report, (uint32_t)info->si_syscall);
    put(&report, "}");
    put_registers(&report, cpu);
    end(plan, &report, core);
}

/*
 * What the files of an spt guest's own code know of each other; spt.h has the plan.
 */
#pragma once

#include <asm/sigcontext.h>
#include <asm/siginfo.h>
#include <asm/signal.h>
#include <asm/ucontext.h>

#include "spt.h"
#include "tender/host/freestanding.h"

#pragma GCC visibility push(hidden)

extern char code_start[];

static inline struct spt_plan *plan_here(void)
{
    return (struct spt_plan *)(code_start + SPT_PLAN);
}

/* message.c: a message of one line, to standard error or to the program, or a part of it. */
struct message {
    unsigned length;
    char text[SPT_MESSAGE_MAX];
};

void message_begin(const struct spt_plan *plan, struct message *to);
void message_put(struct message *to, const char *text);
void message_put_number(struct message *to, uint64_t value, unsigned base);
void message_send(const struct spt_plan *plan, struct message *message);
void message_put_exception(struct message *to, int signo, const struct sigcontext *cpu);
void message_put_violation(struct message *to, const siginfo_t *info);
void message_exception(const struct spt_plan *plan, int signo, const struct sigcontext *cpu);
void message_violation(const struct spt_plan *plan, const siginfo_t *info);

#define CORE_NAME_MAX 300 /* an errno and a file name: core_helper.py */

/*
 * core.c: write and name the core file, if one is wanted, and say its name. `name` gets it, empty
 * where there is none.
 */
void core_dump(const struct spt_plan *plan, const struct sigcontext *cpu,
               char name[CORE_NAME_MAX]);

/* report.c: write how the guest ended, if that is wanted (`--report`). */
void report_halted(struct spt_plan *plan, int status, const char *core);
void report_stopped(struct spt_plan *plan, int signo);
void report_exception(struct spt_plan *plan, int signo, const struct sigcontext *cpu,
                      const char *core);
void report_violation(struct spt_plan *plan, const siginfo_t *info, const struct sigcontext *cpu,
                      const char *core);

/* overlay.c: whether the call is a read or write of an overlay's disk; then it is answered. */
int overlay_answer(struct spt_plan *plan, const siginfo_t *info, struct sigcontext *cpu);

#pragma GCC visibility pop

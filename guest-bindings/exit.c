/*
 * How a guest ends.
 * The rule: an end on purpose is silent when quiet was asked for; an abort never is.
 */
#include "runtime.h"

void hvt_halt(int status, const void *cookie)
{
    struct hvt_halt block = {.cookie_gpa = (uintptr_t)cookie, .exit_status = status};

    for (;;) /* the tender does not come back */
        cpu_hypercall(HVT_HYPERCALL_HALT, &block);
}

void hvt_abort(const char *reason)
{
    hvt_log("Solo5: ABORT: %s\n", reason);
    hvt_halt(SOLO5_EXIT_ABORT, NULL);
}

void solo5_exit(int status)
{
    if (!hvt_quiet)
        hvt_log("Solo5: solo5_exit(%d) called\n", status);
    hvt_halt(status, NULL);
}

void solo5_abort(void)
{
    hvt_abort("solo5_abort() called");
}

/* What compilers call when a function finds its stack guard changed. */
_Noreturn void __stack_chk_fail(void);
void __stack_chk_fail(void)
{
    hvt_abort("Stack corruption detected");
}

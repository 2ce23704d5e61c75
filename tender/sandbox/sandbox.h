/*
 * What the sandbox needs of the host and Python lacks: bare system calls, libseccomp, which
 * compiles filters, and the report of a process that violates its policy.
 *
 * Declarations only: cffi reads this file, too.
 */
#pragma once

#include <stdint.h>

long sandbox_call(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e);

/* Take all capabilities out of the bounding set; 0, or -1 and errno. */
int sandbox_empty_bounding_set(void);

/*
 * From here on, malloc() makes no mapping of its own for a large block: when it grew, mremap()
 * would move it, a call that nothing else needs.
 */
void sandbox_settle_malloc(void);

/* Install a filter, an array of `length` struct sock_filter, on this thread, which has
 * no_new_privs. 0, or -1 and errno. */
int sandbox_install(const void *code, uint32_t length);

/*
 * From here on, a violation is reported on `fd` before it ends the process: the program
 * that embeds the tender learns which call it was (messages.py). 0, or -1 and errno.
 */
int sandbox_report_to(int fd);

/*
 * libseccomp, found at run time: without a sandbox, the tender runs without it. Its functions
 * under other names, as its manual pages have them; struct scmp_arg_cmp of seccomp_rule_add(3).
 */
struct seccomp_compare {
    unsigned int arg;
    int op;
    uint64_t a, b;
};

/* NULL, or why there is no libseccomp. */
const char *seccomp_load(const char *library);
void *seccomp_new(uint32_t action);
void seccomp_free(void *filter);
int seccomp_set(void *filter, int attribute, uint32_t value);
int seccomp_number(const char *name);
/* The name of a system call of this machine; the caller frees it. */
char *seccomp_name(int number);
int seccomp_prefer(void *filter, int number, uint8_t priority);
int seccomp_allow(void *filter, int number, unsigned int count,
                  const struct seccomp_compare *compares);
int seccomp_write(void *filter, int fd);

/*
 * A compiled filter, and how a thread takes it on.
 */
#ifndef PTENDER_SANDBOX_INSTALL_H
#define PTENDER_SANDBOX_INSTALL_H

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* `code` is an array of `length` struct sock_filter. The thread has no_new_privs already. */
static inline int sandbox_install(const void *code, uint32_t length)
{
    struct sock_fprog program = {
        .len = (unsigned short)length,
        .filter = (struct sock_filter *)code,
    };
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

#define SANDBOX_VIOLATION 0x53595300u /* a zero byte, "SYS" */

struct sandbox_violation {
    uint32_t magic;
    int32_t number; /* of the system call */
    uint32_t arch;  /* AUDIT_ARCH_* */
};

#endif

/*
 * For the programs of this machine that have no C library: system calls, what is unmapped, and the
 * entry of their signal handler.
 */
#pragma once

#include <stdint.h>

#include <asm/unistd.h>

#define PAGE 4096ul
#define SA_RESTORER_FLAG 0x04000000 /* linux, arch/x86/include/uapi/asm/signal.h */

/* The result, or a negative errno. */
static inline long call6(long number, long a, long b, long c, long d, long e, long f)
{
#if defined(__x86_64__)
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc 0"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
                     : "memory");
    return x0;
#endif
}

static inline long call(long number, long a, long b, long c, long d, long e)
{
    return call6(number, a, b, c, d, e, 0);
}

/* Unmap all but a mapping of the system's that is sealed (Linux 6.15). */
static inline void unmap(uint64_t start, uint64_t end)
{
    if (start >= end)
        return;
    if (!call(__NR_munmap, (long)start, (long)(end - start), 0, 0, 0) || end - start <= PAGE)
        return;
    const uint64_t middle = start + (end - start) / 2 / PAGE * PAGE;
    unmap(start, middle);
    unmap(middle, end);
}

/*
 * Define `handler` and `restorer`, for sigaction(2): `function` handles the signal. The kernel leaves
 * the guest's AC set, with which an unaligned access would trap in it.
 */
#define SIGNAL_HANDLER(function)                                                                   \
    __attribute__((visibility("hidden"))) void handler(void);                                      \
    __attribute__((visibility("hidden"))) void restorer(void);                                     \
    __asm__(".globl handler, restorer\n"                                                           \
            "handler:\n"                                                                           \
            "    pushfq\n"                                                                         \
            "    andl $~0x40000, (%rsp)\n"                                                         \
            "    popfq\n"                                                                          \
            "    jmp " #function "\n"                                                              \
            "restorer:\n"                                                                          \
            "    mov $15, %eax\n" /* rt_sigreturn */                                               \
            "    syscall\n"                                                                        \
            "    ud2\n");

/*
 * The commands `ptender`, `ptender-oci`, `solo5-hvt.2` and `solo5-spt`: they have Python execute
 * start.py without what a run does not need: no site, no environment, no current directory in its
 * path. A static program without a C library, since a shell takes 0.5 ms.
 *
 * SIGINT is blocked until start.py has taken Python's own handler away, which would print where
 * Python's start was interrupted. A Ctrl-C of that time waits.
 */
#include <asm/signal.h>
#include <linux/auxvec.h>
#include <linux/errno.h>
#include <linux/fcntl.h>

#include "tender/host/freestanding.h"

#define PATH_SIZE 4096

__asm__(".section .rodata\n"
        ".globl start_code\n"
        "start_code: .incbin \"bin/start.py\"\n"
        ".byte 0\n"
        ".text\n");
extern const char start_code[];

static long length(const char *text)
{
    long count = 0;

    while (text[count])
        count++;
    return count;
}

/* Append to a text of PATH_SIZE bytes; what is too long is cut off, and names no file. */
static void append(char *to, const char *text)
{
    long at = length(to);

    while (*text && at < PATH_SIZE - 1)
        to[at++] = *text++;
    to[at] = 0;
}

static void print(const char *text) { call(__NR_write, 2, (long)text, length(text), 0, 0); }

static long read_link(const char *path, char *target)
{
    const long size =
        call(__NR_readlinkat, AT_FDCWD, (long)path, (long)target, PATH_SIZE - 1, 0);

    target[size > 0 ? size : 0] = 0;
    return size;
}

static const char *base_name(const char *path)
{
    const char *name = path;

    while (*path)
        if (*path++ == '/')
            name = path;
    return name;
}

/* The folder of a program, in the place of its path. */
static void cut_name(char *path)
{
    const long at = base_name(path) - path;

    if (at) {
        path[at - 1] = 0;
    } else {
        path[0] = '.';
        path[1] = 0;
    }
}

/* Returns a negative errno, if at all. */
static long execute(const char *program, const char **arguments, char **environment)
{
    return call(__NR_execve, (long)program, (long)arguments, (long)environment, 0, 0);
}

__attribute__((noreturn, used)) void launch(long *stack)
{
    const long count = stack[0];
    char **given = (char **)(stack + 1), **environment = given + count + 1;
    const char *words[count + 6];
    static char python[PATH_SIZE], target[PATH_SIZE];
    unsigned long blocked = 1UL << (SIGINT - 1);
    long *auxiliary = (long *)environment;

    call(__NR_rt_sigprocmask, SIG_BLOCK, (long)&blocked, 0, sizeof blocked, 0);
    while (*auxiliary++)
        ;
    if (read_link("/proc/self/exe", python) <= 0) /* as in a container without /proc */
        for (; auxiliary[0]; auxiliary += 2)
            if (auxiliary[0] == AT_EXECFN)
                append(python, (const char *)auxiliary[1]);
    cut_name(python);
    append(python, "/python3");

    const char **word = words;
    *word++ = "env";
    *word++ = python;
    *word++ = "-IS";
    *word++ = "-c";
    *word++ = start_code;
    for (long index = 0; index <= count; index++) /* with the NULL */
        *word++ = given[index];
    const char *program = python;
    long error = execute(program, words + 1, environment);
    const int is_link = read_link(python, target) > 0;
    if (error == -ENOENT && !is_link) {
        program = "/usr/bin/env";
        words[1] = "python3";
        words[2] = "-E";
        error = execute(program, words, environment);
    }
    print(count ? base_name(given[0]) : "ptender");
    if (error == -E2BIG || !is_link) {
        print(": cannot execute ");
        print(program);
        print(error == -E2BIG ? ": the arguments and the environment are too long\n" : "\n");
    } else {
        print(": ");
        print(python);
        print(" is ");
        print(target);
        print(", which is not there or not for this user to run: make the environment with another "
              "Python, such as /usr/bin/python3\n");
    }
    call(__NR_exit_group, 1, 0, 0, 0, 0);
    __builtin_unreachable();
}

#if defined(__x86_64__)
__asm__(".globl _start\n"
        "_start: mov %rsp, %rdi\n"
        "and $-16, %rsp\n"
        "call launch\n");
#elif defined(__aarch64__)
__asm__(".globl _start\n"
        "_start: mov x0, sp\n"
        "bl launch\n");
#endif

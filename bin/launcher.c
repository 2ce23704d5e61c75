/*
 * The commands `ptender`, `ptender-oci`, `solo5-hvt.2` and `solo5-spt`: they have Python execute
 * start.py without what a run does not need: no site, no environment, no current directory in its
 * path. A static program without a C library, since a shell takes 0.5 ms.
 *
 * SIGINT is blocked until start.py has taken Python's own handler away, which would print where
 * Python's start was interrupted. A Ctrl-C of that time waits.
 */
#include <asm/signal.h>
#include <asm/unistd.h>
#include <linux/auxvec.h>
#include <linux/fcntl.h>

#define PATH_SIZE 4096

__asm__(".section .rodata\n"
        ".globl start_code\n"
        "start_code: .incbin \"bin/start.py\"\n"
        ".byte 0\n"
        ".text\n");
extern const char start_code[];

static long call(long number, long a, long b, long c, long d)
{
#if defined(__x86_64__)
    register long fourth __asm__("r10") = d;
    __asm__ volatile("syscall"
                     : "+a"(number)
                     : "D"(a), "S"(b), "d"(c), "r"(fourth)
                     : "rcx", "r11", "memory");
    return number;
#elif defined(__aarch64__)
    register long which __asm__("x8") = number;
    register long first __asm__("x0") = a;
    register long second __asm__("x1") = b;
    register long third __asm__("x2") = c;
    register long fourth __asm__("x3") = d;
    __asm__ volatile("svc 0"
                     : "+r"(first)
                     : "r"(which), "r"(second), "r"(third), "r"(fourth)
                     : "memory");
    return first;
#endif
}

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

static void print(const char *text) { call(__NR_write, 2, (long)text, length(text), 0); }

static long read_link(const char *path, char *target)
{
    const long size = call(__NR_readlinkat, AT_FDCWD, (long)path, (long)target, PATH_SIZE - 1);

    target[size > 0 ? size : 0] = 0;
    return size;
}

/* Cut off the last name of a path, as in `folder/name`; returns that name. */
static const char *cut(char *path)
{
    long at = length(path);

    while (at && path[at - 1] != '/')
        at--;
    if (!at)
        return path;
    path[at - 1] = 0;
    return path + at;
}

static const char *base_name(const char *path)
{
    const char *name = path;

    while (*path)
        if (*path++ == '/')
            name = path;
    return name;
}

static void execute(const char *program, const char **arguments, char **environment)
{
    call(__NR_execve, (long)program, (long)arguments, (long)environment, 0);
}

__attribute__((noreturn, used)) void launch(long *stack)
{
    const long count = stack[0];
    char **given = (char **)(stack + 1), **environment = given + count + 1;
    const char *words[count + 6];
    static char python[PATH_SIZE], target[PATH_SIZE];
    unsigned long blocked = 1UL << (SIGINT - 1);
    long *auxiliary = (long *)environment;

    call(__NR_rt_sigprocmask, SIG_BLOCK, (long)&blocked, 0, sizeof blocked);
    while (*auxiliary++)
        ;
    if (read_link("/proc/self/exe", python) <= 0) /* as in a container without /proc */
        for (; auxiliary[0]; auxiliary += 2)
            if (auxiliary[0] == AT_EXECFN)
                append(python, (const char *)auxiliary[1]);
    if (cut(python) == python)
        append(python, ".");
    append(python, "/python3");

    const char **word = words;
    *word++ = "env";
    *word++ = python;
    *word++ = "-IS";
    *word++ = "-c";
    *word++ = start_code;
    for (long index = 0; index <= count; index++) /* with the NULL */
        *word++ = given[index];
    execute(python, words + 1, environment);
    if (read_link(python, target) > 0) {
        print(base_name(given[0]));
        print(": ");
        print(python);
        print(" is ");
        print(target);
        print(", which is not there or not for this user to run: make the environment with another "
              "Python, such as /usr/bin/python3\n");
    } else {
        words[1] = "python3";
        words[2] = "-E";
        execute("/usr/bin/env", words, environment);
        print(base_name(given[0]));
        print(": cannot execute /usr/bin/env, which finds python3\n");
    }
    call(__NR_exit_group, 1, 0, 0, 0);
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

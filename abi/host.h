/*
 * The host's calls that Python has no face for, and how a running guest is interrupted.
 *
 * A signal can arrive in the instant before a thread blocks: Python would note it and block all
 * the same. So the handler below does three things that hold in every such instant: it sets the
 * stop request, it sets the vCPU's immediate_exit (the next KVM_RUN then returns at once), and,
 * for a signal that nobody will repeat, it arms a timer that interrupts this process again and
 * again until the guest has ended. Every call here comes back with EINTR and is not restarted.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "device.h"
#include "stop.h"

#define STOP_AGAIN_US 10000

/* initial-exec: a handler must not be what allocates thread-local storage. */
static __thread struct stop *volatile stop_here __attribute__((tls_model("initial-exec")));

/* A signal that came before there was a guest to stop. */
static volatile sig_atomic_t stop_early;

static void stop_again_and_again(void)
{
    struct itimerval again = {{0, STOP_AGAIN_US}, {0, STOP_AGAIN_US}};
    setitimer(ITIMER_REAL, &again, NULL);
}

static void stop_on_signal(int signo)
{
    struct stop *stop = stop_here;
    int saved = errno;
    int termination = signo != STOP_KICK && signo != SIGALRM;

    if (termination && !stop)
        stop_early = signo;
    if (stop) {
        if (termination && !stop->signo) {
            stop->signo = signo;
            stop->requested = 1;
            stop_again_and_again();
        }
        /* A kick, and each tick of the timer, only brings the thread back. */
        if (stop->immediate_exit)
            *stop->immediate_exit = 1;
        if (stop->kick)
            stop->kick(stop->kick_of);
    }
    errno = saved;
}

static int stop_handle(int signo)
{
    struct sigaction action = {.sa_handler = stop_on_signal};
    sigfillset(&action.sa_mask);
    return sigaction(signo, &action, NULL);
}

/* From here on, signals to this thread ask `stop`; NULL ends that. */
static int stop_enter(struct stop *stop)
{
    if (!stop) {
        stop_here = NULL;
        return 0;
    }
    stop->thread = pthread_self();
    if (stop_handle(STOP_KICK))
        return -1;
    stop_here = stop;
    if (stop_early) {
        stop->signo = stop_early;
        stop->requested = 1;
        stop_early = 0;
        stop_again_and_again();
    }
    return 0;
}

/*
 * The command's way: these signals end the guest of this thread. A SIGINT that is ignored stays
 * so: that is how a shell keeps Ctrl-C from what it runs in the background.
 */
static int stop_on_termination(void)
{
    struct sigaction before;
    sigset_t ours;

    /* Who starts a tender may have blocked them for ends of its own, and that is handed on. */
    sigemptyset(&ours);
    sigaddset(&ours, SIGINT);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGALRM);
    sigaddset(&ours, STOP_KICK);
    if (pthread_sigmask(SIG_UNBLOCK, &ours, NULL))
        return -1;
    if (stop_handle(SIGALRM) || sigaction(SIGINT, NULL, &before))
        return -1;
    if (before.sa_handler != SIG_IGN && stop_handle(SIGINT))
        return -1;
    return stop_handle(SIGTERM);
}

/* ... and the end of it: no timer, the default actions again. */
static void stop_default_actions(void)
{
    struct itimerval never = {{0, 0}, {0, 0}};
    struct sigaction before;
    if (sigaction(SIGINT, NULL, &before) == 0 && before.sa_handler != SIG_IGN)
        signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    setitimer(ITIMER_REAL, &never, NULL);
    signal(SIGALRM, SIG_DFL);
}

/* A CPU in software is stopped by calling `kick`, on its own thread; 0: no longer. */
static void stop_watch_kick(struct stop *stop, uintptr_t kick, void *of)
{
    stop->kick = NULL;
    stop->kick_of = of;
    stop->kick = (void (*)(void *))kick;
}

static int host_protect(void *address, size_t length, int writable, int readable)
{
    int prot = (writable ? PROT_WRITE : 0) | (readable ? PROT_READ : 0);
    return mprotect(address, length, prot);
}

static int host_poll(struct pollset *set, uint64_t timeout_ns)
{
    struct timespec limit = {
        .tv_sec = (time_t)(timeout_ns / 1000000000u),
        .tv_nsec = (long)(timeout_ns % 1000000000u),
    };
    return ppoll(set->fds, set->count, &limit, NULL);
}

/* What of `events` (and errors) a descriptor has, after at most `timeout_ms`; -1: interrupted. */
static int host_events(int fd, int events, int timeout_ms)
{
    struct pollfd one = {.fd = fd, .events = (short)events};
    int count = poll(&one, 1, timeout_ms);
    return count > 0 ? one.revents : count;
}

/* Python's own take another system call on one system than on the next (preadv, preadv2). */
static ssize_t host_pread(int fd, void *data, size_t length, uint64_t offset)
{
    return pread(fd, data, length, (off_t)offset);
}

static ssize_t host_pwrite(int fd, const void *data, size_t length, uint64_t offset)
{
    return pwrite(fd, data, length, (off_t)offset);
}

static ssize_t host_write(int fd, const void *data, size_t length)
{
    return write(fd, data, length);
}

/* The kernel ends this process with its parent's thread; a change of credentials undoes that. */
static int host_end_with_parent(void)
{
#ifdef __linux__
    return prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
#else
    errno = ENOSYS;
    return -1;
#endif
}

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
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define STOP_KICK (SIGRTMIN + 3)
#define STOP_AGAIN_US 10000

struct stop {
    volatile sig_atomic_t requested;
    volatile sig_atomic_t signo;       /* the signal that asked, 0: a program */
    uint8_t *volatile immediate_exit;  /* of the vCPU that this thread runs, or NULL */
    void (*volatile kick)(void *);     /* the same for a CPU in software; async-signal-safe */
    void *volatile kick_of;
    pthread_t thread;
};

/* initial-exec: a handler must not be what allocates thread-local storage. */
static __thread struct stop *volatile stop_here __attribute__((tls_model("initial-exec")));

static void stop_on_signal(int signo)
{
    struct stop *stop = stop_here;
    int saved = errno;
    if (stop) {
        stop->requested = 1;
        if (stop->immediate_exit)
            *stop->immediate_exit = 1;
        if (stop->kick)
            stop->kick(stop->kick_of);
        if (signo != STOP_KICK && signo != SIGALRM && !stop->signo) {
            struct itimerval again = {{0, STOP_AGAIN_US}, {0, STOP_AGAIN_US}};
            stop->signo = signo;
            setitimer(ITIMER_REAL, &again, NULL);
        }
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
    stop_here = stop;
    if (!stop)
        return 0;
    stop->thread = pthread_self();
    return stop_handle(STOP_KICK);
}

/* The command's way: these signals end the guest of this thread. */
static int stop_on_termination(void)
{
    if (stop_handle(SIGALRM) || stop_handle(SIGINT))
        return -1;
    return stop_handle(SIGTERM);
}

/* ... and the end of it: no timer, the default actions again. */
static void stop_default_actions(void)
{
    struct itimerval never = {{0, 0}, {0, 0}};
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    setitimer(ITIMER_REAL, &never, NULL);
    signal(SIGALRM, SIG_DFL);
}

/* Another thread's way; it repeats the call until the guest has ended. */
static int stop_request(struct stop *stop)
{
    uint8_t *immediate_exit = stop->immediate_exit;
    stop->requested = 1;
    if (immediate_exit)
        *immediate_exit = 1;
    return pthread_kill(stop->thread, STOP_KICK);
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

static int host_poll(struct pollfd *fds, unsigned long count, uint64_t timeout_ns)
{
    struct timespec limit = {
        .tv_sec = (time_t)(timeout_ns / 1000000000u),
        .tv_nsec = (long)(timeout_ns % 1000000000u),
    };
    return ppoll(fds, count, &limit, NULL);
}

static ssize_t host_write(int fd, const void *data, size_t length)
{
    return write(fd, data, length);
}

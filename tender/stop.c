/* Stop requests: stop.h says how they work. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/time.h>

#include "stop.h"

#define AGAIN_US 10000

_Static_assert(sizeof(struct stop) == 40, "struct stop");
_Static_assert(offsetof(struct stop, immediate_exit) == 8, "struct stop");
_Static_assert(sizeof(pthread_t) <= sizeof(uintptr_t), "pthread_t");

/* initial-exec: a handler must not be what allocates thread-local storage. */
static _Thread_local struct stop *_Atomic here __attribute__((tls_model("initial-exec")));

/* A signal that came before there was a guest to stop. */
static _Atomic int early;

static void repeat(void)
{
    struct itimerval again = {{0, AGAIN_US}, {0, AGAIN_US}};
    setitimer(ITIMER_REAL, &again, NULL);
}

static void set_immediate_exit(struct stop *stop)
{
    uint8_t *immediate_exit = (uint8_t *)stop->immediate_exit;
    if (immediate_exit)
        *(volatile uint8_t *)immediate_exit = 1;
}

static void on_signal(int signo)
{
    struct stop *stop = here;
    int saved = errno;
    int termination = signo != STOP_KICK && signo != SIGALRM && signo != SIGCHLD;

    if (termination && !stop)
        early = signo;
    if (stop) {
        if (termination && !stop->signo) {
            stop->signo = signo;
            stop->requested = 1;
            repeat();
        }
        if (signo == SIGCHLD)
            repeat();
        /* A kick, and each tick of the timer, only brings the thread back. */
        set_immediate_exit(stop);
        void (*kick)(void *) = (void (*)(void *))stop->kick;
        if (kick)
            kick((void *)stop->kick_of);
    }
    errno = saved;
}

static int handle(int signo)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_NOCLDSTOP};
    sigfillset(&action.sa_mask);
    return sigaction(signo, &action, NULL);
}

int stop_enter(struct stop *stop)
{
    if (!stop) {
        here = NULL;
        return 0;
    }
    stop->thread = (uintptr_t)pthread_self();
    if (handle(STOP_KICK))
        return -1;
    here = stop;
    if (early) {
        stop->signo = early;
        stop->requested = 1;
        early = 0;
        repeat();
    }
    return 0;
}

int stop_on_termination(int interrupt)
{
    sigset_t ours;

    /* The parent may have blocked them, and a blocked signal is inherited. */
    sigemptyset(&ours);
    sigaddset(&ours, SIGINT);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGALRM);
    sigaddset(&ours, STOP_KICK);
    if (pthread_sigmask(SIG_UNBLOCK, &ours, NULL))
        return -1;
    if (handle(SIGALRM) || (interrupt && handle(SIGINT)))
        return -1;
    return handle(SIGTERM);
}

int stop_on_child(void)
{
    sigset_t ours;

    sigemptyset(&ours);
    sigaddset(&ours, SIGCHLD);
    sigaddset(&ours, SIGALRM);
    if (pthread_sigmask(SIG_UNBLOCK, &ours, NULL) || handle(SIGALRM))
        return -1;
    return handle(SIGCHLD);
}

void stop_tick(int on)
{
    struct itimerval never = {{0, 0}, {0, 0}};
    if (on)
        repeat();
    else
        setitimer(ITIMER_REAL, &never, NULL);
}

void stop_default_actions(void)
{
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    stop_tick(0);
    signal(SIGALRM, SIG_DFL);
}

int stop_kick(struct stop *stop)
{
    set_immediate_exit(stop);
    return pthread_kill((pthread_t)stop->thread, STOP_KICK);
}

int stop_request(struct stop *stop)
{
    stop->requested = 1;
    return stop_kick(stop);
}

void stop_watch_kick(struct stop *stop, uintptr_t kick, uintptr_t of)
{
    stop->kick = 0; /* a signal never sees one function with another's argument */
    stop->kick_of = of;
    stop->kick = kick;
}

/*
 * A stop request, and how a running guest is interrupted.
 *
 * A signal can arrive in the instant before a thread blocks: Python would note it and block all
 * the same. So the handler does three things that hold in every such instant: it sets the stop
 * request, it sets the vCPU's immediate_exit (the next KVM_RUN then returns at once), and, for a
 * signal that nobody will repeat, it arms a timer that interrupts this process every 10 ms until
 * the guest has ended. Every call returns with EINTR and is not restarted.
 *
 * Declarations only: cffi reads this file, too.
 */
#pragma once

#include <signal.h>
#include <stdint.h>

/* Interrupts a guest's thread. */
#define STOP_KICK (SIGRTMIN + 3)

/* Threads and signal handlers share it. Addresses are integers, because cffi has no _Atomic. */
struct stop {
    _Atomic int requested;
    _Atomic int signo;                /* the signal that asked, 0: a program */
    _Atomic uintptr_t immediate_exit; /* of the vCPU that this thread runs: a uint8_t, or 0 */
    _Atomic uintptr_t kick;           /* for a software CPU: void (*)(void *), or 0 */
    _Atomic uintptr_t kick_of;        /* its argument */
    uintptr_t thread;                 /* pthread_t */
};

/* From here on, signals to this thread set `stop`; NULL ends that. 0, or -1 and errno. */
int stop_enter(struct stop *stop);

/*
 * SIGTERM ends the guest of this thread, and SIGINT if `interrupt` is set, also where the parent had
 * it ignored, as a shell has for what a script runs with `&`. 0, or -1 and errno.
 */
int stop_on_termination(int interrupt);

/* The end of a child interrupts this process as a kick does, every 10 ms. 0, or -1 and errno. */
int stop_on_child(void);

/* Interrupt this process every 10 ms as a kick does, or no more. */
void stop_tick(int on);

/* Undo stop_on_termination(): the default actions again, and no timer. */
void stop_default_actions(void);

/* Bring the guest's thread back to Python, out of the guest or of a call that blocks. */
int stop_kick(struct stop *stop);

/* End the guest. The caller repeats it until the guest has ended. */
int stop_request(struct stop *stop);

/* Stop a software CPU by calling `kick` with `of`, on its own thread, in a signal handler; 0: none. */
void stop_watch_kick(struct stop *stop, uintptr_t kick, uintptr_t of);

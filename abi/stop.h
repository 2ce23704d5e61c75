/*
 * A stop request as it lies in memory, and how another thread makes one; host.h says why it works.
 */
#ifndef PTENDER_STOP_H
#define PTENDER_STOP_H

#include <pthread.h>
#include <signal.h>
#include <stdint.h>

#define STOP_KICK (SIGRTMIN + 3)

struct stop {
    volatile sig_atomic_t requested;
    volatile sig_atomic_t signo;      /* the signal that asked, 0: a program */
    uint8_t *volatile immediate_exit; /* of the vCPU that this thread runs, or NULL */
    void (*volatile kick)(void *);    /* the same for a CPU in software; async-signal-safe */
    void *volatile kick_of;
    pthread_t thread;
};

/* Bring the vCPU's thread back to Python, out of the guest or of a call that blocks. */
static inline int stop_kick(struct stop *stop)
{
    uint8_t *immediate_exit = stop->immediate_exit;
    if (immediate_exit)
        *immediate_exit = 1;
    return pthread_kill(stop->thread, STOP_KICK);
}

/* End the guest. Whoever asks repeats it until the guest has ended. */
static inline int stop_request(struct stop *stop)
{
    stop->requested = 1;
    return stop_kick(stop);
}

#endif

/*
 * The engine: it runs a vCPU and answers hypercalls whose device is a plain descriptor. Python
 * fills in `struct engine` before the guest runs, and may read the counters at any time.
 *
 * Declarations only: cffi reads this file, too.
 */
#pragma once

#include <stdint.h>

#include "tender/host/host.h"
#include "tender/host/rate.h"
#include "tender/observe/pcap.h"
#include "tender/stop.h"

#define ENGINE_RANGES 16
#define ENGINE_DEVICES 64

#define ENGINE_BLOCK 1
#define ENGINE_NET 2

/* A device whose hypercalls the engine answers; Python answers those of all others. */
struct engine_device {
    int32_t kind; /* ENGINE_*; 0: none */
    int32_t fd;
    int32_t writable;     /* block */
    uint64_t capacity;    /* block: bytes */
    uint64_t frame_max;   /* net: bytes */
    struct counters *in;  /* block: reads and writes; net: frames received */
    struct counters *out; /* net: frames sent */
    struct pcap *pcap;    /* net: where its frames are recorded, or NULL */
    struct rate *rate_in; /* limits of what `in` and `out` count, or NULL */
    struct rate *rate_out;
};

/* Pages of guest memory that the tender may not write, or not even read. */
struct engine_range {
    uint64_t start;
    uint64_t end;
    int32_t readable;
};

struct engine {
    int32_t vcpu_fd;
    int32_t console_fd; /* -1: Python answers PUTS */
    void *run;          /* the vCPU's struct kvm_run */
    uint8_t *memory;
    uint64_t mem_size;
    uint64_t protected_end; /* all of `ranges` is below; with too many of them, count is 0 */
    uint32_t range_count;
    struct engine_range ranges[ENGINE_RANGES];
    struct engine_device devices[ENGINE_DEVICES]; /* by handle */
    struct pollset *pollset; /* NULL: Python answers POLL */
    struct counters *console;
    struct counters *poll;
    struct activity *activity; /* of the vCPU, or NULL */

    /* Where Python continues a call that the engine has begun. */
    uint64_t console_done;     /* bytes of this PUTS that are written */
    uint64_t poll_deadline_ns; /* of this POLL, by CLOCK_MONOTONIC; 0: not begun */
    int32_t has_report;        /* a pcap has ended: Python is to come and say so */

    struct stop *gives_back; /* of a child that is to give back memory, once, when it is idle */
};

/* The network ring, served on a thread of its own. */
struct engine_ring {
    struct engine *engine; /* memory and devices */
    struct stop *stop;     /* of the guest */
    int32_t kick_fd;       /* an eventfd that KVM signals when the guest kicks */
    uint64_t gpa;          /* of the struct hvt_ring */
    uint32_t spins;        /* how often it looks again before it sleeps */

    _Atomic int32_t ending; /* set by Python: the thread ends */
    _Atomic int32_t fault;  /* RING_*: what the guest did that ends it */
    uint64_t fault_gpa;
    uint64_t fault_len;
    _Atomic int32_t host_errno; /* the first error of the host since Python set it to 0 */
    _Atomic int32_t host_errno_handle;
    uintptr_t thread; /* pthread_t */

    const void *filter; /* the system calls of this thread: struct sock_filter[], or NULL */
    uint32_t filter_length;
    _Atomic int32_t started; /* 1, or the negative errno of the filter */
};

#define RING_NO_FAULT 0
#define RING_INDEX 1   /* an index that runs too far ahead */
#define RING_ADDRESS 2 /* fault_gpa and fault_len are not the guest's memory */

/* Start and end the ring's thread; 0 or an errno. */
int ring_start(struct engine_ring *ring);
void ring_end(struct engine_ring *ring);

/* Run the vCPU until Python is needed: 0 for an exit, else the errno of KVM_RUN, or EINTR for a
 * report. */
int engine_run(struct engine *engine);

/* One hypercall without a CPU, for tests that compare the engine with Python's handlers: 1 if it
 * was answered, 0 if Python has to, and nothing has happened. */
int engine_answer(struct engine *engine, uint32_t number, uint64_t gpa);

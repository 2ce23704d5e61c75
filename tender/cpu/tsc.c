/* The time-stamp counter of this machine: tsc.h has what each function does. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cpuid.h>
#include <time.h>
#include <x86intrin.h>

#include "tsc.h"

#define NSEC_PER_SEC 1000000000
#define MEASURE_NS 5000000 /* 5 parts in a million */
#define MEASURE_MAX_NS 1000000000
#define TRIES 5

uint64_t tsc_read(void) { return __rdtsc(); }

static int64_t hz_of_cpuid(void)
{
    unsigned int a, b, c, d;
    if (__get_cpuid_count(0x15, 0, &a, &b, &c, &d) && a && b && c)
        return (int64_t)((uint64_t)c * b / a);
    __cpuid(1, a, b, c, d);
    if (c >> 31) { /* under a hypervisor; some have this leaf */
        __cpuid(0x40000000, a, b, c, d);
        if (a >= 0x40000010 && a < 0x40010000) {
            __cpuid(0x40000010, a, b, c, d);
            return (int64_t)a * 1000;
        }
    }
    return 0;
}

struct sample {
    uint64_t ns; /* CLOCK_MONOTONIC_RAW */
    uint64_t tsc;
};

/* Both clocks at one time, which is that of the shortest of some tries. */
static struct sample sample(void)
{
    struct sample best = {0, 0};
    uint64_t shortest = UINT64_MAX;
    for (unsigned i = 0; i < TRIES; i++) {
        struct timespec now;
        const uint64_t before = __rdtsc();
        clock_gettime(CLOCK_MONOTONIC_RAW, &now);
        const uint64_t took = __rdtsc() - before;
        if (took < shortest) {
            shortest = took;
            best.ns = (uint64_t)now.tv_sec * NSEC_PER_SEC + (uint64_t)now.tv_nsec;
            best.tsc = before + took / 2;
        }
    }
    return best;
}

static struct sample loaded; /* when this library was: it takes longer to start a guest */

__attribute__((constructor)) static void on_load(void) { loaded = sample(); }

static int64_t hz_measured(void)
{
    struct sample begun = loaded, now = sample();
    if (now.ns - begun.ns > MEASURE_MAX_NS) /* the machine may have slept in between */
        begun = now;
    while (now.ns - begun.ns < MEASURE_NS)
        now = sample();
    return (int64_t)((__int128)(now.tsc - begun.tsc) * NSEC_PER_SEC / (now.ns - begun.ns));
}

int64_t tsc_hz(void)
{
    static int64_t known;
    if (!known)
        known = hz_of_cpuid();
    if (!known)
        known = hz_measured();
    return known;
}

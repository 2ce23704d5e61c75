/* The time-stamp counter of this machine: tsc.h has what each function does. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cpuid.h>
#include <time.h>
#include <x86intrin.h>

#include "tsc.h"

#define LEAST_NS 3000000    /* a look is wrong by some 10 ns, so 10 ppm */
#define MOST_NS 1000000000 /* in more than that, the machine may have slept, or moved */

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

static uint64_t raw_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_RAW, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

struct moment {
    uint64_t ns, cycles;
};

/* Both clocks at once: of some looks the one that took the fewest cycles. */
static struct moment now(void)
{
    struct moment best = {0, 0};
    uint64_t least = UINT64_MAX;
    for (int look = 0; look < 16; look++) {
        const uint64_t before = __rdtsc(), ns = raw_ns(), took = __rdtsc() - before;
        if (took < least) {
            least = took;
            best = (struct moment){ns, before + took / 2};
        }
    }
    return best;
}

/* When this module was loaded: what a start does since then is the time that is measured. */
static struct moment loaded;

__attribute__((constructor)) static void look(void) { loaded = now(); }

static int64_t hz_measured(void)
{
    if (raw_ns() - loaded.ns > MOST_NS)
        loaded = now();
    while (raw_ns() - loaded.ns < LEAST_NS)
        continue;
    const struct moment ended = now();
    return (int64_t)((__int128)(ended.cycles - loaded.cycles) * 1000000000 / (ended.ns - loaded.ns));
}

int64_t tsc_hz(void)
{
    static int64_t hz; /* which a forked child has from its parent */
    hz = hz ? hz : hz_of_cpuid();
    return hz = hz ? hz : hz_measured();
}

/*
 * A limit of bytes and operations per second: two token buckets. An operation waits until there is
 * a token for it, and the bytes are not in debt; then it takes all its bytes, so one that is larger
 * than a bucket passes as well, and is paid for afterwards. A bucket is the time at which it is
 * empty: what is taken moves it on, and it lags behind the present by no more than a burst takes.
 *
 * Declarations only: cffi reads this file, too.
 */
#pragma once

#include <stdint.h>

struct rate_bucket {
    uint64_t per_second; /* 0: no limit */
    uint64_t burst_ns;   /* what may be done at once, as the time that it takes at this rate */
    uint64_t empty_ns;   /* by CLOCK_MONOTONIC */
};

/* Of one direction of a device; only the guest's thread uses it. */
struct rate {
    struct rate_bucket bytes;
    struct rate_bucket ops;
    uint32_t has_waited; /* the next operation has had to wait */
};

/* When the next operation may be done, by CLOCK_MONOTONIC; 0: at `now_ns`. */
uint64_t rate_due(const struct rate *rate, uint64_t now_ns);

/* An operation is done at `now_ns`; 1: it has waited for it. */
int rate_take(struct rate *rate, uint64_t now_ns, uint64_t bytes);

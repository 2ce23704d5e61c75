/* Token buckets for the engine and for Python's handlers. */
#include "rate.h"

#define NSEC_PER_SEC 1000000000u

/* `from_ns` and the time that this amount takes, rounded up. */
static uint64_t later(const struct rate_bucket *bucket, uint64_t from_ns, uint64_t amount)
{
    unsigned __int128 cost = (unsigned __int128)amount * NSEC_PER_SEC + bucket->per_second - 1;
    unsigned __int128 end = from_ns + cost / bucket->per_second;
    return end > UINT64_MAX ? UINT64_MAX : (uint64_t)end;
}

uint64_t rate_due(const struct rate *rate, uint64_t now_ns)
{
    uint64_t bytes = rate->bytes.per_second ? rate->bytes.empty_ns : 0;
    uint64_t ops = rate->ops.per_second ? later(&rate->ops, rate->ops.empty_ns, 1) : 0;
    uint64_t due = bytes > ops ? bytes : ops;
    return due > now_ns ? due : 0;
}

static void take(struct rate_bucket *bucket, uint64_t now_ns, uint64_t amount)
{
    if (!bucket->per_second)
        return;
    uint64_t full_ns = now_ns > bucket->burst_ns ? now_ns - bucket->burst_ns : 0;
    uint64_t empty_ns = bucket->empty_ns > full_ns ? bucket->empty_ns : full_ns;
    bucket->empty_ns = later(bucket, empty_ns, amount);
}

int rate_take(struct rate *rate, uint64_t now_ns, uint64_t bytes)
{
    int has_waited = rate->has_waited != 0;
    rate->has_waited = 0;
    take(&rate->bytes, now_ns, bytes);
    take(&rate->ops, now_ns, 1);
    return has_waited;
}

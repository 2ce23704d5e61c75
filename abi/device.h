/*
 * What Python and the engine both work on: the counters of a device and the set of descriptors to
 * wait for. Declarations only, for cffi's parser and for C.
 */

struct counters {
    uint64_t calls;
    uint64_t bytes;
    uint64_t errors; /* the host's trouble */
    uint64_t drops;  /* frames or output that the host did not take */
};

#define POLLSET_MAX 64

struct pollset {
    uint32_t count;
    struct pollfd fds[64];
    uint8_t handles[64]; /* of fds[n] */
};

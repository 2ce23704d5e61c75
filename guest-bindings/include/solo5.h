/*
 * The calls that a guest can make. Names, types and values are those of Solo5's public interface,
 * so that a guest written for Solo5 compiles here unchanged; what each call does is said in our
 * words.
 */
#ifndef SOLO5_H_INCLUDED
#define SOLO5_H_INCLUDED

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What a call on a device came to. */
typedef enum {
    SOLO5_R_OK = 0, /* done */
    SOLO5_R_AGAIN,  /* nothing could be done now; the same call may succeed later */
    SOLO5_R_EINVAL, /* the call as made has no meaning */
    SOLO5_R_EUNSPEC /* the host could not do it, and does not say why */
} solo5_result_t;

/* ---- Start and end ---- */

/*
 * cmdline: the guest's words, joined by single spaces, NUL-terminated.
 * heap_start, heap_size: one region of zeroed, writable, non-executable memory. The stack begins at
 * its upper end and grows down, so an allocator must leave the top of the region alone.
 */
struct solo5_start_info {
    const char *cmdline;
    uintptr_t heap_start;
    size_t heap_size;
};

/* The guest provides this. Returning from it is solo5_exit() with the value returned. */
int solo5_app_main(const struct solo5_start_info *info);

#define SOLO5_EXIT_SUCCESS 0
#define SOLO5_EXIT_FAILURE 1
#define SOLO5_EXIT_ABORT 255

/* End the guest; the status becomes the tender's. 255 and above are not the guest's to use. */
void solo5_exit(int status) __attribute__((noreturn));

/* End the guest with SOLO5_EXIT_ABORT; the tender writes a core file if it was told to. */
void solo5_abort(void) __attribute__((noreturn));

/* ---- Thread-local storage, local-exec model ---- */

/*
 * For each thread: allocate solo5_tls_size() bytes, call solo5_tls_init() on them, and give
 * solo5_tls_tp_offset() of them to solo5_set_tls_base() whenever that thread is to run. Until a
 * first block is set, a `_Thread_local` variable has no memory behind it, and touching one is a
 * page fault.
 */
size_t solo5_tls_size(void);
uintptr_t solo5_tls_tp_offset(uintptr_t tls);
solo5_result_t solo5_tls_init(uintptr_t tls);
solo5_result_t solo5_set_tls_base(uintptr_t base);

/* ---- Time, in nanoseconds ---- */

typedef uint64_t solo5_time_t;

/* Since an arbitrary point; never goes back and costs no exit to the host. */
solo5_time_t solo5_clock_monotonic(void);

/* UTC since 1970-01-01, asked of the host at each call. */
solo5_time_t solo5_clock_wall(void);

/* ---- Waiting ---- */

typedef uint64_t solo5_handle_t;
typedef uint64_t solo5_handle_set_t; /* bit n is handle n */

/*
 * Sleep until the monotonic clock reaches deadline, or until a network device has a frame.
 * ready_set, unless NULL, receives the devices that have one.
 */
void solo5_yield(solo5_time_t deadline, solo5_handle_set_t *ready_set);

/* ---- Console ---- */

/* Best effort: the host may lose some of it. */
void solo5_console_write(const char *buf, size_t size);

/* ---- Network: ethernet frames, header included ---- */

#define SOLO5_NET_ALEN 6  /* bytes of an ethernet address */
#define SOLO5_NET_HLEN 14 /* bytes of an ethernet header */

struct solo5_net_info {
    uint8_t mac_address[SOLO5_NET_ALEN];
    size_t mtu; /* without the ethernet header */
};

/* Find the device `name` of the manifest. Each device can be acquired once; then it is EINVAL. */
solo5_result_t solo5_net_acquire(const char *name, solo5_handle_t *handle,
                                 struct solo5_net_info *info);

/* Send one frame of at most mtu + SOLO5_NET_HLEN bytes. A full queue on the host drops it. */
solo5_result_t solo5_net_write(solo5_handle_t handle, const uint8_t *buf, size_t size);

/* Receive one frame, or AGAIN. The buffer must hold at least mtu + SOLO5_NET_HLEN bytes. */
solo5_result_t solo5_net_read(solo5_handle_t handle, uint8_t *buf, size_t size, size_t *read_size);

/* ---- Block devices ---- */

typedef uint64_t solo5_off_t;

struct solo5_block_info {
    solo5_off_t capacity;   /* in bytes */
    solo5_off_t block_size; /* in bytes: the unit of I/O */
};

/* Find the device `name` of the manifest. Each device can be acquired once; then it is EINVAL. */
solo5_result_t solo5_block_acquire(const char *name, solo5_handle_t *handle,
                                   struct solo5_block_info *info);

/* Write or read exactly one block, whole or not at all, at a multiple of the block's size. */
solo5_result_t solo5_block_write(solo5_handle_t handle, solo5_off_t offset, const uint8_t *buf,
                                 size_t size);
solo5_result_t solo5_block_read(solo5_handle_t handle, solo5_off_t offset, uint8_t *buf,
                                size_t size);

#endif

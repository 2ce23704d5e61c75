/*
 * What the files of the runtime know of each other.
 * The rule: a name that a guest's linker sees is `solo5_*` (the public interface), `hvt_*` (ours),
 * or weak (the C library's); so a guest can call its own functions whatever it likes.
 */
#ifndef PTENDER_RUNTIME_H
#define PTENDER_RUNTIME_H

#include "abi.h"
#include "solo5.h"

#include <stdarg.h>

#include "cpu.h" /* of the architecture's folder */

#define BINDINGS_VERSION "0.1"

/* Ends of the image's parts, from the linker script. */
extern const char hvt_text_start[], hvt_text_end[];
extern const char hvt_rodata_start[], hvt_rodata_end[];
extern const char hvt_data_start[], hvt_data_end[];
extern const char hvt_tdata_start[], hvt_tdata_end[];
extern const char hvt_tls_memory_size[], hvt_tls_align[]; /* numbers, as absolute symbols */

/* start.c: set by `--solo5:quiet`, before anything is printed. */
extern bool hvt_quiet;
_Noreturn void hvt_start(const struct hvt_boot_info *boot);

/* console.c */
void hvt_log(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* format.c: `put` receives the text in pieces; the return value is its whole length. */
struct hvt_sink {
    void (*put)(struct hvt_sink *sink, const char *text, size_t n);
};
size_t hvt_format(struct hvt_sink *sink, const char *format, va_list args)
    __attribute__((format(printf, 2, 0)));
size_t hvt_console_format(const char *format, va_list args) __attribute__((format(printf, 1, 0)));

/* exit.c: the cookie is NULL, or HVT_HALT_COOKIE_SIZE readable bytes. */
_Noreturn void hvt_halt(int status, const void *cookie);
_Noreturn void hvt_abort(const char *reason);

/* devices.c: entries of the manifest, by name (once) and by handle. NULL: there is none. */
void hvt_devices_init(const struct mft_header *manifest);
const struct mft_entry *hvt_device_acquire(const char *name, uint32_t type, solo5_handle_t *handle);
const struct mft_entry *hvt_device(solo5_handle_t handle, uint32_t type);

/* ring.c: false when there is no ring, or when it is not for this frame. */
void hvt_ring_init(const struct hvt_boot_info *boot);
bool hvt_ring_write(solo5_handle_t handle, const uint8_t *frame, size_t size);
bool hvt_ring_read(solo5_handle_t handle, uint8_t *buf, size_t size, struct hvt_net_io *answer);

/* The architecture's part. */
void hvt_cpu_init(void);
void hvt_clock_init(uint64_t cycles_per_second);

#endif

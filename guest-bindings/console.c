/*
 * Output to the console.
 * The rule: text is gathered and a line leaves in one hypercall, because the exit costs more than
 * the copy.
 */
#include "runtime.h"

#include <string.h>

struct console_sink {
    struct hvt_sink sink;
    size_t used;
    char buffer[160];
};

void solo5_console_write(const char *buf, size_t size)
{
    struct hvt_puts block = {.data_gpa = (uintptr_t)buf, .len = size};
    cpu_hypercall(HVT_HYPERCALL_PUTS, &block);
}

static void flush(struct console_sink *console)
{
    if (console->used > 0)
        solo5_console_write(console->buffer, console->used);
    console->used = 0;
}

static void put_console(struct hvt_sink *sink, const char *text, size_t n)
{
    struct console_sink *console = (struct console_sink *)sink;

    if (n > sizeof console->buffer - console->used)
        flush(console);
    if (n > sizeof console->buffer) {
        solo5_console_write(text, n);
        return;
    }
    memcpy(console->buffer + console->used, text, n);
    console->used += n;
}

size_t hvt_console_format(const char *format, va_list args)
{
    struct console_sink console;

    console.sink.put = put_console;
    console.used = 0;
    size_t length = hvt_format(&console.sink, format, args);
    flush(&console);
    return length;
}

void hvt_log(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    hvt_console_format(format, args);
    va_end(args);
}

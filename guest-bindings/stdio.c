/*
 * The C library's names for formatted output.
 * The rule: all weak, and none is used by the runtime itself, whose messages must not depend on a
 * guest's printf.
 */
#include "runtime.h"

#include <stdio.h>
#include <string.h>

#define WEAK __attribute__((weak))

struct buffer_sink {
    struct hvt_sink sink;
    char *to;
    size_t room; /* without the NUL */
};

static void put_buffer(struct hvt_sink *sink, const char *text, size_t n)
{
    struct buffer_sink *buffer = (struct buffer_sink *)sink;

    if (n > buffer->room)
        n = buffer->room;
    memcpy(buffer->to, text, n);
    buffer->to += n;
    buffer->room -= n;
}

WEAK int vsnprintf(char *to, size_t size, const char *format, va_list args)
{
    struct buffer_sink buffer = {{put_buffer}, to, size > 0 ? size - 1 : 0};
    size_t length = hvt_format(&buffer.sink, format, args);

    if (size > 0)
        *buffer.to = '\0';
    return (int)length;
}

WEAK int snprintf(char *to, size_t size, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    int length = vsnprintf(to, size, format, args);
    va_end(args);
    return length;
}

WEAK int vprintf(const char *format, va_list args)
{
    return (int)hvt_console_format(format, args);
}

WEAK int printf(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    int length = (int)hvt_console_format(format, args);
    va_end(args);
    return length;
}

WEAK int puts(const char *s)
{
    hvt_log("%s\n", s);
    return 0;
}

WEAK int putchar(int c)
{
    char byte = (char)c;

    solo5_console_write(&byte, 1);
    return (unsigned char)c;
}

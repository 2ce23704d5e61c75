/*
 * printf's formats, without floating point.
 * The rule: a conversion is first read into a `struct conversion`, then printed; unknown ones are
 * printed as they stand, so that a mistake shows.
 */
#include "runtime.h"

#include <string.h>

struct conversion {
    bool left, zero;
    size_t width, precision; /* precision: SIZE_MAX when there is none */
    size_t value_bytes;
    char kind;
};

struct output {
    struct hvt_sink *sink;
    size_t length;
};

static void put(struct output *out, const char *text, size_t n)
{
    if (n > 0)
        out->sink->put(out->sink, text, n);
    out->length += n;
}

static void pad(struct output *out, char with, size_t n)
{
    while (n-- > 0)
        put(out, &with, 1);
}

static size_t missing(size_t wanted, size_t there)
{
    return wanted > there ? wanted - there : 0;
}

static void put_text(struct output *out, const struct conversion *c, const char *text, size_t n)
{
    size_t fill = missing(c->width, n);

    if (!c->left)
        pad(out, ' ', fill);
    put(out, text, n);
    if (c->left)
        pad(out, ' ', fill);
}

/* `prefix` is what stands before the zeroes: a sign, or 0x. */
static void put_number(struct output *out, const struct conversion *c, uint64_t value,
                       const char *prefix)
{
    const char *digits = c->kind == 'X' ? "0123456789ABCDEF" : "0123456789abcdef";
    const unsigned base = c->kind == 'd' || c->kind == 'u' ? 10 : 16;
    char text[20];
    size_t at = sizeof text, prefix_length = strlen(prefix);

    for (; value != 0 || (at == sizeof text && c->precision != 0); value /= base)
        text[--at] = digits[value % base];

    size_t n = sizeof text - at;
    size_t zeroes = c->precision == SIZE_MAX ? 0 : missing(c->precision, n);
    if (c->zero && !c->left && c->precision == SIZE_MAX)
        zeroes = missing(c->width, n + prefix_length);
    size_t fill = missing(c->width, n + prefix_length + zeroes);

    pad(out, ' ', c->left ? 0 : fill);
    put(out, prefix, prefix_length);
    pad(out, '0', zeroes);
    put(out, text + at, n);
    pad(out, ' ', c->left ? fill : 0);
}

/* Cuts a value that travelled as 64 bits to the width its length modifier names. */
static uint64_t narrow(uint64_t value, size_t bytes)
{
    return bytes >= 8 ? value : value & ((UINT64_C(1) << (bytes * 8)) - 1);
}

static void put_signed(struct output *out, const struct conversion *c, uint64_t value)
{
    uint64_t sign_bit = UINT64_C(1) << (c->value_bytes * 8 - 1);

    if (value & sign_bit)
        put_number(out, c, narrow(-value, c->value_bytes), "-");
    else
        put_number(out, c, value, "");
}

static const char *parse_flags(const char *at, struct conversion *c)
{
    for (;; at++) {
        if (*at == '-')
            c->left = true;
        else if (*at == '0')
            c->zero = true;
        else
            return at;
    }
}

static const char *parse_count(const char *at, size_t *count, va_list *args)
{
    if (*at == '*') {
        int given = va_arg(*args, int);
        *count = given < 0 ? 0 : (size_t)given;
        return at + 1;
    }
    for (*count = 0; *at >= '0' && *at <= '9'; at++)
        *count = *count * 10 + (size_t)(*at - '0');
    return at;
}

static const char *parse_length(const char *at, size_t *value_bytes)
{
    switch (*at) {
    case 'h':
        *value_bytes = at[1] == 'h' ? sizeof(char) : sizeof(short);
        return at + (at[1] == 'h' ? 2 : 1);
    case 'l':
        *value_bytes = sizeof(long);
        return at + (at[1] == 'l' ? 2 : 1);
    case 'z':
    case 'j':
    case 't':
        *value_bytes = sizeof(uint64_t);
        return at + 1;
    default:
        *value_bytes = sizeof(int);
        return at;
    }
}

/* Reads what follows a `%`, and returns where it ends. */
static const char *parse_conversion(const char *at, struct conversion *c, va_list *args)
{
    *c = (struct conversion){.precision = SIZE_MAX};
    at = parse_flags(at, c);
    at = parse_count(at, &c->width, args);
    if (*at == '.')
        at = parse_count(at + 1, &c->precision, args);
    at = parse_length(at, &c->value_bytes);
    c->kind = *at == 'i' ? 'd' : *at;
    return *at == '\0' ? at : at + 1;
}

static uint64_t take_value(const struct conversion *c, va_list *args)
{
    if (c->value_bytes == sizeof(uint64_t))
        return va_arg(*args, uint64_t);
    return narrow(va_arg(*args, unsigned), c->value_bytes);
}

static void put_string(struct output *out, const struct conversion *c, const char *text)
{
    if (text == NULL)
        text = "(null)";
    put_text(out, c, text, strnlen(text, c->precision));
}

/* False: it is not a conversion that is known here. */
static bool put_conversion(struct output *out, const struct conversion *c, va_list *args)
{
    char byte;

    switch (c->kind) {
    case 'd':
        put_signed(out, c, take_value(c, args));
        return true;
    case 'u':
    case 'x':
    case 'X':
        put_number(out, c, take_value(c, args), "");
        return true;
    case 'p':
        put_number(out, c, (uintptr_t)va_arg(*args, void *), "0x");
        return true;
    case 's':
        put_string(out, c, va_arg(*args, const char *));
        return true;
    case 'c':
        byte = (char)va_arg(*args, int);
        put_text(out, c, &byte, 1);
        return true;
    case '%':
        put(out, "%", 1);
        return true;
    default:
        return false;
    }
}

size_t hvt_format(struct hvt_sink *sink, const char *format, va_list given)
{
    struct output out = {.sink = sink};
    struct conversion c;
    va_list args; /* a copy: the address of a parameter may have another type than va_list * */

    va_copy(args, given);
    while (*format != '\0') {
        const char *percent = strchr(format, '%');
        size_t plain = percent == NULL ? strlen(format) : (size_t)(percent - format);
        put(&out, format, plain);
        format += plain;
        if (*format == '\0')
            break;
        const char *after = parse_conversion(format + 1, &c, &args);
        if (!put_conversion(&out, &c, &args))
            put(&out, format, (size_t)(after - format));
        format = after;
    }
    va_end(args);
    return out.length;
}

/*
 * Formatted output to the console, and nothing else of <stdio.h>. Weak symbols, as in string.h.
 * Conversions: d i u x X p s c %, with the flags - and 0, width, precision, and the lengths
 * hh h l ll z j t. No floating point: guests are compiled without the registers for it.
 */
#ifndef PTENDER_STDIO_H
#define PTENDER_STDIO_H

#include <stdarg.h>
#include <stddef.h>

int printf(const char *format, ...) __attribute__((format(printf, 1, 2)));
int vprintf(const char *format, va_list args) __attribute__((format(printf, 1, 0)));
int snprintf(char *to, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
int vsnprintf(char *to, size_t size, const char *format, va_list args)
    __attribute__((format(printf, 3, 0)));
int puts(const char *s);
int putchar(int c);

#endif

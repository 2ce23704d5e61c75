/*
 * What the test guests share: expectations, and words of the command line.
 * The rule: a guest goes on after a failed expectation, names each, and ends with one line SUCCESS
 * or FAILURE.
 */
#ifndef CHECK_H
#define CHECK_H

#include <solo5.h>
#include <stdio.h>
#include <string.h>

static unsigned failed_expectations;

#define EXPECT(what) expect((what), #what, __LINE__)

static inline void expect(bool met, const char *what, int line)
{
    if (met)
        return;
    failed_expectations++;
    printf("line %d: not so: %s\n", line, what);
}

static inline int verdict(void)
{
    puts(failed_expectations == 0 ? "SUCCESS" : "FAILURE");
    return failed_expectations == 0 ? SOLO5_EXIT_SUCCESS : SOLO5_EXIT_FAILURE;
}

/* For guests that the tender is to end: whoever gets here has failed. */
static inline int survived(void)
{
    puts("FAILURE: the tender let that pass");
    return SOLO5_EXIT_FAILURE;
}

/* The words of the command line, from 0; past the last one it is "". */
static inline const char *word_at(const char *cmdline, unsigned index)
{
    for (; index > 0 && *cmdline != '\0'; index--) {
        const char *space = strchr(cmdline, ' ');
        cmdline = space == NULL ? cmdline + strlen(cmdline) : space + 1;
    }
    return cmdline;
}

static inline bool is_word(const char *at, const char *word)
{
    size_t n = strlen(word);
    return strncmp(at, word, n) == 0 && (at[n] == '\0' || at[n] == ' ');
}

/* A decimal number at the start of a word; `otherwise` when there is none. */
static inline uint64_t number_at(const char *at, uint64_t otherwise)
{
    uint64_t value = 0;

    if (*at < '0' || *at > '9')
        return otherwise;
    for (; *at >= '0' && *at <= '9'; at++)
        value = value * 10 + (uint64_t)(*at - '0');
    return value;
}

#endif

/*
 * The memory that the children of a fork server share with it (tender/embed/heap.py).
 * Declarations only: cffi reads this file, too.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define HEAP_RANGES 32
#define HEAP_PAGES 32768 /* in all ranges */

/* Clear Python's cache of types, which refers to the names that were used last. */
void heap_clear_cache(void);

/* Have malloc take what comes next from fresh pages: blocks that were freed stay taken. */
void heap_fill(void);

/* Make room for a copy of `length` bytes, which children compare with; 0, or -1 and errno. */
int heap_reserve(size_t length);

/* Make `length` bytes at `start`, private memory of a process with one thread, a private mapping of a
 * file with the same content, unless it holds what is the thread's own; 0, or -1 and errno. */
int heap_keep(uintptr_t start, size_t length);

/* Note which pages of these ranges are copies of this process; `pagemap` is /proc/self/pagemap. 0, or
 * -1 and errno. */
int heap_note_copies(int pagemap);

/* Clear the cache, and give back those that are as in the file, but for the one that holds `kept`,
 * which a signal handler writes to. No other thread may run. Returns how many pages, or -1 and errno. */
long heap_give_back(uintptr_t kept);

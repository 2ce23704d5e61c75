/*
 * The time-stamp counter of this machine, which a guest on the native CPU reads.
 *
 * Declarations only: cffi reads this file, too.
 */
#pragma once

#include <stdint.h>

/* Hz: as the CPU says, else measured since this module was loaded, once. */
int64_t tsc_hz(void);
uint64_t tsc_read(void);

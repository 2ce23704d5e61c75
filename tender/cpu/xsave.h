/* Where this machine's CPU keeps the parts of an XSAVE area. cffi reads this file, too. */
#pragma once

#include <stdint.h>

/* The offset of a part beyond x87 and SSE in the standard format, by its number in XCR0; 0 where the
 * CPU has none (Intel SDM volume 2, CPUID leaf 0Dh). Makers of CPUs differ. */
uint32_t xsave_offset(uint32_t part);

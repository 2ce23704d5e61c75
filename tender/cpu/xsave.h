/* What this machine's CPU says by CPUID, and where it keeps the parts of an XSAVE area. cffi reads
 * this file, too. */
#pragma once

#include <stdint.h>

/* The offset of a part beyond x87 and SSE in the standard format, by its number in XCR0; 0 where the
 * CPU has none (Intel SDM volume 2, CPUID leaf 0Dh). Makers of CPUs differ. */
uint32_t xsave_offset(uint32_t part);

/* XCR0: the parts that programs may use; 1, which is x87 alone, where there is no XSAVE. */
uint64_t xsave_enabled(void);

/* EAX, EBX, ECX, EDX of a leaf, into `registers`; zeros where the CPU has no such leaf. */
void cpuid_leaf(uint32_t leaf, uint32_t subleaf, uint32_t *registers);

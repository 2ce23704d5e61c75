/* xsave.h has what this does. */
#include <cpuid.h>
#include <string.h>

#include "xsave.h"

uint32_t xsave_offset(uint32_t part)
{
    unsigned int size, offset, ecx, edx;
    return __get_cpuid_count(0xd, part, &size, &offset, &ecx, &edx) && size ? offset : 0;
}

uint64_t xsave_enabled(void)
{
    uint32_t registers[4], low, high;
    cpuid_leaf(1, 0, registers);
    if (!(registers[2] & bit_OSXSAVE))
        return 1;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

void cpuid_leaf(uint32_t leaf, uint32_t subleaf, uint32_t *registers)
{
    memset(registers, 0, 4 * sizeof *registers);
    (void)__get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2],
                            &registers[3]);
}

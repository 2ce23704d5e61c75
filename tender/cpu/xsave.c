/* xsave.h has what this does. */
#include <cpuid.h>

#include "xsave.h"

uint32_t xsave_offset(uint32_t part)
{
    unsigned int size, offset, ecx, edx;
    return __get_cpuid_count(0xd, part, &size, &offset, &ecx, &edx) && size ? offset : 0;
}

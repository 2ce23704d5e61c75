/*
 * From Python to the code that makes a guest of this process; spt.h has what the function does.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <stddef.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "spt.h"

#ifndef AT_RSEQ_FEATURE_SIZE
#define AT_RSEQ_FEATURE_SIZE 27
#endif
#ifndef AT_MINSIGSTKSZ
#define AT_MINSIGSTKSZ 51
#endif
#define RSEQ_FLAG_UNREGISTER 1
#define RSEQ_SIGNATURE 0x53053053 /* glibc's, sysdeps/unix/sysv/linux/x86/bits/rseq.h */
#define RSEQ_SIZE 32ul            /* of its first version; later ones are a multiple */

/* glibc registers an area of the thread with the kernel, which writes there at each preemption. */
static void leave_rseq(void)
{
    const ptrdiff_t *offset = dlsym(RTLD_DEFAULT, "__rseq_offset");
    if (!offset)
        return;
    char *area = (char *)__builtin_thread_pointer() + *offset;
    unsigned long size = (getauxval(AT_RSEQ_FEATURE_SIZE) + RSEQ_SIZE - 1) / RSEQ_SIZE * RSEQ_SIZE;
    for (; size > RSEQ_SIZE; size -= RSEQ_SIZE)
        if (!syscall(SYS_rseq, area, size, RSEQ_FLAG_UNREGISTER, RSEQ_SIGNATURE))
            return;
    syscall(SYS_rseq, area, RSEQ_SIZE, RSEQ_FLAG_UNREGISTER, RSEQ_SIGNATURE);
}

int spt_become(void *region)
{
    void (*code)(void);
    if (mprotect(region, SPT_CODE_SIZE, PROT_READ | PROT_EXEC))
        return -1;
    leave_rseq();
    *(void **)&code = region;
    code();
    return -1;
}

uint64_t spt_frame_size(void) { return getauxval(AT_MINSIGSTKSZ); }

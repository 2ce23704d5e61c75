/*
 * From the first C instruction to the guest's main function.
 * The rule: first what reports a failure (stack guard, trap handlers), then what can fail.
 */
#include "runtime.h"

#include <string.h>

/* Not zero, so that the data segment has bytes in the file whatever the guest is like. */
uintptr_t __stack_chk_guard = 0x595e9fbd94fda700;

bool hvt_quiet;

static struct solo5_start_info start_info;

/* The lowest byte stays 0: a string that overruns its array can't reproduce the guard. */
static inline uintptr_t make_guard(void)
{
    uint64_t mixed = (cpu_cycles() ^ __stack_chk_guard) * 0x9e3779b97f4a7c15;
    return (mixed ^ (mixed >> 29)) & ~(uintptr_t)0xff;
}

/* Takes the words that are meant for the runtime off the command line. */
static const char *take_options(const char *cmdline)
{
    static const char quiet[] = "--solo5:quiet";
    const size_t n = sizeof quiet - 1;

    if (strncmp(cmdline, quiet, n) != 0 || (cmdline[n] != '\0' && cmdline[n] != ' '))
        return cmdline;
    hvt_quiet = true;
    cmdline += n;
    while (*cmdline == ' ')
        cmdline++;
    return cmdline;
}

static void print_banner(uint64_t mem_size)
{
    hvt_log("Solo5: ptender guest bindings " BINDINGS_VERSION ", " BINDINGS_TARGET_NAME
            " ABI %u, %lu MiB\n",
            BINDINGS_ABI_VERSION, mem_size >> 20);
    hvt_log("Solo5: text %p..%p rodata %p..%p data %p..%p heap %p..%p\n",
            (const void *)hvt_text_start, (const void *)hvt_text_end,
            (const void *)hvt_rodata_start, (const void *)hvt_rodata_end,
            (const void *)hvt_data_start, (const void *)hvt_data_end, (void *)start_info.heap_start,
            (void *)(start_info.heap_start + start_info.heap_size));
}

/* Never returns, so the guard it changes is never compared with the one it was entered with. */
__attribute__((no_stack_protector)) void hvt_start(const struct hvt_boot_info *boot)
{
    __stack_chk_guard = make_guard();
    hvt_cpu_init();
    hvt_clock_init(boot->cpu_cycle_freq);
    hvt_devices_init((const struct mft_header *)(uintptr_t)boot->mft_gpa);
    hvt_ring_init(boot);

    start_info.cmdline = take_options((const char *)(uintptr_t)boot->cmdline_gpa);
    start_info.heap_start = boot->kernel_end;
    start_info.heap_size = boot->mem_size - boot->kernel_end;
    if (!hvt_quiet)
        print_banner(boot->mem_size);
    solo5_exit(solo5_app_main(&start_info));
}

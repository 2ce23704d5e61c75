/* Greets, says what it was told and how long it took. */
#include <solo5.h>
#include <stdio.h>

int solo5_app_main(const struct solo5_start_info *info)
{
    solo5_time_t begin = solo5_clock_monotonic();

    printf("Hello from a guest with %zu KiB of heap\n", info->heap_size / 1024);
    printf("My command line: %s\n", info->cmdline[0] != '\0' ? info->cmdline : "(empty)");
    printf("That took me %lu ns\n", solo5_clock_monotonic() - begin);
    return SOLO5_EXIT_SUCCESS;
}

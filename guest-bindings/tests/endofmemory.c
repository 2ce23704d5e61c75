/*
 * Gives the console text that ends exactly where memory does, which is fine. With the word `beyond`
 * there is one byte more, and the tender must end it.
 */
#include "check.h"
#include "raw.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    /* The runtime aligns the stack that starts here, and leaves the topmost 16 bytes alone. */
    static const char text[] = "the last bytes.\n";
    const size_t length = sizeof text - 1;
    char *last = (char *)info->heap_start + info->heap_size - length;
    bool beyond = is_word(info->cmdline, "beyond");
    struct hvt_puts block = {.data_gpa = (uintptr_t)last, .len = length + (beyond ? 1 : 0)};

    memcpy(last, text, length);
    raw_hypercall(HVT_HYPERCALL_PUTS, &block);
    return beyond ? survived() : verdict();
}

/*
 * Makes a function in its heap and calls it; makes another one in the same place by a write and by
 * reading it from the disk "storage", whose first block is a function that returns 3. With "data" as
 * its command line, calls a function in its data.
 */
#include "check.h"

#if defined(__x86_64__)
#define RETURN(n) {0xb8, (n), 0, 0, 0, 0xc3} /* mov $n, %eax; ret */
#else
#define RETURN(n) {(uint8_t)((n) << 5), 0, 0x80, 0x52, 0xc0, 0x03, 0x5f, 0xd6} /* mov w0, #n; ret */
#endif

static const uint8_t one[] = RETURN(1), two[] = RETURN(2);
static uint8_t data[] = RETURN(4);

static int call(const void *code)
{
    int (*volatile function)(void) = (int (*)(void))(uintptr_t)code;
    return function();
}

int solo5_app_main(const struct solo5_start_info *info)
{
    uint8_t *heap = (uint8_t *)info->heap_start;
    solo5_handle_t disk;
    struct solo5_block_info disk_info;

    if (is_word(info->cmdline, "data")) {
        printf("calling %p\n", (void *)data);
        EXPECT(call(data) == 4);
        return verdict();
    }
    printf("calling %p\n", (void *)heap);
    EXPECT(solo5_block_acquire("storage", &disk, &disk_info) == SOLO5_R_OK);
    for (int i = 0; i < 3; i++) {
        memcpy(heap, one, sizeof one);
        EXPECT(call(heap) == 1);
        memcpy(heap, two, sizeof two);
        EXPECT(call(heap) == 2);
        EXPECT(solo5_block_read(disk, 0, heap, disk_info.block_size) == SOLO5_R_OK);
        EXPECT(call(heap) == 3);
    }
    return verdict();
}

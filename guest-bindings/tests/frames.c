/* Waits for a frame, reads it and one that is not there, and sends one of its own. */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *info)
{
    struct solo5_net_info net;
    solo5_handle_t handle;
    solo5_handle_set_t ready = 0;
    static uint8_t frame[2048];
    size_t size = 0;

    (void)info;
    if (solo5_net_acquire("service", &handle, &net) != SOLO5_R_OK)
        return SOLO5_EXIT_FAILURE;
    solo5_yield(solo5_clock_monotonic() + UINT64_C(10000000000), &ready);
    EXPECT(ready == (solo5_handle_set_t)1 << handle);
    EXPECT(solo5_net_read(handle, frame, sizeof frame, &size) == SOLO5_R_OK);
    EXPECT(solo5_net_read(handle, frame, sizeof frame, &size) == SOLO5_R_AGAIN);
    memset(frame, 0x55, 60);
    EXPECT(solo5_net_write(handle, frame, 60) == SOLO5_R_OK);
    return verdict();
}

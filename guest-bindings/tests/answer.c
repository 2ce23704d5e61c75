/*
 * Answers each frame that comes to "service" with how many came and the sum of their bytes, and
 * writes both to "storage"; one of another type than its first ends it. All it knows is in memory.
 */
#include "check.h"

static uint64_t count, sum;
static uint8_t frame[2048], sector[512];

int solo5_app_main(const struct solo5_start_info *info)
{
    struct solo5_net_info net;
    struct solo5_block_info block;
    solo5_handle_t port, disk;
    uint8_t type = 0;
    size_t size;

    (void)info;
    if (solo5_net_acquire("service", &port, &net) != SOLO5_R_OK ||
        solo5_block_acquire("storage", &disk, &block) != SOLO5_R_OK)
        return SOLO5_EXIT_FAILURE;
    puts("ready");
    for (;;) {
        solo5_handle_set_t ready = 0;
        solo5_yield(solo5_clock_monotonic() + UINT64_C(3600000000000), &ready);
        if (solo5_net_read(port, frame, sizeof frame, &size) != SOLO5_R_OK)
            continue;
        if (count && frame[12] != type)
            break;
        type = frame[12];
        for (size_t i = SOLO5_NET_HLEN; i < size; i++)
            sum += frame[i];
        count++;
        memcpy(sector, &count, sizeof count);
        memcpy(sector + sizeof count, &sum, sizeof sum);
        EXPECT(solo5_block_write(disk, 0, sector, sizeof sector) == SOLO5_R_OK);
        memcpy(frame, frame + SOLO5_NET_ALEN, SOLO5_NET_ALEN);
        memcpy(frame + SOLO5_NET_ALEN, net.mac_address, SOLO5_NET_ALEN);
        memcpy(frame + SOLO5_NET_HLEN, sector, 2 * sizeof count);
        EXPECT(solo5_net_write(port, frame, 60) == SOLO5_R_OK);
    }
    printf("%lu frames, sum %lu\n", count, sum);
    return verdict();
}

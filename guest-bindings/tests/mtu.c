/* Prints what the tender says of the network device "service". */
#include "check.h"

int solo5_app_main(const struct solo5_start_info *start)
{
    (void)start;
    struct solo5_net_info info;
    solo5_handle_t net;
    const uint8_t *mac = info.mac_address;
    static uint8_t frame[65536];
    size_t size;

    EXPECT(solo5_net_acquire("service", &net, &info) == SOLO5_R_OK);
    printf("mtu %zu mac %02x:%02x:%02x:%02x:%02x:%02x\n", info.mtu, mac[0], mac[1], mac[2], mac[3],
           mac[4], mac[5]);
    EXPECT((mac[0] & 1) == 0);
    EXPECT(solo5_net_acquire("service", &net, &info) == SOLO5_R_EINVAL);
    EXPECT(solo5_net_write(net, frame, info.mtu + SOLO5_NET_HLEN + 1) == SOLO5_R_EINVAL);
    EXPECT(solo5_net_read(net, frame, info.mtu + SOLO5_NET_HLEN - 1, &size) == SOLO5_R_EINVAL);
    return verdict();
}

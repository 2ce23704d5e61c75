/*
 * Talks to another guest of this kind by UDP, on the network device "service": every 10 ms one
 * numbered datagram, until it has sent --count=N of them; then it listens for a second.
 *   --ipv4=10.0.0.2/24   its address
 *   --peer=10.0.0.3      the other one's
 * Built from talk.c and net.c.
 */
#include "../samples/net.h"

#include <stdio.h>
#include <string.h>

enum { PORT = 7, PERIOD_NS = 10000000 };

static struct net net;
static const uint8_t everyone[NET_MAC_SIZE] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

static void say(uint32_t peer, uint32_t number)
{
    struct net_udp *udp = net_outgoing(&net);
    be32 body = put32(number);

    *udp = (struct net_udp){
        .from = put16(PORT),
        .to = put16(PORT),
        .length = put16(sizeof *udp + sizeof body),
        .checksum = put16(0),
    };
    memcpy(udp + 1, &body, sizeof body);
    net_send(&net, everyone, peer, NET_PROTOCOL_UDP, sizeof *udp + sizeof body);
}

static void hear(void)
{
    enum net_event event;

    while ((event = net_receive(&net)) != NET_NOTHING) {
        if (event != NET_UDP)
            continue;
        be32 body;
        memcpy(&body, (struct net_udp *)net_payload(&net) + 1, sizeof body);
        printf("heard %u at %lu\n", get32(body), solo5_clock_monotonic());
    }
}

/* Sleep until `deadline`, and listen. */
static void listen(solo5_time_t deadline)
{
    while (solo5_clock_monotonic() < deadline) {
        solo5_yield(deadline, NULL);
        hear();
    }
}

int solo5_app_main(const struct solo5_start_info *info)
{
    const char *own = net_option(info->cmdline, "--ipv4=");
    const char *other = net_option(info->cmdline, "--peer=");
    uint64_t count = net_number_option(info->cmdline, "--count=", 10);
    uint32_t ipv4, peer;
    unsigned prefix_length = 24;

    if (!own || !net_parse_ipv4(own, &ipv4, &prefix_length) || !other ||
        !net_parse_ipv4(other, &peer, &prefix_length)) {
        puts("--ipv4 and --peer take an address");
        return SOLO5_EXIT_FAILURE;
    }
    if (!net_open(&net, "service", ipv4, prefix_length))
        return SOLO5_EXIT_FAILURE;
    solo5_time_t next = solo5_clock_monotonic();
    for (uint32_t number = 0; number < count; number++) {
        say(peer, number);
        next += PERIOD_NS;
        listen(next);
    }
    listen(next + 100 * PERIOD_NS);
    puts("done");
    return SOLO5_EXIT_SUCCESS;
}

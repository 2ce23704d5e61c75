/*
 * Answers ARP and ping on the network device "service".
 *   --ipv4=10.0.0.2/24   its address
 *   --limit=N            end after N answered pings
 * Built from ping.c and net.c.
 */
#include "net.h"

#include <stdio.h>

static struct net net;

/* Each frame that waits, then sleep until the next: asking the tender again is cheaper than
 * sleeping for nothing. */
static void serve(uint64_t limit)
{
    for (uint64_t answered = 0; answered < limit;) {
        switch (net_receive(&net)) {
        case NET_NOTHING:
            solo5_yield(UINT64_MAX, NULL);
            break;
        case NET_PING:
            answered++;
            break;
        default:
            break;
        }
    }
    printf("answered %lu pings\n", limit);
}

int solo5_app_main(const struct solo5_start_info *info)
{
    const char *given = net_option(info->cmdline, "--ipv4=");
    uint32_t ipv4;
    unsigned prefix_length = 24;

    if (!net_parse_ipv4(given != NULL ? given : "10.0.0.2/24", &ipv4, &prefix_length)) {
        puts("--ipv4 takes an address such as 10.0.0.2/24");
        return SOLO5_EXIT_FAILURE;
    }
    if (!net_open(&net, "service", ipv4, prefix_length))
        return SOLO5_EXIT_FAILURE;
    net_print(&net);
    serve(net_number_option(info->cmdline, "--limit=", UINT64_MAX));
    return SOLO5_EXIT_SUCCESS;
}

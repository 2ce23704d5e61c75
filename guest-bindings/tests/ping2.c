/*
 * Answers ARP and ping on two network devices, service0 as 10.0.0.2/24 and service1 as 10.1.0.2/24.
 * With the word `limit` it ends after 100 pings, with --limit=N after N, on both together.
 * Built from ping2.c and ../samples/net.c.
 */
#include "../samples/net.h"
#include "check.h"

static struct net nets[2];
static uint64_t answered[2];

/* A device is read when the tender says it is ready: if it never says so, this guest answers
 * nothing. */
static void serve(uint64_t limit)
{
    while (answered[0] + answered[1] < limit) {
        solo5_handle_set_t ready;
        solo5_yield(UINT64_MAX, &ready);
        for (unsigned i = 0; i < 2; i++)
            if ((ready >> nets[i].handle & 1) && net_receive(&nets[i]) == NET_PING)
                answered[i]++;
    }
}

int solo5_app_main(const struct solo5_start_info *info)
{
    uint64_t all = is_word(info->cmdline, "limit") ? 100 : UINT64_MAX;

    EXPECT(net_open(&nets[0], "service0", 0x0a000002, 24));
    EXPECT(net_open(&nets[1], "service1", 0x0a010002, 24));
    if (failed_expectations > 0)
        return verdict();
    net_print(&nets[0]);
    net_print(&nets[1]);
    serve(net_number_option(info->cmdline, "--limit=", all));
    printf("answered %lu and %lu pings\n", answered[0], answered[1]);
    return verdict();
}

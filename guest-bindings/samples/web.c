/*
 * A web server on the network device "service": one page about itself at /, and 404 elsewhere. It
 * also answers ARP and ping, and gives back what it is sent on UDP port 7.
 *   --ipv4=10.0.0.2/24   its address
 *   --gateway=10.0.0.1   understood and not needed: an answer goes back the way the question came
 *   --limit=N            end after N requests
 * Built from web.c, tcp.c and net.c.
 */
#include "tcp.h"

#include <stdio.h>
#include <string.h>

enum { PORT_ECHO = 7, PORT_HTTP = 80 };

static struct net net;
static uint64_t requests;
static size_t memory_kib;

/* ---- UDP echo ---- */

/* Swapping the ports and the addresses does not change the checksum, so it is not touched. */
static void echo(void)
{
    struct net_udp *udp = net_payload(&net);
    be16 from = udp->from;

    if (get16(udp->to) != PORT_ECHO)
        return;
    if (get16(from) == PORT_ECHO) /* two echo servers would never stop */
        return;
    udp->from = udp->to;
    udp->to = from;
    net_reply(&net, get16(udp->length));
}

/* ---- HTTP ---- */

static bool has_ended(const char *request, size_t size)
{
    for (size_t i = 3; i < size; i++)
        if (request[i] == '\n' && memcmp(&request[i - 3], "\r\n\r\n", 4) == 0)
            return true;
    return false;
}

static size_t write_page(char *to, size_t room)
{
    uint64_t up_ms = solo5_clock_monotonic() / 1000000;

    return (size_t)snprintf(
        to, room,
        "<!doctype html>\n<title>A unikernel</title>\n<h1>Hello from a unikernel</h1>\n"
        "<p>Up for %lu.%03lu s, with %zu KiB of memory; this is request %lu.</p>\n",
        up_ms / 1000, up_ms % 1000, memory_kib, requests);
}

static size_t write_response(char *to, size_t room, const char *status, const char *body)
{
    return (size_t)snprintf(
        to, room,
        "HTTP/1.1 %s\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: %zu\r\n"
        "Connection: close\r\n\r\n%s",
        status, strlen(body), body);
}

static size_t answer(const char *request, size_t size, char *response, size_t room)
{
    static char page[1024];
    static const char root[] = "GET / ";

    if (!has_ended(request, size) && size < TCP_REQUEST_ROOM)
        return 0;
    if (!has_ended(request, size))
        return write_response(response, room, "431 Request Header Fields Too Large", "");
    requests++;
    if (strncmp(request, root, sizeof root - 1) != 0)
        return write_response(response, room, "404 Not Found",
                              "<!doctype html>\n<title>Not here</title>\n");
    write_page(page, sizeof page);
    return write_response(response, room, "200 OK", page);
}

/* ---- Main ---- */

static struct tcp tcp;

static void take_all_frames(void)
{
    for (;;) {
        switch (net_receive(&net)) {
        case NET_NOTHING:
            return;
        case NET_UDP:
            echo();
            break;
        case NET_TCP:
            tcp_receive(&tcp);
            tcp_tick(&tcp); /* here too, or a flood of frames would keep a lost one waiting */
            break;
        default:
            break;
        }
    }
}

static void serve(uint64_t limit)
{
    while (requests < limit || !tcp_is_idle(&tcp)) {
        solo5_yield(tcp_deadline(&tcp), NULL);
        take_all_frames();
        tcp_tick(&tcp);
    }
    printf("answered %lu requests\n", requests);
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
    memory_kib = (info->heap_start + info->heap_size) / 1024;
    tcp.net = &net;
    tcp.port = PORT_HTTP;
    tcp.answer = answer;
    net_print(&net);
    serve(net_number_option(info->cmdline, "--limit=", UINT64_MAX));
    return SOLO5_EXIT_SUCCESS;
}

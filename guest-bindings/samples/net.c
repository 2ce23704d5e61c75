/* See net.h. The rule in here: no length that came with a frame is used before it was compared with
 * the frame's. */
#include "net.h"

#include <stdio.h>
#include <string.h>

enum { TYPE_IPV4 = 0x0800, TYPE_ARP = 0x0806 };
enum { ARP_REQUEST = 1, ARP_REPLY = 2 };
enum { ICMP_ECHO_REPLY = 0, ICMP_ECHO_REQUEST = 8 };
enum { PLAIN_HEADER = 0x45, PLAIN_HEADER_SIZE = 20, OUR_TTL = 64, DONT_FRAGMENT = 0x4000 };

struct arp {
    be16 hardware, protocol;
    uint8_t hardware_size, protocol_size;
    be16 operation;
    uint8_t sender_mac[NET_MAC_SIZE];
    be32 sender;
    uint8_t target_mac[NET_MAC_SIZE];
    be32 target;
};

struct icmp {
    uint8_t type, code;
    be16 checksum;
};

static const uint8_t everyone[NET_MAC_SIZE] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

/* ---- Ethernet ---- */

static struct net_ethernet *ethernet(struct net *net)
{
    return (struct net_ethernet *)net->frame;
}

static void *ethernet_payload(struct net *net)
{
    return net->frame + SOLO5_NET_HLEN;
}

static void send_frame(struct net *net, const uint8_t *to, uint16_t type, size_t payload_size)
{
    struct net_ethernet *header = ethernet(net);

    memmove(header->to, to, NET_MAC_SIZE); /* `to` may well be header->from */
    memcpy(header->from, net->mac, NET_MAC_SIZE);
    header->type = put16(type);
    solo5_net_write(net->handle, net->frame, SOLO5_NET_HLEN + payload_size);
}

/* ---- ARP ---- */

static void announce(struct net *net)
{
    struct arp *arp = ethernet_payload(net);

    *arp = (struct arp){
        .hardware = put16(1), /* ethernet */
        .protocol = put16(TYPE_IPV4),
        .hardware_size = NET_MAC_SIZE,
        .protocol_size = sizeof(be32),
        .operation = put16(ARP_REQUEST),
        .sender = put32(net->ipv4),
        .target = put32(net->ipv4),
    };
    memcpy(arp->sender_mac, net->mac, NET_MAC_SIZE);
    send_frame(net, everyone, TYPE_ARP, sizeof *arp);
}

static void answer_arp(struct net *net, size_t size)
{
    struct arp *arp = ethernet_payload(net);

    if (size < sizeof *arp || get16(arp->operation) != ARP_REQUEST ||
        get32(arp->target) != net->ipv4)
        return;
    arp->operation = put16(ARP_REPLY);
    arp->target = arp->sender;
    memcpy(arp->target_mac, arp->sender_mac, NET_MAC_SIZE);
    arp->sender = put32(net->ipv4);
    memcpy(arp->sender_mac, net->mac, NET_MAC_SIZE);
    send_frame(net, arp->target_mac, TYPE_ARP, sizeof *arp);
}

/* ---- IPv4 ---- */

uint64_t net_sum(const void *data, size_t size, uint64_t sum)
{
    const uint8_t *at = data;

    /* By words of 32 bits, which the folding below makes the same as by 16; x86 and arm are
     * little-endian, which net_checksum() undoes. */
    for (; size >= 4; size -= 4, at += 4) {
        uint32_t word;
        __builtin_memcpy(&word, at, 4);
        sum += word;
    }
    for (unsigned shift = 0; size > 0; size--, shift += 8)
        sum += (uint64_t)*at++ << shift;
    return sum;
}

uint16_t net_checksum(uint64_t sum)
{
    while (sum > 0xffff)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~__builtin_bswap16((uint16_t)sum);
}

struct net_ipv4 *net_packet(struct net *net)
{
    return ethernet_payload(net);
}

static size_t header_size(const struct net_ipv4 *packet)
{
    return (packet->version_and_words & 0x0fu) * 4;
}

void *net_payload(struct net *net)
{
    return (uint8_t *)net_packet(net) + header_size(net_packet(net));
}

size_t net_payload_size(struct net *net)
{
    return get16(net_packet(net)->total_length) - header_size(net_packet(net));
}

static void send_packet(struct net *net, const uint8_t *mac, size_t payload_size)
{
    struct net_ipv4 *packet = net_packet(net);
    size_t length = header_size(packet) + payload_size;

    packet->total_length = put16((uint16_t)length);
    packet->fragment = put16(DONT_FRAGMENT);
    packet->ttl = OUR_TTL;
    packet->checksum = put16(0);
    packet->checksum = put16(net_checksum(net_sum(packet, header_size(packet), 0)));
    send_frame(net, mac, TYPE_IPV4, length);
}

void net_reply(struct net *net, size_t payload_size)
{
    struct net_ipv4 *packet = net_packet(net);

    packet->to = packet->from;
    packet->from = put32(net->ipv4);
    send_packet(net, ethernet(net)->from, payload_size);
}

void *net_outgoing(struct net *net)
{
    return (uint8_t *)ethernet_payload(net) + PLAIN_HEADER_SIZE;
}

void net_send(struct net *net, const uint8_t *mac, uint32_t to, uint8_t protocol,
              size_t payload_size)
{
    *net_packet(net) = (struct net_ipv4){
        .version_and_words = PLAIN_HEADER,
        .protocol = protocol,
        .from = put32(net->ipv4),
        .to = put32(to),
    };
    send_packet(net, mac, payload_size);
}

/* Whole, unbroken, and for us; what ethernet added to make a frame long enough does not count. */
static bool is_good_packet(struct net *net, size_t size)
{
    struct net_ipv4 *packet = net_packet(net);

    if (size < sizeof *packet || packet->version_and_words >> 4 != 4)
        return false;
    size_t header = header_size(packet), total = get16(packet->total_length);
    bool is_fragment = get16(packet->fragment) & 0x3fff;
    return header >= sizeof *packet && total >= header && total <= size && !is_fragment &&
           get32(packet->to) == net->ipv4 && net_checksum(net_sum(packet, header, 0)) == 0;
}

/* ---- ICMP ---- */

/*
 * The type is all that changes, so the checksum is moved by as much instead of being summed up
 * again: a request that was damaged becomes an answer that is damaged, and the one who asked will
 * see it.
 */
static bool answer_ping(struct net *net)
{
    struct icmp *icmp = net_payload(net);

    if (net_payload_size(net) < 8 || icmp->type != ICMP_ECHO_REQUEST || icmp->code != 0)
        return false;
    uint32_t sum = get16(icmp->checksum) + (ICMP_ECHO_REQUEST << 8);
    icmp->type = ICMP_ECHO_REPLY;
    icmp->checksum = put16((uint16_t)(sum + (sum >> 16)));
    net_reply(net, net_payload_size(net));
    return true;
}

/* ---- What comes in ---- */

static bool is_good_udp(struct net *net)
{
    struct net_udp *udp = net_payload(net);
    size_t size = net_payload_size(net);

    return size >= sizeof *udp && get16(udp->length) >= sizeof *udp && get16(udp->length) <= size;
}

static enum net_event take_packet(struct net *net, size_t size)
{
    if (!is_good_packet(net, size))
        return NET_DONE;
    switch (net_packet(net)->protocol) {
    case NET_PROTOCOL_ICMP:
        return answer_ping(net) ? NET_PING : NET_DONE;
    case NET_PROTOCOL_UDP:
        return is_good_udp(net) ? NET_UDP : NET_DONE;
    case NET_PROTOCOL_TCP:
        return net_payload_size(net) >= 20 ? NET_TCP : NET_DONE;
    default:
        return NET_DONE;
    }
}

static bool is_for_us(struct net *net)
{
    const uint8_t *to = ethernet(net)->to;
    return memcmp(to, net->mac, NET_MAC_SIZE) == 0 || memcmp(to, everyone, NET_MAC_SIZE) == 0;
}

enum net_event net_receive(struct net *net)
{
    size_t size;

    if (solo5_net_read(net->handle, net->frame, sizeof net->frame, &size) != SOLO5_R_OK)
        return NET_NOTHING;
    if (size < SOLO5_NET_HLEN || !is_for_us(net))
        return NET_DONE;
    size -= SOLO5_NET_HLEN;
    switch (get16(ethernet(net)->type)) {
    case TYPE_ARP:
        answer_arp(net, size);
        return NET_DONE;
    case TYPE_IPV4:
        return take_packet(net, size);
    default:
        return NET_DONE;
    }
}

bool net_open(struct net *net, const char *device, uint32_t ipv4, unsigned prefix_length)
{
    struct solo5_net_info info;

    if (solo5_net_acquire(device, &net->handle, &info) != SOLO5_R_OK)
        return false;
    memcpy(net->mac, info.mac_address, NET_MAC_SIZE);
    net->mtu = info.mtu;
    net->ipv4 = ipv4;
    net->prefix_length = prefix_length;
    announce(net);
    return true;
}

/* ---- Words ---- */

const char *net_option(const char *cmdline, const char *name)
{
    size_t n = strlen(name);

    while (cmdline != NULL && *cmdline != '\0') {
        if (strncmp(cmdline, name, n) == 0)
            return cmdline + n;
        cmdline = strchr(cmdline, ' ');
        if (cmdline != NULL)
            cmdline++;
    }
    return NULL;
}

/* Reads a number up to `max` at *at and moves *at behind it. */
static bool parse_number(const char **at, uint64_t max, uint64_t *value)
{
    const char *begin = *at;

    for (*value = 0; **at >= '0' && **at <= '9'; (*at)++) {
        *value = *value * 10 + (uint64_t)(**at - '0');
        if (*value > max)
            return false;
    }
    return *at > begin;
}

uint64_t net_number_option(const char *cmdline, const char *name, uint64_t otherwise)
{
    const char *at = net_option(cmdline, name);
    uint64_t value;

    return at != NULL && parse_number(&at, UINT32_MAX, &value) ? value : otherwise;
}

bool net_parse_ipv4(const char *text, uint32_t *ipv4, unsigned *prefix_length)
{
    uint32_t address = 0;
    uint64_t part, prefix = *prefix_length;

    for (int i = 0; i < 4; i++) {
        if (i > 0 && *text++ != '.')
            return false;
        if (!parse_number(&text, 255, &part))
            return false;
        address = address << 8 | (uint32_t)part;
    }
    if (*text == '/') {
        text++;
        if (!parse_number(&text, 32, &prefix))
            return false;
    }
    if (*text != '\0' && *text != ' ')
        return false;
    *ipv4 = address;
    *prefix_length = (unsigned)prefix;
    return true;
}

void net_print(const struct net *net)
{
    const uint8_t *m = net->mac;
    uint32_t a = net->ipv4;

    printf("listening on %u.%u.%u.%u/%u, mac %02x:%02x:%02x:%02x:%02x:%02x, mtu %zu\n", a >> 24,
           a >> 16 & 255, a >> 8 & 255, a & 255, net->prefix_length, m[0], m[1], m[2], m[3], m[4],
           m[5], net->mtu);
}

/*
 * Speaks IPv6 on the network device "service": answers neighbour discovery and ping, and gives back
 * what it is sent on UDP port 7. Its addresses are fd00::2 and the link-local one of its MAC.
 * Built from ping6.c and net.c.
 */
#include "net.h"

#include <stdio.h>
#include <string.h>

enum { TYPE_IPV6 = 0x86dd, PROTOCOL_ICMPV6 = 58, PORT_ECHO = 7 };
enum { ECHO_REQUEST = 128, ECHO_REPLY = 129, SOLICITATION = 135, ADVERTISEMENT = 136 };
enum { OUR_HOPS = 64, DISCOVERY_HOPS = 255 }; /* a router lowers it, so 255 is a neighbour's */
enum { SOLICITED = 0x40000000, OVERRIDE = 0x20000000, TARGET_MAC = 2 };

struct address {
    uint8_t bytes[16];
};

struct packet {
    be32 version;
    be16 length; /* of what follows this header */
    uint8_t protocol, hops;
    struct address from, to;
};

struct icmp {
    uint8_t type, code;
    be16 checksum;
};

struct neighbour {
    struct icmp icmp;
    be32 flags;
    struct address target;
    uint8_t option, option_words; /* not in every solicitation */
    uint8_t mac[NET_MAC_SIZE];
};

static struct frame {
    struct net_ethernet ethernet;
    struct packet packet;
    union {
        struct icmp icmp;
        struct neighbour neighbour;
        struct net_udp udp;
        uint8_t bytes[NET_MAX_MTU - sizeof(struct packet)];
    };
} frame;

static const struct address all_nodes = {{0xff, 2, [15] = 1}};
static const uint8_t all_nodes_mac[NET_MAC_SIZE] = {0x33, 0x33, 0, 0, 0, 1};
static struct address ours[2] = {{{0xfd, [15] = 2}}, {{0xfe, 0x80}}};
static uint8_t our_mac[NET_MAC_SIZE];
static solo5_handle_t handle;

static bool is_ours(const struct address *address)
{
    return memcmp(address, &ours[0], sizeof *address) == 0 ||
           memcmp(address, &ours[1], sizeof *address) == 0;
}

/* Over the addresses too; 0 if the packet has a correct one in it. */
static uint16_t checksum(void)
{
    struct packet *packet = &frame.packet;
    size_t length = get16(packet->length);
    be32 rest[2] = {put32((uint32_t)length), put32(packet->protocol)};
    uint64_t sum = net_sum(&packet->from, 2 * sizeof packet->from, 0);

    return net_checksum(net_sum(frame.bytes, length, net_sum(rest, sizeof rest, sum)));
}

static void send(const uint8_t *mac, uint8_t hops)
{
    memmove(frame.ethernet.to, mac, NET_MAC_SIZE); /* it may well be ethernet.from */
    memcpy(frame.ethernet.from, our_mac, NET_MAC_SIZE);
    frame.ethernet.type = put16(TYPE_IPV6);
    frame.packet.version = put32((uint32_t)6 << 28);
    frame.packet.hops = hops;
    solo5_net_write(handle, (const uint8_t *)&frame,
                    SOLO5_NET_HLEN + sizeof frame.packet + get16(frame.packet.length));
}

static void swap_addresses(void)
{
    struct address from = frame.packet.from;

    frame.packet.from = frame.packet.to;
    frame.packet.to = from;
}

/* ---- Neighbour discovery ---- */

static void advertise(const uint8_t *mac, struct address to, struct address target, uint32_t flags)
{
    frame.packet.length = put16(sizeof frame.neighbour);
    frame.packet.protocol = PROTOCOL_ICMPV6;
    frame.packet.from = target;
    frame.packet.to = to;
    frame.neighbour = (struct neighbour){
        .icmp.type = ADVERTISEMENT,
        .flags = put32(flags | OVERRIDE),
        .target = target,
        .option = TARGET_MAC,
        .option_words = 1,
    };
    memcpy(frame.neighbour.mac, our_mac, NET_MAC_SIZE);
    frame.icmp.checksum = put16(checksum());
    send(mac, DISCOVERY_HOPS);
}

static void answer_solicitation(void)
{
    static const struct address nobody;
    bool has_target = get16(frame.packet.length) >= offsetof(struct neighbour, option);

    if (!has_target || frame.packet.hops != DISCOVERY_HOPS || !is_ours(&frame.neighbour.target))
        return;
    if (memcmp(&frame.packet.from, &nobody, sizeof nobody) == 0) /* it looks for duplicates */
        advertise(all_nodes_mac, all_nodes, frame.neighbour.target, 0);
    else
        advertise(frame.ethernet.from, frame.packet.from, frame.neighbour.target, SOLICITED);
}

/* ---- Echo ---- */

static void answer_ping(void)
{
    swap_addresses();
    frame.icmp.type = ECHO_REPLY;
    frame.icmp.checksum = put16(0);
    frame.icmp.checksum = put16(checksum());
    send(frame.ethernet.from, OUR_HOPS);
}

/* Swapping the ports and the addresses does not change the checksum. */
static void answer_udp(void)
{
    be16 from = frame.udp.from;

    if (get16(frame.udp.to) != PORT_ECHO || get16(from) == PORT_ECHO)
        return;
    swap_addresses();
    frame.udp.from = frame.udp.to;
    frame.udp.to = from;
    send(frame.ethernet.from, OUR_HOPS);
}

static void take_frame(size_t size)
{
    size_t head = SOLO5_NET_HLEN + sizeof frame.packet, length = get16(frame.packet.length);

    if (size < head || get16(frame.ethernet.type) != TYPE_IPV6 || length > size - head)
        return;
    bool is_icmp = frame.packet.protocol == PROTOCOL_ICMPV6 && length >= sizeof frame.icmp;
    bool is_udp = frame.packet.protocol == NET_PROTOCOL_UDP && length >= sizeof frame.udp;

    if (get32(frame.packet.version) >> 28 != 6 || !(is_icmp || is_udp) || checksum() != 0)
        return;
    if (is_icmp && frame.icmp.type == SOLICITATION)
        answer_solicitation();
    else if (is_icmp && frame.icmp.type == ECHO_REQUEST && is_ours(&frame.packet.to))
        answer_ping();
    else if (is_udp && is_ours(&frame.packet.to))
        answer_udp();
}

int solo5_app_main(const struct solo5_start_info *info)
{
    struct solo5_net_info net;
    size_t size;

    (void)info;
    if (solo5_net_acquire("service", &handle, &net) != SOLO5_R_OK)
        return SOLO5_EXIT_FAILURE;
    const uint8_t *m = memcpy(our_mac, net.mac_address, NET_MAC_SIZE);
    const uint8_t ident[8] = {m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]}; /* EUI-64 */
    memcpy(&ours[1].bytes[8], ident, sizeof ident);
    advertise(all_nodes_mac, all_nodes, ours[0], 0);
    puts("listening on fd00::2");
    for (;;) {
        solo5_yield(UINT64_MAX, NULL);
        while (solo5_net_read(handle, (uint8_t *)&frame, sizeof frame, &size) == SOLO5_R_OK)
            take_frame(size);
    }
}

/*
 * As much of ethernet, ARP, IPv4 and ICMP as a small guest needs: it answers whoever speaks to it,
 * and speaks to nobody first.
 * The rule: one frame is in hand at a time. An answer is made from the question, in place, and goes
 * back the way the question came; so there is no queue, no ARP table and no copy.
 */
#ifndef NET_H
#define NET_H

#include <solo5.h>

enum { NET_MAX_MTU = 65535, NET_MAC_SIZE = SOLO5_NET_ALEN };

/* Fields of frames are big-endian and may lie at any address. */
typedef struct {
    uint8_t bytes[2];
} be16;
typedef struct {
    uint8_t bytes[4];
} be32;

static inline uint16_t get16(be16 field)
{
    return (uint16_t)(field.bytes[0] << 8 | field.bytes[1]);
}

static inline be16 put16(uint16_t value)
{
    return (be16){{(uint8_t)(value >> 8), (uint8_t)value}};
}

static inline uint32_t get32(be32 field)
{
    return (uint32_t)field.bytes[0] << 24 | (uint32_t)field.bytes[1] << 16 |
           (uint32_t)field.bytes[2] << 8 | field.bytes[3];
}

static inline be32 put32(uint32_t value)
{
    return (be32){
        {(uint8_t)(value >> 24), (uint8_t)(value >> 16), (uint8_t)(value >> 8), (uint8_t)value}};
}

struct net_ethernet {
    uint8_t to[NET_MAC_SIZE], from[NET_MAC_SIZE];
    be16 type;
};

enum { NET_PROTOCOL_ICMP = 1, NET_PROTOCOL_TCP = 6, NET_PROTOCOL_UDP = 17 };

struct net_ipv4 {
    uint8_t version_and_words; /* 4, and the header's length in words of 4 bytes */
    uint8_t service;
    be16 total_length;
    be16 id;
    be16 fragment;
    uint8_t ttl;
    uint8_t protocol;
    be16 checksum;
    be32 from, to;
};

struct net_udp {
    be16 from, to;
    be16 length;
    be16 checksum;
};

struct net {
    solo5_handle_t handle;
    uint8_t mac[NET_MAC_SIZE];
    size_t mtu;
    uint32_t ipv4;
    unsigned prefix_length;
    uint8_t frame[NET_MAX_MTU + SOLO5_NET_HLEN]; /* the one in hand */
};

/* What net_receive() found. Only the last two leave something for the caller to do. */
enum net_event {
    NET_NOTHING, /* no frame is waiting */
    NET_DONE,    /* a frame was answered, or was not for us */
    NET_PING,    /* an echo request was answered */
    NET_UDP,     /* the frame in hand is a whole UDP datagram to us */
    NET_TCP,     /* the frame in hand is a TCP segment to us, its header complete */
};

/* Open the manifest's `device`, and tell its neighbours our address. False: there is no such
 * device. */
bool net_open(struct net *net, const char *device, uint32_t ipv4, unsigned prefix_length);

/* Take one frame in hand; ARP and echo requests are answered at once. */
enum net_event net_receive(struct net *net);

/* The IPv4 packet in hand, what it carries, and how much of that there is. */
struct net_ipv4 *net_packet(struct net *net);
void *net_payload(struct net *net);
size_t net_payload_size(struct net *net);

/* Send the packet in hand back to where it came from, with the payload that is there now. */
void net_reply(struct net *net, size_t payload_size);

/* Send a packet of a plain header and `payload_size` bytes, which are at net_outgoing() already. */
void *net_outgoing(struct net *net);
void net_send(struct net *net, const uint8_t *mac, uint32_t to, uint8_t protocol,
              size_t payload_size);

/* The internet checksum: a sum to start from or to go on with, and its end. */
uint64_t net_sum(const void *data, size_t size, uint64_t sum);
uint16_t net_checksum(uint64_t sum);

/* Words of the command line: the text after `name` (such as "--limit="), or NULL. */
const char *net_option(const char *cmdline, const char *name);
uint64_t net_number_option(const char *cmdline, const char *name, uint64_t otherwise);

/* Reads `a.b.c.d` with or without `/prefix`; false, and nothing changed, if it is not that. */
bool net_parse_ipv4(const char *text, uint32_t *ipv4, unsigned *prefix_length);

/* Prints `listening on a.b.c.d/prefix` and what else there is to know. */
void net_print(const struct net *net);

#endif

/*
 * See tcp.h. The rule in here: sequence numbers are compared by their difference only, since they
 * wrap around, and what a peer acknowledges is believed only up to what was sent.
 */
#include "tcp.h"

#include <string.h>

#define MILLISECOND UINT64_C(1000000)

enum { FIN = 1, SYN = 2, RST = 4, PSH = 8, ACK = 16 };
enum { HEADER_SIZE = 20, OPTION_END = 0, OPTION_NOTHING = 1, OPTION_MSS = 2, MSS_SIZE = 4 };
enum { MSS_WITHOUT_OPTION = 536, MSS_LEAST = 64 };
enum { RETRY_MS = 500, TRIES = 6, IDLE_MS = 10000 };

struct header {
    be16 from, to;
    be32 sequence, acknowledged;
    uint8_t words; /* the header's length in words of 4 bytes, in the upper half */
    uint8_t flags;
    be16 window, checksum, urgent;
};

/* A segment that came in; `data` lies in the frame, so it is gone when anything is sent. */
struct arrival {
    uint32_t from;
    uint16_t port, to_port;
    uint8_t mac[NET_MAC_SIZE];
    uint8_t flags;
    uint32_t sequence, acknowledged;
    size_t window, largest;
    const char *data;
    size_t size;
};

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* ---- Segments ---- */

/* The checksum covers the addresses too. */
static uint64_t pseudo_sum(uint32_t from, uint32_t to, size_t size)
{
    const struct {
        be32 from, to;
        uint8_t zero, protocol;
        be16 size;
    } pseudo = {put32(from), put32(to), 0, NET_PROTOCOL_TCP, put16((uint16_t)size)};

    return net_sum(&pseudo, sizeof pseudo, 0);
}

/* The largest segment that the peer takes, from the options of its SYN. */
static size_t parse_largest(const uint8_t *option, const uint8_t *end)
{
    while (option < end && *option != OPTION_END) {
        if (*option == OPTION_NOTHING) {
            option++;
            continue;
        }
        if (end - option < 2 || option[1] < 2 || option[1] > end - option)
            break;
        if (option[0] == OPTION_MSS && option[1] == MSS_SIZE) {
            size_t given = (size_t)(option[2] << 8 | option[3]);
            return given < MSS_LEAST ? MSS_LEAST : given;
        }
        option += option[1];
    }
    return MSS_WITHOUT_OPTION;
}

static bool parse(struct net *net, struct arrival *a)
{
    const struct header *header = net_payload(net);
    const struct net_ipv4 *packet = net_packet(net);
    size_t size = net_payload_size(net), header_size = (header->words >> 4) * 4u;

    if (header_size < HEADER_SIZE || header_size > size)
        return false;
    a->from = get32(packet->from);
    if (net_checksum(net_sum(header, size, pseudo_sum(a->from, net->ipv4, size))) != 0)
        return false;
    memcpy(a->mac, ((struct net_ethernet *)net->frame)->from, NET_MAC_SIZE);
    a->port = get16(header->from);
    a->to_port = get16(header->to);
    a->flags = header->flags;
    a->sequence = get32(header->sequence);
    a->acknowledged = get32(header->acknowledged);
    a->window = get16(header->window);
    a->data = (const char *)header + header_size;
    a->size = size - header_size;
    a->largest = parse_largest((const uint8_t *)(header + 1), (const uint8_t *)a->data);
    return true;
}

/* Sends what lies behind the header at net_outgoing() already: options on a SYN, otherwise data. */
static void send(struct tcp *tcp, const struct arrival *to, struct header header, size_t behind)
{
    struct header *at = net_outgoing(tcp->net);
    size_t size = HEADER_SIZE + behind, options = header.flags & SYN ? behind : 0;

    header.from = put16(to->to_port);
    header.to = put16(to->port);
    header.words = (uint8_t)((HEADER_SIZE + options) / 4 << 4);
    *at = header;
    at->checksum =
        put16(net_checksum(net_sum(at, size, pseudo_sum(tcp->net->ipv4, to->from, size))));
    net_send(tcp->net, to->mac, to->from, NET_PROTOCOL_TCP, size);
}

/* To a segment that belongs to no connection. */
static void refuse(struct tcp *tcp, const struct arrival *a)
{
    uint32_t length = (uint32_t)a->size + (a->flags & SYN ? 1 : 0) + (a->flags & FIN ? 1 : 0);
    struct header header = {.flags = RST, .sequence = put32(a->acknowledged)};

    if (a->flags & RST)
        return;
    if (!(a->flags & ACK))
        header = (struct header){.flags = RST | ACK, .acknowledged = put32(a->sequence + length)};
    send(tcp, a, header, 0);
}

/* ---- One connection ---- */

static void send_as(struct tcp *tcp, const struct tcp_connection *c, uint8_t flags,
                    uint32_t position, size_t behind)
{
    struct arrival to = {.from = c->peer, .port = c->peer_port, .to_port = tcp->port};
    size_t room = TCP_REQUEST_ROOM - (c->answered ? 0 : c->request_size);
    struct header header = {
        .flags = flags,
        .sequence = put32(c->first + position),
        .acknowledged = put32(c->received),
        .window = put16((uint16_t)room),
    };

    memcpy(to.mac, c->peer_mac, NET_MAC_SIZE);
    send(tcp, &to, header, behind);
}

static void set_deadline(struct tcp_connection *c)
{
    uint64_t wait_ms = c->acked < c->end ? (uint64_t)RETRY_MS << c->tries : IDLE_MS;
    c->deadline = solo5_clock_monotonic() + wait_ms * MILLISECOND;
}

static void send_syn(struct tcp *tcp, struct tcp_connection *c)
{
    uint8_t *options = (uint8_t *)net_outgoing(tcp->net) + HEADER_SIZE;
    size_t largest = tcp->net->mtu - HEADER_SIZE - sizeof(struct net_ipv4);

    options[0] = OPTION_MSS;
    options[1] = MSS_SIZE;
    options[2] = (uint8_t)(largest >> 8);
    options[3] = (uint8_t)largest;
    send_as(tcp, c, SYN | ACK, 0, MSS_SIZE);
    c->next = 1;
}

/* Sends the response from position `next`, and the FIN with its last byte. */
static void send_data(struct tcp *tcp, struct tcp_connection *c, size_t room)
{
    size_t left = c->end - 1 - c->next;
    size_t size = least(least(left, room), least(c->largest, tcp->net->mtu - 40));
    uint8_t flags = ACK | PSH;

    if (size == left)
        flags |= FIN;
    memcpy((uint8_t *)net_outgoing(tcp->net) + HEADER_SIZE, c->response + c->next - 1, size);
    send_as(tcp, c, flags, c->next, size);
    c->next += (uint32_t)size + (flags & FIN ? 1 : 0);
}

/* Sends all that the peer has room for. A peer without room gets one byte, which makes it say how
 * much it has now. */
static void send_all(struct tcp *tcp, struct tcp_connection *c)
{
    size_t window = c->window > 0 ? c->window : 1;

    while (c->next < c->end && c->next - c->acked < window) {
        if (c->next == 0)
            send_syn(tcp, c);
        else
            send_data(tcp, c, window - (c->next - c->acked));
    }
    if (c->top < c->next)
        c->top = c->next;
    set_deadline(c);
}

static void acknowledge(struct tcp *tcp, const struct tcp_connection *c)
{
    send_as(tcp, c, ACK, c->top, 0);
}

static void take_acknowledgement(struct tcp_connection *c, const struct arrival *a)
{
    uint32_t position = a->acknowledged - c->first;

    if (position < c->acked || position > c->top)
        return;
    c->window = a->window;
    if (position == c->acked)
        return;
    c->acked = position;
    if (c->next < position)
        c->next = position;
    c->tries = 0;
}

/* True: something came that the peer wants acknowledged, be it new or not. */
static bool take_data(struct tcp_connection *c, const struct arrival *a)
{
    uint32_t known = c->received - a->sequence; /* its bytes that came before; huge: a gap */

    if (a->size == 0 && !(a->flags & FIN))
        return known != 0; /* a keep-alive asks for an answer by being out of place */
    if (known > a->size || c->peer_finished)
        return true;
    size_t fresh = a->size - known;
    size_t kept = c->answered ? 0 : least(fresh, TCP_REQUEST_ROOM - c->request_size);
    memcpy(c->request + c->request_size, a->data + known, kept);
    c->request_size += kept;
    c->received += (uint32_t)(c->answered ? fresh : kept);
    if ((a->flags & FIN) && c->received == a->sequence + (uint32_t)a->size) {
        c->received++;
        c->peer_finished = true;
    }
    return true;
}

/* An answer once there is one to give; only the end when there will be no more of the question. */
static void try_answer(struct tcp *tcp, struct tcp_connection *c)
{
    if (c->answered || c->request_size == 0)
        return;
    size_t size = tcp->answer(c->request, c->request_size, c->response, TCP_RESPONSE_ROOM);
    if (size == 0)
        return;
    c->answered = true;
    c->end = 1 + (uint32_t)size + 1;
}

static void give_up_question(struct tcp_connection *c)
{
    if (c->answered || !(c->peer_finished || c->request_size == TCP_REQUEST_ROOM))
        return;
    c->answered = true;
    c->end = 2;
}

static bool is_over(const struct tcp_connection *c)
{
    return c->answered && c->peer_finished && c->acked == c->end;
}

static void take_established(struct tcp *tcp, struct tcp_connection *c, const struct arrival *a)
{
    bool wants_acknowledgement = take_data(c, a);
    uint32_t before = c->next;

    try_answer(tcp, c);
    give_up_question(c);
    send_all(tcp, c);
    if (wants_acknowledgement && c->next == before)
        acknowledge(tcp, c);
    if (is_over(c))
        c->used = false;
}

static void take(struct tcp *tcp, struct tcp_connection *c, const struct arrival *a)
{
    if (a->flags & RST) {
        if (a->sequence == c->received)
            c->used = false;
        return;
    }
    if (a->flags & SYN) { /* ours was lost, or this is not the peer that we know: it will tell */
        if (c->acked == 0)
            c->next = 0;
        else
            acknowledge(tcp, c);
        send_all(tcp, c);
        return;
    }
    if (!(a->flags & ACK))
        return;
    take_acknowledgement(c, a);
    if (c->acked > 0)
        take_established(tcp, c, a);
    else
        refuse(tcp, a);
}

/* ---- All connections ---- */

static struct tcp_connection *find(struct tcp *tcp, const struct arrival *a)
{
    for (struct tcp_connection *c = tcp->connections; c < tcp->connections + TCP_CONNECTIONS; c++)
        if (c->used && c->peer == a->from && c->peer_port == a->port)
            return c;
    return NULL;
}

/* A sequence number that an outsider can't tell from the time alone. */
static uint32_t pick_first(const struct arrival *a)
{
    uint64_t mixed =
        solo5_clock_wall() ^ (uint64_t)a->from << 32 ^ (uint64_t)a->port << 16 ^ a->sequence;

    mixed *= 0x9e3779b97f4a7c15;
    return (uint32_t)(mixed >> 32);
}

/* With no place free nothing is said: the peer will ask again. */
static void open(struct tcp *tcp, const struct arrival *a)
{
    for (struct tcp_connection *c = tcp->connections; c < tcp->connections + TCP_CONNECTIONS; c++) {
        if (c->used)
            continue;
        memset(c, 0, offsetof(struct tcp_connection, request));
        c->used = true;
        c->peer = a->from;
        c->peer_port = a->port;
        memcpy(c->peer_mac, a->mac, NET_MAC_SIZE);
        c->first = pick_first(a);
        c->end = 1;
        c->window = a->window;
        c->largest = a->largest;
        c->received = a->sequence + 1;
        send_all(tcp, c);
        return;
    }
}

void tcp_receive(struct tcp *tcp)
{
    struct arrival a;

    if (!parse(tcp->net, &a))
        return;
    bool is_our_port = a.to_port == tcp->port;
    struct tcp_connection *c = is_our_port ? find(tcp, &a) : NULL;
    if (c != NULL)
        take(tcp, c, &a);
    else if (is_our_port && (a.flags & (SYN | ACK | RST)) == SYN)
        open(tcp, &a);
    else
        refuse(tcp, &a);
}

static void tick(struct tcp *tcp, struct tcp_connection *c)
{
    bool is_waiting =
        c->acked < c->end; /* for an acknowledgement, not only for the peer to ask or to end */

    if (!is_waiting || ++c->tries >= TRIES) {
        send_as(tcp, c, RST | ACK, c->top, 0);
        c->used = false;
        return;
    }
    c->next = c->acked;
    send_all(tcp, c);
}

void tcp_tick(struct tcp *tcp)
{
    solo5_time_t now = solo5_clock_monotonic();

    for (struct tcp_connection *c = tcp->connections; c < tcp->connections + TCP_CONNECTIONS; c++)
        if (c->used && c->deadline <= now)
            tick(tcp, c);
}

solo5_time_t tcp_deadline(const struct tcp *tcp)
{
    solo5_time_t first = UINT64_MAX;

    for (const struct tcp_connection *c = tcp->connections; c < tcp->connections + TCP_CONNECTIONS;
         c++)
        if (c->used && c->deadline < first)
            first = c->deadline;
    return first;
}

bool tcp_is_idle(const struct tcp *tcp)
{
    return tcp_deadline(tcp) == UINT64_MAX;
}

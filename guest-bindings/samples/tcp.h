/*
 * TCP for servers of one question and one answer: a peer connects and asks, is answered, and the
 * connection ends. The rule: a connection is a fixed place in a table, and everything it has to say
 * is in its buffer until the peer has acknowledged it; so sending again is only a matter of going
 * back.
 */
#ifndef TCP_H
#define TCP_H

#include "net.h"

enum { TCP_CONNECTIONS = 8, TCP_REQUEST_ROOM = 1024, TCP_RESPONSE_ROOM = 2048 };

/* Writes the response to the whole of a request; 0: the request is not complete. */
typedef size_t tcp_answer(const char *request, size_t size, char *response, size_t room);

struct tcp_connection {
    bool used;
    uint32_t peer;
    uint16_t peer_port;
    uint8_t peer_mac[NET_MAC_SIZE];

    /* What we say, as positions: 0 is the SYN, 1 the response's first byte, and the FIN follows its
     * last. */
    uint32_t first;            /* the sequence number of position 0 */
    uint32_t acked, next, top; /* acknowledged before, to be sent next, sent at most before */
    uint32_t end;              /* behind the last position there is */
    size_t window, largest;    /* of the peer: room for bytes, bytes of a segment */

    uint32_t received;            /* the sequence number that the peer is to send next */
    bool answered, peer_finished; /* our response is in the buffer; the peer has sent its FIN */
    unsigned tries;
    solo5_time_t deadline;
    size_t request_size;
    char request[TCP_REQUEST_ROOM];
    char response[TCP_RESPONSE_ROOM];
};

struct tcp {
    struct net *net;
    uint16_t port;
    tcp_answer *answer;
    struct tcp_connection connections[TCP_CONNECTIONS];
};

/* Take the TCP segment that net_receive() has found. */
void tcp_receive(struct tcp *tcp);

/* Send again, or give up, what has waited too long. */
void tcp_tick(struct tcp *tcp);

/* When tcp_tick() is needed next. */
solo5_time_t tcp_deadline(const struct tcp *tcp);

/* No connection is open. */
bool tcp_is_idle(const struct tcp *tcp);

#endif

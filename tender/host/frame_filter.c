/*
 * The frame filter: the process between a guest's network device and passt, for `--net user`.
 *
 * Usage: frame-filter GUEST PASST [4 ADDRESS GATEWAY] [6|6host ADDRESS GATEWAY]
 *
 * GUEST is the descriptor of a seqpacket socket, a frame per message; PASST that of a stream
 * socket, 4 bytes (big-endian) before each frame giving its length. passt connects a guest to any
 * address of the host, 127.0.0.0/8 included, and release 2023-03-09 trusts the lengths. Here a
 * frame to or from the loopback ends, and one to a multicast group, which the host's own services
 * may have joined, or to all hosts but a request of DHCP. With 4, ADDRESS and GATEWAY, passt maps
 * the gateway to 127.0.0.1, so that clients there get answers from UDP ports of the guest at
 * ADDRESS: these answers pass, and no other.
 *
 * IPv6 passes with 6 only, for a guest in the /64 network of ADDRESS. GATEWAY is the link-local
 * address that clients on the host's ::1 have for the guest: answers to them pass, and with 6host
 * all to there. Nothing else passes to the host's link, to multicast groups or to 0000::/16, where
 * ::1 is, and ::ffff:127.0.0.1; and nothing with an extension header, behind which passt would look
 * for what is not checked here.
 *
 * The rule here: what comes from the guest's end is hostile. It is copied once, checked as passt
 * will read it, and sent as it was checked. This process can do nothing but receive and send.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NOBODY 65534
#define FRAME_MAX (65535 + 14 + 4) /* the largest MTU, Ethernet's header, a VLAN tag */
#define FRAME_MIN 14
#define LENGTH 4
#define BATCH 64 /* frames of one side before the other one's turn */
#define TCP_SYN_ACK 0x12
#define TCP_SYN 0x02
#define DHCP_SERVER 67
#define MULTICAST_FIRST 224 /* the first byte of 224.0.0.0/4; behind it, what is reserved */
#define DHCPV6_SERVER 547
#define ECHO_REQUEST 128 /* of ICMPv6 */
#define NDP_FIRST 133
#define NDP_SOLICITATION 135
#define NDP_LAST 136
#define IP6_HEADER 40
#define IP6_ADDRESS 16

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
#else
#error "which AUDIT_ARCH is this?"
#endif

enum { GOES_ON, ENDS };

static int guest, passt;
static int guards_gateway;
static uint8_t address[4], gateway[4];
typedef uint8_t ports[(1 << 16) / 8];
static ports asked, asked6;                /* of the gateway: those that have sent to the guest */
static int has_ip6, reaches_host6;
static uint8_t address6[IP6_ADDRESS], gateway6[IP6_ADDRESS];
static uint8_t unsent[LENGTH + FRAME_MAX]; /* a frame for passt, from unsent_from on */
static size_t unsent_from, unsent_to;
static uint8_t stream[1 << 17]; /* of passt, from stream_from on */
static size_t stream_from, stream_to;
static int guest_is_full, passt_has_ended;

static unsigned int be16(const uint8_t *bytes) { return (unsigned int)bytes[0] << 8 | bytes[1]; }

static int has_port(const ports set, unsigned int port) { return set[port / 8] >> port % 8 & 1; }

static void add_port(ports set, unsigned int port) { set[port / 8] |= (uint8_t)(1u << port % 8); }

/* Whether what passt would make of this packet to the gateway is an answer to a client. */
static int is_answer(uint8_t protocol, const uint8_t *data, size_t length, const ports clients)
{
    if (protocol == IPPROTO_TCP)
        return length >= 14 && (data[13] & TCP_SYN_ACK) != TCP_SYN;
    return protocol == IPPROTO_UDP && length >= 4 && has_port(clients, be16(data + 2));
}

static int is_dhcp(uint8_t protocol, const uint8_t *data, size_t length)
{
    return protocol == IPPROTO_UDP && length >= 4 && be16(data + 2) == DHCP_SERVER;
}

static int is_same(const uint8_t *one, const uint8_t *other)
{
    return !memcmp(one, other, IP6_ADDRESS);
}

static int is_link_local(const uint8_t *ip6) { return ip6[0] == 0xfe && (ip6[1] & 0xc0) == 0x80; }

/* What passt answers itself: neighbour and router discovery, and DHCPv6. */
static int is_for_passt(uint8_t protocol, const uint8_t *target, const uint8_t *data, size_t length)
{
    static const uint8_t servers[IP6_ADDRESS] = {0xff, 2, [13] = 1, [15] = 2};
    if (protocol == IPPROTO_ICMPV6)
        return data[0] >= NDP_FIRST && data[0] <= NDP_LAST &&
               (data[0] != NDP_SOLICITATION || length >= 8 + IP6_ADDRESS);
    return protocol == IPPROTO_UDP && be16(data + 2) == DHCPV6_SERVER && is_same(target, servers);
}

static int may_pass6(const uint8_t *header, size_t length)
{
    static const uint8_t any[IP6_ADDRESS];
    if (!has_ip6 || length < IP6_HEADER + 8 || header[0] >> 4 != 6)
        return 0;
    const uint8_t *source = header + 8, *target = header + 24, *data = header + IP6_HEADER;
    uint8_t protocol = header[6];
    length -= IP6_HEADER;
    if (be16(header + 4) != length)
        return 0;
    int is_guests = is_link_local(source) || !memcmp(source, address6, 8);
    if (is_for_passt(protocol, target, data, length))
        return is_guests || is_same(source, any);
    int is_echo = protocol == IPPROTO_ICMPV6 && data[0] == ECHO_REQUEST;
    int is_tcp = protocol == IPPROTO_TCP && length >= 20;
    if (!is_guests || (!is_echo && !is_tcp && protocol != IPPROTO_UDP))
        return 0;
    if (is_same(target, gateway6))
        return reaches_host6 || is_answer(protocol, data, length, asked6);
    return !is_link_local(target) && target[0] != 0xff && (target[0] || target[1]);
}

/* passt looks at the header's length, protocol and addresses, and not at fragments. */
static int may_pass(const uint8_t *frame, size_t length)
{
    static const uint8_t any[4], all_hosts[4] = {255, 255, 255, 255};
    if (length < FRAME_MIN)
        return 0;
    if (be16(frame + 12) == 0x0806) /* ARP, which passt answers itself */
        return 1;
    if (be16(frame + 12) == 0x86dd)
        return may_pass6(frame + FRAME_MIN, length - FRAME_MIN);
    if (be16(frame + 12) != 0x0800 || length < FRAME_MIN + 20)
        return 0;
    const uint8_t *header = frame + FRAME_MIN, *source = header + 12, *target = header + 16;
    size_t header_length = (header[0] & 0xf) * 4u;
    if (header[0] >> 4 != 4 || header_length < 20 || FRAME_MIN + header_length > length)
        return 0;
    int is_from_any = !memcmp(source, any, sizeof any); /* a client of DHCP */
    if (source[0] == 127 || target[0] == 127 || target[0] == 0 || (!source[0] && !is_from_any))
        return 0;
    uint8_t protocol = header[9];
    const uint8_t *data = header + header_length;
    length -= FRAME_MIN + header_length;
    if (target[0] >= MULTICAST_FIRST &&
        (memcmp(target, all_hosts, sizeof all_hosts) || !is_dhcp(protocol, data, length)))
        return 0;
    if (!guards_gateway)
        return 1;
    if (memcmp(source, address, sizeof address) && !is_from_any)
        return 0; /* passt would take it for the guest's address */
    return memcmp(target, gateway, sizeof gateway) || is_dhcp(protocol, data, length) ||
           is_answer(protocol, data, length, asked);
}

static int send_unsent(void)
{
    ssize_t done = send(passt, unsent + unsent_from, unsent_to - unsent_from,
                        MSG_DONTWAIT | MSG_NOSIGNAL);
    if (done < 0)
        return errno == EAGAIN ? GOES_ON : ENDS;
    unsent_from += (size_t)done;
    if (unsent_from == unsent_to)
        unsent_from = unsent_to = 0;
    return GOES_ON;
}

static int from_guest(void)
{
    for (int i = 0; i < BATCH && !unsent_to; i++) {
        uint8_t *frame = unsent + LENGTH;
        ssize_t length = recv(guest, frame, FRAME_MAX, MSG_DONTWAIT | MSG_TRUNC);
        if (length <= 0)
            return length < 0 && errno == EAGAIN ? GOES_ON : ENDS;
        if (length > FRAME_MAX || !may_pass(frame, (size_t)length))
            continue;
        uint32_t prefix = htonl((uint32_t)length);
        memcpy(unsent, &prefix, LENGTH);
        unsent_to = LENGTH + (size_t)length;
        if (send_unsent() == ENDS)
            return ENDS;
    }
    return GOES_ON;
}

static void note_client6(const uint8_t *frame, size_t length)
{
    const uint8_t *header = frame + FRAME_MIN;
    if (has_ip6 && length >= FRAME_MIN + IP6_HEADER + 4 && be16(frame + 12) == 0x86dd &&
        header[6] == IPPROTO_UDP && is_same(header + 8, gateway6))
        add_port(asked6, be16(header + IP6_HEADER));
}

static void note_client(const uint8_t *frame, size_t length)
{
    const uint8_t *header = frame + FRAME_MIN;
    if (!guards_gateway || length < FRAME_MIN + 20 + 4 || be16(frame + 12) != 0x0800)
        return;
    size_t header_length = (header[0] & 0xf) * 4u;
    if (header[9] != IPPROTO_UDP || memcmp(header + 12, gateway, sizeof gateway) ||
        FRAME_MIN + header_length + 4 > length)
        return;
    add_port(asked, be16(header + header_length));
}

static int to_guest(void)
{
    guest_is_full = 0;
    while (stream_to - stream_from >= LENGTH) {
        const uint8_t *frame = stream + stream_from + LENGTH;
        uint32_t length;
        memcpy(&length, frame - LENGTH, LENGTH);
        length = ntohl(length);
        if (length > FRAME_MAX)
            return ENDS;
        if (stream_to - stream_from - LENGTH < length)
            break;
        note_client(frame, length);
        note_client6(frame, length);
        if (length >= FRAME_MIN && send(guest, frame, length, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
            guest_is_full = errno == EAGAIN;
            return guest_is_full ? GOES_ON : ENDS;
        }
        stream_from += LENGTH + length;
    }
    return passt_has_ended ? ENDS : GOES_ON;
}

static int from_passt(void)
{
    memmove(stream, stream + stream_from, stream_to - stream_from);
    stream_to -= stream_from;
    stream_from = 0;
    ssize_t length = recv(passt, stream + stream_to, sizeof stream - stream_to, MSG_DONTWAIT);
    if (length < 0)
        return errno == EAGAIN ? GOES_ON : ENDS;
    passt_has_ended = !length;
    stream_to += (size_t)length;
    return to_guest();
}

/* Until an end is closed. A descriptor of which nothing is wanted is left out: it may be closed. */
static void serve(void)
{
    int state = GOES_ON;
    while (state == GOES_ON) {
        short guest_events = (short)((unsent_to ? 0 : POLLIN) | (guest_is_full ? POLLOUT : 0));
        short passt_events = (short)((guest_is_full ? 0 : POLLIN) | (unsent_to ? POLLOUT : 0));
        struct pollfd fds[2] = {
            {.fd = guest_events ? guest : -1, .events = guest_events},
            {.fd = passt_events ? passt : -1, .events = passt_events},
        };
        if (poll(fds, 2, -1) < 0)
            continue;
        if (fds[1].revents && unsent_to)
            state = send_unsent();
        if (fds[0].revents && guest_is_full && state == GOES_ON)
            state = to_guest();
        if (fds[1].revents && !guest_is_full && state == GOES_ON)
            state = from_passt();
        if (fds[0].revents && !unsent_to && state == GOES_ON)
            state = from_guest();
    }
    /* passt ends when it sees the end of its stream. The guest's end is open until it has. */
    shutdown(passt, SHUT_WR);
    while (recv(passt, stream, sizeof stream, 0) > 0)
        ;
}

#define ALLOW(name)                                                                                \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_##name, 0, 1),                                        \
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

static int confine(void)
{
    static const struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        ALLOW(recvfrom),
        ALLOW(sendto),
#ifdef __NR_poll
        ALLOW(poll),
#endif
        ALLOW(ppoll),
        ALLOW(shutdown),
        ALLOW(write),
        ALLOW(close),
        ALLOW(restart_syscall),
        ALLOW(exit_group),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };
    const struct sock_fprog program = {
        .len = sizeof filter / sizeof filter[0],
        .filter = (struct sock_filter *)filter,
    };
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) ||
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0);
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void become_nobody(void)
{
    if (geteuid())
        return;
    if (setgroups(0, NULL) || setresgid(NOBODY, NOBODY, NOBODY) ||
        setresuid(NOBODY, NOBODY, NOBODY))
        fail("user nobody");
}

/* `4 ADDRESS GATEWAY`, or the same for IPv6; whether it is right. */
static int take_network(char **words)
{
    if (!strcmp(words[0], "4")) {
        guards_gateway = 1;
        return inet_pton(AF_INET, words[1], address) == 1 &&
               inet_pton(AF_INET, words[2], gateway) == 1;
    }
    has_ip6 = 1;
    reaches_host6 = !strcmp(words[0], "6host");
    return (reaches_host6 || !strcmp(words[0], "6")) &&
           inet_pton(AF_INET6, words[1], address6) == 1 &&
           inet_pton(AF_INET6, words[2], gateway6) == 1;
}

int main(int argc, char **argv)
{
    int ready[2];
    if (argc < 3 || argc % 3)
        return 2;
    guest = atoi(argv[1]);
    passt = atoi(argv[2]);
    for (int i = 3; i < argc; i += 3)
        if (!take_network(argv + i))
            return 2;
    become_nobody();
    if (pipe(ready))
        fail("pipe");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child) { /* in the background from here on, as passt */
        char byte;
        close(ready[1]);
        return read(ready[0], &byte, 1) != 1;
    }
    setsid();
    if (confine())
        fail("seccomp");
    if (write(ready[1], "", 1) != 1)
        _exit(1);
    const int others[] = {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO, ready[0], ready[1]};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        close(others[i]);
    serve();
    _exit(0);
}

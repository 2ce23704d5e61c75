/*
 * Packets of a guest in a pcapng file: one write(2) each, so that none is missing however the guest
 * ends. The guest never waits for whoever reads them.
 *
 * Source: draft-ietf-opsawg-pcapng, enhanced packet block and its options.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "pcap.h"

_Static_assert(offsetof(struct pcap, lost) == 24, "struct pcap");
_Static_assert(offsetof(struct pcap, block) == 32, "struct pcap");

enum { ENHANCED_PACKET = 6, COMMENT_MAX = 1024 };
enum { OPT_END = 0, OPT_COMMENT = 1, EPB_FLAGS = 2, EPB_DROPCOUNT = 4 };

static uint8_t *put_u32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, sizeof value);
    return at + sizeof value;
}

/* Zeros up to a multiple of 4 bytes. */
static uint8_t *pad(uint8_t *at, size_t length)
{
    size_t rest = -length & 3;
    memset(at, 0, rest);
    return at + rest;
}

static uint8_t *put_option(uint8_t *at, uint16_t code, const void *value, size_t length)
{
    at = put_u32(at, code | (uint32_t)length << 16);
    memcpy(at, value, length);
    return pad(at + length, length);
}

size_t pcap_block(void *to, const struct pcap_packet *packet)
{
    uint8_t *block = to, *at = block + 8;
    uint32_t captured = packet->length < PCAP_SNAP ? (uint32_t)packet->length : PCAP_SNAP;
    size_t comment = strnlen(packet->comment, COMMENT_MAX);

    at = put_u32(at, packet->interface);
    at = put_u32(at, (uint32_t)(packet->time_ns >> 32));
    at = put_u32(at, (uint32_t)packet->time_ns);
    at = put_u32(at, captured);
    at = put_u32(at, (uint32_t)packet->length);
    memcpy(at, packet->frame, captured);
    at = pad(at + captured, captured);
    if (comment)
        at = put_option(at, OPT_COMMENT, packet->comment, comment);
    at = put_option(at, EPB_FLAGS, &packet->direction, sizeof packet->direction);
    if (packet->lost)
        at = put_option(at, EPB_DROPCOUNT, &packet->lost, sizeof packet->lost);
    at = put_u32(at, OPT_END);
    uint32_t size = (uint32_t)(at - block) + 4;
    put_u32(at, size);
    put_u32(block, ENHANCED_PACKET);
    put_u32(block + 4, size);
    return size;
}

/* Write what is in `block`, or as much as a FIFO takes. Whether all of it is written. */
static int flush(struct pcap *pcap)
{
    while (pcap->from < pcap->to) {
        ssize_t done = write(pcap->fd, pcap->block + pcap->from, pcap->to - pcap->from);
        if (done > 0)
            pcap->from += (uint32_t)done;
        else if (done < 0 && errno == EAGAIN)
            return 0;
        else if (done == 0 || errno != EINTR) {
            pcap->error = done ? errno : EIO;
            pcap->fd = -1;
            return 0;
        }
    }
    return 1;
}

static void add(struct pcap *pcap, struct pcap_packet *packet)
{
    struct timespec now;

    if (!flush(pcap)) {
        pcap->lost++;
        return;
    }
    if (!packet->time_ns) {
        clock_gettime(CLOCK_REALTIME, &now);
        packet->time_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    }
    packet->lost = pcap->lost;
    pcap->from = 0;
    pcap->to = (uint32_t)pcap_block(pcap->block, packet);
    if (flush(pcap) || pcap->from) {
        pcap->lost = 0;
        return;
    }
    pcap->to = 0; /* nothing of it was taken */
    pcap->lost++;
}

int pcap_write(struct pcap *pcap, uint64_t time_ns, uint32_t flags, const void *frame,
               uint64_t size)
{
    struct pcap_packet packet = {
        .direction = flags & ~PCAP_DROPPED, .time_ns = time_ns, .length = size, .frame = frame,
        .comment = flags & PCAP_DROPPED ? "dropped" : "",
    };

    while (__atomic_exchange_n(&pcap->busy, 1, __ATOMIC_ACQUIRE))
        ; /* the other thread writes, to the page cache or to a FIFO that does not block */
    int open = pcap->fd >= 0;
    if (open)
        add(pcap, &packet);
    int ended = open && pcap->fd < 0;
    __atomic_store_n(&pcap->busy, 0, __ATOMIC_RELEASE);
    return ended;
}
